"""``giantserve generate``: offline, in this process, without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from giantserve.cli.engine_options import Model, with_engine_options
from giantserve.options import ENGINE_OPTIONS, parse_options


@with_engine_options
def generate(
    model: Model,
    prompt: Annotated[list[str], typer.Option(help="A prompt; may be given several times.")],
    engine: dict[str, Any],
    max_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    trace: Annotated[
        Path | None,
        typer.Option(help="Write what moved and what computed when, for ui.perfetto.dev."),
    ] = None,
    stats: Annotated[bool, typer.Option(help="Print the engine's statistics, too.")] = False,
) -> None:
    """Complete prompts offline and print the texts."""
    options = parse_options({**engine, "trace": trace}, ENGINE_OPTIONS)

    from giantserve import LLM, SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    with LLM(model, **options) as llm:
        for text, output in zip(prompt, llm.generate(prompt, params), strict=True):
            if json_output:
                reason = output.finish_reason
                answer = {"prompt": text, "text": output.text, "finish_reason": reason}
                typer.echo(json.dumps(answer))
            else:
                typer.echo(text + output.text)
        if stats:
            typer.echo(json.dumps(llm.stats(), indent=2, default=str))
