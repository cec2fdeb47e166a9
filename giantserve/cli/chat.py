"""``giantserve chat``: talk to a server, the answer streaming in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from giantserve.errors import GiantserveError

if TYPE_CHECKING:
    from giantserve.client import Client


def chat(
    url: Annotated[str, typer.Option(help="Where the server is.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Default: the one it serves.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="GIANTSERVE_API_KEY")] = None,
    message: Annotated[str | None, typer.Option(help="Say this, print the answer, end.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.7,
) -> None:
    """Chat with a server. An empty line or Ctrl-D ends it."""
    import httpx

    from giantserve.client import Client

    turns: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    options: dict[str, Any] = {"temperature": temperature}
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    try:
        with Client(url, model=model, api_key=api_key) as client:
            _converse(client, message, turns, options)
    except httpx.HTTPError as error:
        raise GiantserveError(
            f"cannot talk to the server: {error}; is it running? see 'giantserve serve'"
        ) from error


def _converse(
    client: Client, message: str | None, turns: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    if message is not None:
        _answer(client, [*turns, {"role": "user", "content": message}], options)
        return
    while said := _read():
        turns.append({"role": "user", "content": said})
        turns.append({"role": "assistant", "content": _answer(client, turns, options)})


def _read() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        typer.echo()
        return ""


def _answer(client: Client, turns: list[dict[str, Any]], options: dict[str, Any]) -> str:
    parts = []
    for text in client.stream_chat(turns, **options):
        typer.echo(text, nl=False)
        parts.append(text)
    typer.echo()
    return "".join(parts)
