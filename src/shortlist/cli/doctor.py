"""`shortlist doctor`: all that a report of trouble needs, in one paste."""

from __future__ import annotations

import json

import typer

from shortlist.cli._options import Json


def command(json_: Json = False) -> None:
    """Print versions, devices, threads, data and a quick self-check. Made to be pasted: no names, no home folder.

    Example: shortlist doctor
    """
    from shortlist.evaluation.doctor import examine, lines

    report = examine()
    typer.echo(json.dumps(report, indent=1) if json_ else "\n".join(lines(report)))
