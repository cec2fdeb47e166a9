"""``giantserve serve``: hands over to the Ray Serve deployment."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from giantserve.cli.engine_options import LIMITS, Model, with_engine_options
from giantserve.options import engine_config
from giantserve.units import parse_bytes

LISTEN = "Listening"


@with_engine_options
def serve(
    model: Model,
    engine: dict[str, Any],
    host: Annotated[str, typer.Option(rich_help_panel=LISTEN)] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, rich_help_panel=LISTEN)] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="GIANTSERVE_API_KEY", help="Required of clients.", rich_help_panel=LISTEN
        ),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name in the API.", rich_help_panel=LISTEN)
    ] = None,
    max_body: Annotated[
        str, typer.Option(help="Largest request body.", rich_help_panel=LISTEN)
    ] = "4MiB",
    num_replicas: Annotated[int, typer.Option(min=1, help="Engines side by side.")] = 1,
    address: Annotated[
        str, typer.Option(help="Ray cluster to join; 'local' starts one here.")
    ] = "local",
    max_queued_requests: Annotated[
        int,
        typer.Option(
            min=1,
            help="Requests that may wait; more are refused with 429.",
            rich_help_panel=LIMITS,
        ),
    ] = 1024,
    enable_prefix_caching: Annotated[
        bool,
        typer.Option("--prefix-caching/--no-prefix-caching", help="Reuse KV of equal prefixes."),
    ] = True,
    tenant_prefix_share: Annotated[
        float,
        typer.Option(help="Of each tier, what cached prefixes of one API user may fill."),
    ] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(help="Requests without a seed draw the same tokens at every start, in order."),
    ] = None,
) -> None:
    """Serve a model over an OpenAI-compatible HTTP API, on Ray Serve."""
    own = {
        "served_model_name": served_model_name,
        "max_queued_requests": max_queued_requests,
        "enable_prefix_caching": enable_prefix_caching,
        "tenant_prefix_share": tenant_prefix_share,
        "seed": seed,
    }
    engine = {**engine, **own}
    engine_config({"model": model, **engine})
    options = {**engine, "num_replicas": num_replicas, "max_body_bytes": parse_bytes(max_body)}
    command = [sys.executable, "-m", "deployments", model]
    command += [f"{name}={value}" for name, value in options.items() if value is not None]
    command += [f"--host={host}", f"--port={port}", f"--address={address}"]
    if api_key is not None:
        os.environ["GIANTSERVE_API_KEY"] = api_key
    os.execv(sys.executable, command)
