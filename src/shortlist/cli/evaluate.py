"""`shortlist evaluate`: a run on its held-out requests."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from shortlist.cli._options import Json, RunFolder, Threads, called_as


def command(
    run: RunFolder,
    window: Annotated[Literal["valid", "test"], typer.Option(help="Choose on valid; look at test once.")] = "test",
    k: Annotated[int | None, typer.Option(help="Page length; default: the run's.")] = None,
    no_repeats: Annotated[
        bool, typer.Option("--no-repeats", help="Filter items seen before, and do not count them.")
    ] = False,
    max_requests: Annotated[int | None, typer.Option(help="A seeded sample of so many requests.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the result as JSON to this file.")] = None,
    report: Annotated[
        bool,
        typer.Option("--report", help="Also write RUN-report/report.html, with baselines and the validation window."),
    ] = False,
    threads: Threads = None,
    json_: Json = False,
) -> None:
    """Quality with intervals, where held-out items were lost, and what each stage cost.

    Example: shortlist evaluate runs/shop --window valid
    """
    from shortlist.cascade.run import load_run
    from shortlist.evaluation.evaluate import compare
    from shortlist.evaluation.evidence import write_json
    from shortlist.evaluation.runs import cost_rows, evaluate_run
    from shortlist.evaluation.tables import aligned, comparison_text, losses_text, slices_text
    from shortlist.evaluation.tasks import task_rows

    loaded, page, repeats = load_run(run), None, False if no_repeats else None
    if report:
        from shortlist.evaluation.report import report_evaluation

        found, page = report_evaluation(
            loaded, window, k=k, repeats=repeats, max_requests=max_requests, command=called_as()
        )
        result = replace(found, report=replace(found.report, name=run.name))
    else:
        result = evaluate_run(loaded, name=run.name, window=window, k=k, repeats=repeats, max_requests=max_requests)
    if out is not None:
        write_json(out, result.as_dict())
    if json_:
        typer.echo(json.dumps(result.as_dict(), indent=1))
        return
    parts = (
        comparison_text(compare([result.report])),
        losses_text(result.lost_at),
        "\n".join(aligned(cost_rows(result.cost))),
        *(["\n".join(aligned(task_rows(result.tasks)))] if result.tasks else []),
        slices_text(result.report),
    )
    typer.echo("\n\n".join(parts))
    if page is not None:
        typer.echo(f"\nThe report is in {page}.")
