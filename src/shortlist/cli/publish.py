"""`shortlist publish`: versions of a run in one place, which servers follow."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from shortlist.cli._options import Json


def command(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN]", help="Folder of a trained run; left out with --list or --rollback."),
    ] = None,
    to: Annotated[Path | None, typer.Option(metavar="PLACE", help="Place to publish to; made when missing.")] = None,
    keep: Annotated[int, typer.Option(min=1, help="Versions that stay in the place; older ones are removed.")] = 5,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy every file; default: share files with the run where possible.")
    ] = False,
    note: Annotated[str, typer.Option(help="Words to keep with the version.")] = "",
    list_: Annotated[
        Path | None, typer.Option("--list", metavar="PLACE", help="Print the versions of a place.")
    ] = None,
    rollback: Annotated[
        Path | None, typer.Option(metavar="PLACE", help="Go back in a place to --version, else to the one before.")
    ] = None,
    version: Annotated[str | None, typer.Option(help="With --rollback: the version to serve.")] = None,
    json_: Json = False,
) -> None:
    """Publish a run to a place, list the versions of a place, or go back to an earlier one.

    A server of the place (shortlist serve PLACE) takes up the change within a second, without a failed request.

    Example: shortlist publish RUN --to PLACE
    """
    from shortlist.errors import ConfigError
    from shortlist.store.published import Place

    if (to is not None) + (list_ is not None) + (rollback is not None) != 1 or (to is None) != (run is None):
        raise ConfigError(
            "say one thing: `shortlist publish RUN --to PLACE`, `shortlist publish --list PLACE`, "
            "or `shortlist publish --rollback PLACE`"
        )
    if version is not None and rollback is None:
        raise ConfigError("--version says where to go back to: use it with --rollback PLACE")
    place = Place(next(folder for folder in (to, list_, rollback) if folder is not None))
    if run is not None:
        place.publish(run, keep=keep, link=not copy, note=note)
    elif rollback is not None:
        place.rollback(version)
    state = place.state()
    if json_:
        typer.echo(json.dumps(asdict(state), indent=1))
        return
    for one in state.versions:
        mark = "*" if one.version == state.current else " "
        typer.echo(f"{mark} {one.version}  {one.published_at}  {one.note}".rstrip())
