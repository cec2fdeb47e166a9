"""``giantserve plan``: what the planner would do, and what it says it will cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from giantserve.cli.engine_options import PLACE, Model, with_engine_options
from giantserve.errors import ConfigError
from giantserve.options import engine_config


@with_engine_options
def plan(
    model: Model,
    engine: dict[str, Any],
    cluster: Annotated[
        Path | None,
        typer.Option(
            help="Plan for the machines of this YAML file, in place of this one; MODEL may then be "
            "a folder with only its config.json.",
            rich_help_panel=PLACE,
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Only the plan, as JSON.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="Also write a page with memory and a timeline.")
    ] = None,
) -> None:
    """Show where a model's weights would lie and how fast it would run. Loads no weights."""
    config = engine_config({"model": model, **engine})

    from giantserve.cli.plan_page import plan_page
    from giantserve.cli.plan_report import plan_report
    from giantserve.cli.plan_table import print_report
    from giantserve.planning import problem_here, problem_on
    from partition import ClusterSpec

    problem = (
        problem_here(config)
        if cluster is None
        else problem_on(ClusterSpec.from_yaml(cluster), config)
    )
    if json_output and html is None:
        typer.echo(problem.plan().to_json())
        return
    report = plan_report(problem)
    if html is not None:
        try:
            html.write_text(plan_page(report), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {html}: {error.strerror}; name another file") from None
    if json_output:
        typer.echo(report.plan.to_json())
    else:
        print_report(report)
