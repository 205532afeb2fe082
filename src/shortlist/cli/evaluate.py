"""`shortlist evaluate`: a run on its held-out requests."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from shortlist.cli._options import Json, RunFolder, called_as

if TYPE_CHECKING:
    from shortlist.cascade.run import Run
    from shortlist.evaluation.evaluate import Window
    from shortlist.evaluation.runs import RunReport


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

    loaded, page = load_run(run), None
    if report:
        result, page = _with_report(loaded, window, k, no_repeats, max_requests)
    else:
        repeats = False if no_repeats else None
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
        slices_text(result.report),
    )
    typer.echo("\n\n".join(parts))
    if page is not None:
        typer.echo(f"\nThe report is in {page}.")


def _with_report(
    run: Run, window: Window, k: int | None, no_repeats: bool, max_requests: int | None
) -> tuple[RunReport, Path]:
    """The run on the window, and the page that tells of it; of the test window together with the validation window."""
    from shortlist.evaluation.report import judge, write_report

    began = time.perf_counter()
    surfaces = (False,) if no_repeats else None
    windows: tuple[Window, ...] = ("valid",) if window == "valid" else ("valid", window)
    judged = [judge(run, one, k=k, surfaces=surfaces, max_requests=max_requests) for one in windows]
    page = write_report(run, judged, command=called_as(), seconds=time.perf_counter() - began)
    mine = judged[-1].cascade
    return replace(mine, report=replace(mine.report, name=run.folder.name)), page
