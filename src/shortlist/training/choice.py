"""A training rule by its registered name, with its settings checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from shortlist.errors import ConfigError
from shortlist.registry import find

R = TypeVar("R")


def chosen(name: str, settings: Mapping[str, Any], contract: type[R], what: str) -> R:
    """The registered rule `name`, made with `settings` over its defaults.

    Args:
        contract: the base class that it must have.
        what: what such a rule is called in messages, as in "gradient rule".

    Raises ConfigError: no rule of that name, or a setting that it does not have or refuses.
    """
    entry = find(name)
    if not issubclass(entry.cls, contract):
        raise ConfigError(f"{name!r} is a {entry.kind}, not a {what}; `shortlist systems` lists them")
    config: Any = entry.cls.Config  # type: ignore[attr-defined]
    known = [f.name for f in fields(config)]
    for setting in settings:
        if setting not in known:
            raise ConfigError(f"{what} {name} has no setting {setting!r}; it has {', '.join(known) or 'none'}")
    try:
        made = TypeAdapter(config).validate_python(dict(settings))
    except ValidationError as error:
        problem = error.errors()[0]
        raise ConfigError(f"{what} {name}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from error
    make: Callable[[Any], R] = entry.cls
    return make(made)
