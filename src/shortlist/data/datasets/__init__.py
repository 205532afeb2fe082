"""Public data sets by name: `load("ml-100k")` gives an EventLog; only the built-in shop log comes with the package."""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from shortlist.data.datasets._facts import DATA_SETS, DataSet
from shortlist.errors import DataError

__all__ = ["DataSet", "data_root", "data_sets", "load", "names"]

if TYPE_CHECKING:
    from shortlist.data.log import EventLog


def names() -> tuple[str, ...]:
    """Every name that `load` knows."""
    return tuple(DATA_SETS)


def data_sets() -> tuple[DataSet, ...]:
    """What is known of every set, without reading one."""
    return tuple(DATA_SETS.values())


def data_root(root: Path | str | None = None) -> Path | None:
    """The folder of public data: `root`, else the one SHORTLIST_DATA names, else None."""
    folder = root or os.environ.get("SHORTLIST_DATA") or None
    return None if folder is None else Path(folder)


def load(name: str, root: Path | str | None = None) -> EventLog:
    """The data set called `name`, read below `root` (the folder SHORTLIST_DATA names, if not given).

    Raises DataError for an unknown name, and for files that are absent, with where to download them.
    """
    if name not in DATA_SETS:
        near = difflib.get_close_matches(name, DATA_SETS, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(DATA_SETS)}."
        raise DataError(f"no data set is called {name!r}: {hint}")
    facts = DATA_SETS[name]
    module = importlib.import_module(f"{__name__}.{facts.module}")
    loader: Callable[[Path | None], EventLog] = getattr(module, facts.loader)
    return loader(data_root(root))
