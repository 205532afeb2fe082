"""`shortlist energy`: performance, FLOPs, energy and carbon of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from shortlist.cli._options import Json, RunFolder, Settings, Threads


def command(
    run: RunFolder,
    chain: Annotated[
        list[str] | None,
        typer.Option(help="Chain such as a0-b1-c0; repeat for several, the first is what others are held against."),
    ] = None,
    allocated: Annotated[
        bool, typer.Option("--allocated", help="Also with what `shortlist calibrate` made: a chain for each request.")
    ] = False,
    window: Annotated[Literal["valid", "test"], typer.Option(help="Choose on valid; look at test once.")] = "valid",
    max_requests: Annotated[int, typer.Option(min=1, help="A seeded sample of so many requests.")] = 1_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests answered at once.")] = 16,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write; default: RUN-report/energy.json.")] = None,
    threads: Threads = None,
    json_: Json = False,
) -> None:
    """Say what 1,000 requests bring and take: quality, FLOPs, energy and carbon, for the default chain and others.

    With --set, only what energy is reckoned with can be changed: energy.watts, energy.pue, energy.grid.

    Example: shortlist energy runs/shop --chain a0-b0-c0 --chain a0-b0-c1 --set energy.watts=8
    """
    from shortlist.cascade.allocation.calibration import allocation_path, load_allocation
    from shortlist.cascade.run import load_run
    from shortlist.errors import ConfigError
    from shortlist.evaluation.energy import measure, report_dict, report_text
    from shortlist.evaluation.evidence import write_json
    from shortlist.evaluation.report import report_folder

    for change in settings or ():
        if not change.startswith("energy."):
            raise ConfigError(
                f"--set {change} is no setting of [energy]; change it in the run's settings and train again"
            )
    folder = run.absolute()
    if allocated and not allocation_path(folder).exists():
        raise ConfigError(f"nothing allocates for {run} yet; run `shortlist calibrate {run}` first")
    loaded = load_run(folder)
    found = measure(
        loaded,
        chain or (),
        allocation=load_allocation(allocation_path(folder), version=loaded.version) if allocated else None,
        window=window,
        max_requests=max_requests,
        batch_size=batch_size,
        config=loaded.config.override(*(settings or ())).energy,
    )
    result = report_dict(found)
    write_json(out or report_folder(run) / "energy.json", result)
    typer.echo(json.dumps(result, indent=1) if json_ else report_text(found))
