"""`shortlist check`: what a log holds and what it can serve, in words."""

from __future__ import annotations

import json

import typer

from shortlist.cli._options import Json, LogOptions, with_log


@with_log
def command(log: LogOptions, json_: Json = False) -> None:
    """Say in words what a log holds: rows, span, ties, leaks, what it can serve. Changes nothing.

    Example: shortlist check clicks.csv --items products.csv --user visitor
    """
    from shortlist.data.check import check
    from shortlist.data.roles import describe_roles

    events = log.open()
    health, roles = check(events), describe_roles(events.roles, log.roles())
    if json_:
        typer.echo(json.dumps({**health.as_dict(), "roles": roles}, indent=1))
    else:
        typer.echo("\n".join([*roles, "", *health.sentences()]))
