"""Finding the files of a data set, and what several loaders share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import polars as pl

from shortlist.data.datasets._facts import DATA_SETS
from shortlist.data.log import EventLog, read
from shortlist.data.roles import SINGLE_ROLES, Roles
from shortlist.errors import DataError


def find(root: Path | None, name: str) -> Path:
    """The file of the set called `name` that is there; see `DataSet.find`.

    Raises DataError that says where to download it and where to put it.
    """
    facts = DATA_SETS[name]
    path = facts.find(root)
    if path is not None:
        return path
    where = (
        "SHORTLIST_DATA is not set"
        if root is None
        else f"none of {', '.join(facts.files)} in {root} or {root / facts.folders[0]}"
    )
    target = Path("FOLDER" if root is None else root) / facts.folders[0]
    raise DataError(
        f"{name}: files not found ({where}). Download {facts.download}, "
        f"put the files into {target}, and set SHORTLIST_DATA={target.parent}."
    )


def only(
    *, user: str, item: str, timestamp: str = "", basket: str = "", value: str = "", labels: tuple[str, ...] = ("",)
) -> Roles:
    """Exactly these roles: nothing is guessed."""
    off = dict.fromkeys(SINGLE_ROLES, "")
    roles = Roles(**off, labels=labels)
    return replace(roles, user=user, item=item, timestamp=timestamp, basket=basket, value=value)


def named(log: EventLog, name: str, *notes: str) -> EventLog:
    """The log under the name of its data set, with notes of the loader instead of the reader's."""
    return replace(log, source=name, notes=notes)


def read_exactly(
    events: pl.DataFrame, items: pl.DataFrame | None, users: pl.DataFrame | None, roles: Roles
) -> EventLog:
    """Read tables of a published set: not one bad row is expected, so none is allowed."""
    return read(events, items=items, users=users, roles=roles, max_bad_share=0.0)
