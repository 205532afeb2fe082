"""`shortlist ads`: a run's scores become chances of clicks, which is what its ads are priced by."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from shortlist.cli._options import Json, RunFolder


def command(
    run: RunFolder,
    method: Annotated[
        str,
        typer.Option(help="platt: a curve of two numbers; isotonic: any rising curve, for a thousand clicks or more."),
    ] = "platt",
    max_requests: Annotated[int, typer.Option(help="Validation requests that are judged.")] = 4_000,
    json_: Json = False,
) -> None:
    """Calibrate a run's scores to chances of clicks on its validation requests, and say how reliable they are on held-out ones.

    The result stands beside the run, in RUN.clicks.json, and belongs to this version of it: after training again, call this again.

    Example: shortlist ads RUN
    """
    from shortlist.cascade.click_chance import ClickConfig, clicks_path, fit_calibration, reliability_lines
    from shortlist.cascade.run import load_run

    config = ClickConfig(method=method, max_requests=max_requests)  # type: ignore[arg-type]  # refuses others
    folder = run.absolute()
    path = clicks_path(folder)
    loaded = load_run(folder)
    made, bins = fit_calibration(loaded, config)
    made.save(path)
    if json_:
        typer.echo(json.dumps({"path": str(path), **asdict(made), "bins": [asdict(b) for b in bins]}, indent=1))
        return
    kind = "items that were shown" if made.judged == "impressions" else "candidates (the log has no impressions)"
    typer.echo(f"{made.num_judged:,} {kind}, {made.num_clicked:,} of them clicked, scored by {', '.join(made.systems)}")
    typer.echo("Fitted on half of the requests, on the other half:")
    typer.echo("\n".join(reliability_lines(bins)))
    told = ", ".join(f"{name} {value:.4f}" for name, value in made.held_out.items())
    typer.echo(f"{told}\nThe calibration is in {path}.")
