"""Public data sets by name: `load("ml-100k")` gives an EventLog; only the built-in shop log comes with the package."""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from shortlist.errors import DataError

if TYPE_CHECKING:
    from shortlist.data.log import EventLog

_LOADERS = {
    "builtin": ("builtin", "load_builtin"),
    "ml-100k": ("movielens", "load_100k"),
    "ml-1m": ("movielens", "load_1m"),
    "ml-latest-small": ("movielens", "load_latest_small"),
    "s3rec-beauty": ("s3rec", "load_beauty"),
    "s3rec-toys": ("s3rec", "load_toys"),
    "s3rec-yelp": ("s3rec", "load_yelp"),
    "completejourney": ("completejourney", "load_completejourney"),
}


def names() -> tuple[str, ...]:
    """Every name that `load` knows."""
    return tuple(_LOADERS)


def load(name: str, root: Path | str | None = None) -> EventLog:
    """The data set called `name`, read below `root` (the folder SHORTLIST_DATA names, if not given).

    Raises DataError for an unknown name, and for files that are absent, with where to download them.
    """
    if name not in _LOADERS:
        near = difflib.get_close_matches(name, _LOADERS, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(_LOADERS)}."
        raise DataError(f"no data set is called {name!r}: {hint}")
    module, function = _LOADERS[name]
    loader: Callable[[Path | None], EventLog] = getattr(importlib.import_module(f"{__name__}.{module}"), function)
    folder = root or os.environ.get("SHORTLIST_DATA") or None
    return loader(None if folder is None else Path(folder))
