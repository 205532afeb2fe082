"""`shortlist experiment`: what experiments found, and whether their file is as it should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from shortlist.cli._options import Json


def command(
    what: Annotated[
        Literal["report", "check"],
        typer.Argument(help="report: what came of experiments; check: whether a file of experiments can be served."),
    ],
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="TOML file with [experiments.NAME], for check.")
    ] = None,
    log: Annotated[Path | None, typer.Option(help="Request log of the server: RUN.requests.db.")] = None,
    events: Annotated[
        str | None,
        typer.Option(help="Event store of the server (RUN.events.db or postgresql://...), or a log of events."),
    ] = None,
    experiment: Annotated[str | None, typer.Option(help="Name of one experiment; default: all.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for experiments.html and experiments.json.")] = None,
    json_: Json = False,
) -> None:
    """Report experiments with intervals that may be looked at any day, checks of shares, guardrails, and interleaving.

    Example: shortlist experiment report --log RUN.requests.db --events RUN.events.db --out report
    """
    from shortlist.cascade.experiments import read_experiments
    from shortlist.errors import ConfigError

    if what == "check":
        if file is None:
            raise ConfigError("name the file to check: shortlist experiment check FILE.toml")
        found = read_experiments(file)
        if json_:
            typer.echo(json.dumps({name: one.to_table() for name, one in found.items()}, indent=1))
            return
        for name, one in found.items():
            shares = ", ".join(f"{variant} {share:.1%}" for variant, share in one.shares.items())
            typer.echo(
                f"{name}: {shares} of {one.settings.traffic:.1%} on {one.settings.surface}; decided by {one.primary}"
            )
        return
    if log is None:
        raise ConfigError(
            "name the request log: shortlist experiment report --log RUN.requests.db --events RUN.events.db"
        )
    from shortlist.evaluation.experiment_page import findings_text, write_findings
    from shortlist.evaluation.experiments import report

    reported = report(log, events, experiment)
    page = None if out is None else write_findings(out, reported)
    typer.echo(
        json.dumps({"experiments": [one.as_dict() for one in reported]}, indent=1) if json_ else findings_text(reported)
    )
    if page is not None and not json_:
        typer.echo(f"\nThe page is {page}.")
