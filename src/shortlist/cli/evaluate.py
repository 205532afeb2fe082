"""`shortlist evaluate`: a run on its held-out requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from shortlist.cli._options import Json, RunFolder


def command(
    run: RunFolder,
    window: Annotated[Literal["valid", "test"], typer.Option(help="Choose on valid; look at test once.")] = "test",
    k: Annotated[int | None, typer.Option(help="Page length; default: the run's.")] = None,
    no_repeats: Annotated[
        bool, typer.Option("--no-repeats", help="Filter items seen before, and do not count them.")
    ] = False,
    max_requests: Annotated[int | None, typer.Option(help="A seeded sample of so many requests.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the result as JSON to this file.")] = None,
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

    result = evaluate_run(
        load_run(run),
        name=run.name,
        window=window,
        k=k,
        repeats=False if no_repeats else None,
        max_requests=max_requests,
    )
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
