"""`shortlist console`: watch and steer a running server in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    server: Annotated[str, typer.Option(help="Address of the server.")] = "http://127.0.0.1:8000",
    admin: Annotated[
        str | None, typer.Option(help="Address of its admin port (serve --admin-port); default: the server's own.")
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(envvar="SHORTLIST_KEY", show_envvar=True, help="API key, of the role admin to steer as well."),
    ] = None,
    port: Annotated[int, typer.Option(help="Port of the console on this machine; 0 = any free one.")] = 8080,
    curve: Annotated[
        Path | None, typer.Option(help="budget.json of `shortlist budget`, where the server has none of its run.")
    ] = None,
) -> None:
    """Show traffic, budget, single requests, data, snapshots and experiments of a running server, until Ctrl-C.

    Example: shortlist console --server http://127.0.0.1:8000
    """
    from shortlist.serving.console.app import ConsoleConfig, run
    from shortlist.serving.console.client import Target

    target = Target(server=server, admin=admin, key=key)
    run(ConsoleConfig(target=target, port=port, curve=curve), typer.echo)
