"""`shortlist check`: what a log holds and what it can serve, in words."""

from __future__ import annotations

import json

import typer

from shortlist.cli import _options as options


def command(
    source: options.Source,
    items: options.Items = None,
    users: options.Users = None,
    user: options.User = None,
    item: options.Item = None,
    timestamp: options.Timestamp = None,
    action: options.ActionColumn = None,
    basket: options.Basket = None,
    label: options.Label = None,
    role: options.RoleFlags = None,
    separator: options.Separator = None,
    max_bad: options.MaxBad = 0.01,
    quarantine: options.QuarantineFile = None,
    json_: options.Json = False,
) -> None:
    """Say in words what a log holds: rows, span, ties, leaks, what it can serve. Changes nothing.

    Example: shortlist check clicks.csv --items products.csv --user visitor
    """
    from shortlist.data.check import check
    from shortlist.data.roles import describe_roles

    roles = options.roles_from(
        role, user=user, item=item, timestamp=timestamp, action=action, basket=basket, labels=label
    )
    log = options.open_log(
        source, items=items, users=users, roles=roles, separator=separator, quarantine=quarantine, max_bad=max_bad
    )
    health = check(log)
    if json_:
        typer.echo(json.dumps({**health.as_dict(), "roles": describe_roles(log.roles, roles)}, indent=1))
        return
    for line in [*describe_roles(log.roles, roles), "", *health.sentences()]:
        typer.echo(line)
