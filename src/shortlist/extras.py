"""Libraries that only some systems and commands need: asked for when used, and named with the line that installs them."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from shortlist.errors import ConfigError


def installed(library: str) -> bool:
    """Whether a top-level module can be imported here; nothing is imported to find out."""
    return find_spec(library) is not None


def library(module: str, *, extra: str, user: str) -> Any:
    """The module of an optional library, dotted names allowed.

    Args:
        extra: the extra of this package that installs it.
        user: what needs it, for the message.

    Raises ConfigError with the install line where it is missing.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{user} needs the library {module.partition('.')[0]!r}, which can not be imported here ({error}); "
            f"install it with: pip install 'shortlist[{extra}]'"
        ) from error
