"""Shortlist: from behaviour logs to a trained cascade, served inside a compute budget. See `shortlist.api` for the names below."""

from typing import TYPE_CHECKING, Any

from shortlist._version import __version__

if TYPE_CHECKING:
    from shortlist.api import (
        DataConfig,
        Engine,
        RunConfig,
        check,
        compare,
        dataset,
        evaluate,
        find,
        load,
        read,
        split,
        systems,
        train,
    )

__all__ = [
    "DataConfig",
    "Engine",
    "RunConfig",
    "__version__",
    "check",
    "compare",
    "dataset",
    "evaluate",
    "find",
    "load",
    "read",
    "split",
    "systems",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used, so that `shortlist --help` and the models need little."""
    if name not in __all__:
        raise AttributeError(f"module 'shortlist' has no attribute {name!r}; it offers {', '.join(__all__)}")
    from shortlist import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return __all__
