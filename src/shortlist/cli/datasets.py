"""`shortlist datasets`: the public data sets, and which of them are here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from shortlist.cli._options import Json

if TYPE_CHECKING:
    from shortlist.data.datasets import DataSet


def command(json_: Json = False) -> None:
    """List the public data sets: what they hold, their terms, and where each was found or can be had.

    Example: shortlist datasets
    """
    from shortlist.data.datasets import data_root, data_sets

    root = data_root()
    if json_:
        listed = [{**asdict(each), "found": _found(each, root)} for each in data_sets()]
        typer.echo(json.dumps(listed, indent=1))
    else:
        typer.echo("\n".join(_lines(data_sets(), root)))


def _found(facts: DataSet, root: Path | None) -> str | None:
    """Where it is: a path, or "package"; None where it is missing."""
    path = facts.find(root)
    return "package" if facts.is_packaged else None if path is None else str(path)


def _lines(sets: tuple[DataSet, ...], root: Path | None) -> Iterator[str]:
    """A paragraph per set."""
    yield "SHORTLIST_DATA is not set" if root is None else f"SHORTLIST_DATA is {root}"
    for facts in sets:
        found = _found(facts, root)
        counts = f"{facts.num_events:,} events, {facts.num_users:,} users, {facts.num_items:,} items"
        yield f"\n{facts.name:<16} {counts}"
        yield f"    {facts.about}"
        if facts.caveat:
            yield f"    Mind: {facts.caveat}"
        yield f"    Terms: {facts.licence}"
        if found == "package":
            yield "    Comes with the package."
        elif found:
            yield f"    Found: {found}"
        else:
            where = "a folder" if root is None else f"{root}/"
            folder = f"{facts.folders[0]}/"
            yield f"    Missing: download {facts.download}"
            yield f"    into {folder} below {where}{' that SHORTLIST_DATA names' if root is None else ''}."
