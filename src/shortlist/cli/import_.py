"""`shortlist import`: tables of RecBole, Gorse or FuxiCTR become ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from shortlist.cli._options import Json


def command(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder of the other library's files.")],
    out: Annotated[Path, typer.Option(help="Folder for events.parquet, items.parquet, users.parquet.")],
    format_: Annotated[str, typer.Option("--from", help="Whose files they are: recbole, gorse or fuxictr.")],
    user: Annotated[str | None, typer.Option(help="Column of the user, where its name does not tell.")] = None,
    item: Annotated[str | None, typer.Option(help="Column of the item, where its name does not tell.")] = None,
    timestamp: Annotated[str | None, typer.Option(help='Column of the time; "" says that there is none.')] = None,
    label: Annotated[list[str] | None, typer.Option(help="Column of an outcome; repeat for several.")] = None,
    json_: Json = False,
) -> None:
    """Read what RecBole, Gorse or FuxiCTR use, write our tables, and print the command that trains on them.

    Example: shortlist import dataset/ml-100k --from recbole --out imported/ml-100k
    """
    from shortlist.data.imports import import_folder, write_import
    from shortlist.data.roles import Roles

    given = Roles(user=user, item=item, timestamp=timestamp, labels=tuple(label or ()))
    made = import_folder(format_, source, given)
    train = write_import(made, out)
    frames = {"events": made.events, "items": made.items, "users": made.users}
    counts = {name: frame.height for name, frame in frames.items() if frame is not None}
    if json_:
        typer.echo(json.dumps({"folder": str(out), **counts, "notes": list(made.notes), "command": train}, indent=1))
        return
    typer.echo(f"{out}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
    for note in made.notes:
        typer.echo(note)
    typer.echo(f"\nNext: {train}")
