"""`shortlist demo`: the whole way on the built-in log of a real shop, offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from shortlist.cli._options import Json, Quiet, Settings, Threads, called_as


def command(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    settings: Settings = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Train anew even if a run is there.")] = False,
    threads: Threads = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Train a four-stage cascade on a year of a real shop's baskets, and put it beside the simple systems that are hard to beat.

    Example: shortlist demo --out runs/demo
    """
    from shortlist.evaluation.demo import run_demo

    say = (lambda line="": None) if quiet or json_ else typer.echo
    result = run_demo(out, settings=settings or (), fresh=fresh, say=say, progress=not quiet, command=called_as())
    if json_:
        typer.echo(json.dumps(result, indent=1))
