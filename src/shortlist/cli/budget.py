"""`shortlist budget`: quality against cost of every way to choose chains."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated

import typer

from shortlist.cli._bar import bars
from shortlist.cli._options import Json, Quiet, RunFolder


def command(
    run: RunFolder,
    window: Annotated[str, typer.Option(help="Requests to judge on: valid while choosing, test once.")] = "valid",
    resource: Annotated[str, typer.Option(help="What budgets are set in: ms or mflop.")] = "ms",
    budget_ms: Annotated[float | None, typer.Option(help="Budget to mark in the figure; default: the run's.")] = None,
    arms: Annotated[
        list[str] | None, typer.Option("--arm", help="Allocator to judge; may be given again. Default: all.")
    ] = None,
    max_requests: Annotated[int, typer.Option(help="Test requests at most.")] = 4_000,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Calibrate the run's chains, aim every allocator at five budgets, and draw what each brings and costs.

    Writes RUN-report/budget.html and budget.json. `shortlist calibrate RUN --budget-ms X` then makes the chosen point the served one.

    Example: shortlist budget RUN --window test
    """
    from shortlist.cascade.run import load_run
    from shortlist.errors import ConfigError
    from shortlist.evaluation.budget import frontier_table, judge_budgets, write_budget
    from shortlist.evaluation.chains import WORTHS
    from shortlist.evaluation.frontier import ARMS
    from shortlist.evaluation.tables import aligned

    if window not in ("valid", "test"):
        raise ConfigError(f"--window must be valid or test, got {window!r}")
    if budget_ms is not None and resource != "ms":
        raise ConfigError(f"--budget-ms marks a figure in ms, and --resource is {resource}; leave one of them out")
    loaded = load_run(run.absolute())
    if budget_ms is not None:
        loaded = replace(loaded, config=loaded.config.override(f"allocation.budget_ms={budget_ms}"))
    with bars(shown=not quiet) as tell:
        report = judge_budgets(
            loaded,
            window="test" if window == "test" else "valid",
            resource=resource,
            arms=arms or ARMS,
            max_requests=max_requests,
            tell=tell,
        )
    page = write_budget(loaded, report)
    if json_:
        typer.echo(json.dumps(report.as_dict(), indent=1))
        return
    typer.echo("\n".join(aligned(frontier_table(report.frontier, WORTHS[report.calibration.config.worth]))))
    typer.echo(f"\n{report.sentence}\nThe page is {page}.")
