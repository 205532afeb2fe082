"""`shortlist energy`: performance, FLOPs, energy and carbon of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from shortlist.cli._options import Json, RunFolder, Threads


def command(
    run: RunFolder,
    chain: Annotated[
        list[str] | None,
        typer.Option(help="Chain such as a0-b1-c0; repeat for several, the first is what others are held against."),
    ] = None,
    window: Annotated[Literal["valid", "test"], typer.Option(help="Choose on valid; look at test once.")] = "valid",
    max_requests: Annotated[int, typer.Option(min=1, help="A seeded sample of so many requests.")] = 1_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests answered at once.")] = 16,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Of the run's [energy]: watts=8, pue=1.1, grid=0.05; repeat."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write; default: RUN-report/energy.json.")] = None,
    threads: Threads = None,
    json_: Json = False,
) -> None:
    """Say what 1,000 requests bring and take: quality, FLOPs, energy and carbon, for the default chain and others.

    Example: shortlist energy runs/shop --chain a0-b0-c0 --chain a0-b0-c1 --set watts=8
    """
    from shortlist.cascade.run import load_run
    from shortlist.evaluation.energy import measure, report_dict, report_text
    from shortlist.evaluation.evidence import write_json
    from shortlist.evaluation.report import report_folder

    loaded = load_run(run)
    config = loaded.config.override(*(f"energy.{setting}" for setting in settings or ())).energy
    found = measure(loaded, chain or (), window=window, max_requests=max_requests, batch_size=batch_size, config=config)
    result = report_dict(found)
    file = out or report_folder(run) / "energy.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, result)
    typer.echo(json.dumps(result, indent=1) if json_ else report_text(found))
