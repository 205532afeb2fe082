"""`shortlist bench`: run a benchmark, or list them and what is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from shortlist.cli._options import Json


def command(
    name: Annotated[str | None, typer.Argument(help="Benchmark to run; without it, all are listed.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small form, for a look: nothing is recorded.")] = False,
    benchmarks: Annotated[
        Path | None, typer.Option(help="Folder of benchmarks; default: benchmarks/ of the clone.")
    ] = None,
    json_: Json = False,
) -> None:
    """Run a benchmark while nothing else of ours is measured on this machine, and record it; or list all.

    Example: shortlist bench sparse_step --quick
    """
    from shortlist.errors import ConfigError
    from shortlist.evaluation import benchmarks as frame

    folder = frame.benchmark_folder(benchmarks)
    if name is None:
        if quick:
            raise ConfigError("--quick needs the name of a benchmark; `shortlist bench` lists them")
        rows = frame.listing(folder)
        typer.echo(json.dumps(rows, indent=1) if json_ else "\n".join(frame.listing_lines(rows)))
        return
    done = frame.run(folder, name, quick=quick, say=lambda line: typer.echo(line, err=True), live=not json_)
    if json_:
        typer.echo(json.dumps(done, indent=1))
    else:
        where = "nothing recorded" if quick else f"recorded in {folder / 'results' / f'{name}.json'}"
        typer.echo(f"{name}: {done['seconds']:.1f} s, {where}")
