"""Options that several commands share, and how a log named on the command line is opened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from shortlist.data.log import EventLog
    from shortlist.data.roles import Roles

Source = Annotated[
    str, typer.Argument(metavar="LOG", help="Event log (CSV, Parquet, JSONL, Arrow), or a data set such as builtin.")
]
Items = Annotated[
    Path | None, typer.Option(help="Table of items: an id column and fields such as title, price, category.")
]
Users = Annotated[Path | None, typer.Option(help="Table of users: an id column and fields.")]
RoleFlags = Annotated[
    list[str] | None,
    typer.Option(
        "--role",
        metavar="ROLE=COLUMN",
        help="Which column plays a role, such as value=price*quantity; repeat for several.",
    ),
]
User = Annotated[str | None, typer.Option(help="Column of the user.")]
Item = Annotated[str | None, typer.Option(help="Column of the item.")]
Timestamp = Annotated[str | None, typer.Option(help="Column of the time; an empty name says there is none.")]
ActionColumn = Annotated[str | None, typer.Option("--action", help="Column of the kind of event.")]
Basket = Annotated[str | None, typer.Option(help="Column of the basket or order: its events happened together.")]
Label = Annotated[list[str] | None, typer.Option(help="Column that says how an event turned out; repeat for several.")]
Separator = Annotated[str | None, typer.Option(help="Field separator of a CSV; found out where it is not given.")]
MaxBad = Annotated[float, typer.Option(help="Share of bad rows above which reading stops.")]
QuarantineFile = Annotated[
    Path | None, typer.Option(help="Where bad rows are kept with their reasons (Parquet or CSV).")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a trained run.")]


def open_log(
    source: str,
    *,
    items: Path | None = None,
    users: Path | None = None,
    roles: Roles | None = None,
    separator: str | None = None,
    quarantine: Path | None = None,
    max_bad: float = 0.01,
    default_quarantine: Path | None = None,
) -> EventLog:
    """The log at a path, or a data set by its name; DataError or ConfigError where neither is there.

    Bad rows go to `quarantine`, else to `default_quarantine` where there are any.
    """
    from shortlist.data.datasets import load, names
    from shortlist.data.log import read

    if source in names() and not Path(source).exists():
        return load(source)
    return read(
        Path(source),
        items=items,
        users=users,
        roles=roles,
        separator=separator,
        quarantine=quarantine or default_quarantine,
        max_bad_share=max_bad,
    )


def roles_from(
    flags: Sequence[str] | None,
    *,
    user: str | None = None,
    item: str | None = None,
    timestamp: str | None = None,
    action: str | None = None,
    basket: str | None = None,
    labels: Sequence[str] | None = None,
) -> Roles | None:
    """Roles given on the command line, or None where none is; ConfigError for a role that does not exist."""
    import dataclasses
    import difflib

    from shortlist.data.roles import Roles
    from shortlist.errors import ConfigError

    named = {"user": user, "item": item, "timestamp": timestamp, "action": action, "basket": basket}
    given: dict[str, str | tuple[str, ...]] = {role: column for role, column in named.items() if column is not None}
    known = [f.name for f in dataclasses.fields(Roles) if f.name != "labels"]
    for flag in flags or []:
        role, separator, column = flag.partition("=")
        if not separator or role not in known:
            near = difflib.get_close_matches(role, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"roles are {', '.join(known)}"
            raise ConfigError(f"--role {flag}: write --role ROLE=COLUMN; {hint}")
        given[role] = column
    if labels:
        given["labels"] = tuple(labels)
    return Roles(**given) if given else None  # type: ignore[arg-type]
