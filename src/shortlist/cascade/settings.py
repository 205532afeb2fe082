"""Plain tables (as TOML gives them) become typed settings, and back.

Settings classes are frozen keyword-only dataclasses, nested where a class says so. Unknown keys are refused with the nearest known
one, values of the wrong type with what was found; both name the place by its dotted path.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from shortlist.embeddings.base import TableChoice, table_class
from shortlist.errors import ConfigError, ShortlistError

T = TypeVar("T")
Plain = Mapping[str, Any]
NONE = "none"
"""TOML has no null: an optional setting whose default is something else is switched off by this word."""


def build(cls: type[T], values: Plain, where: str) -> T:
    """`cls` from a plain table; what the table leaves out keeps its default.

    Args:
        cls: a settings dataclass.
        values: setting by name; inner tables for nested settings.
        where: dotted path of the table, for messages.

    Raises:
        ConfigError: an unknown or missing setting, a wrong type, or a value that the class refuses.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"[{where}] must be a table of settings, got {values!r}")
    if issubclass(cls, TableChoice) and "name" in values:
        cls = _settings_of_table(values["name"], where)
    types_of = _types(cls)
    refuse_unknown(values, types_of, where)
    for f in fields(cls):  # type: ignore[arg-type]
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"[{where}] needs {f.name!r}, which has no default")
    checked = {name: _value(types_of[name], value, f"{where}.{name}") for name, value in values.items()}
    try:
        return cls(**checked)
    except ConfigError as error:
        raise ConfigError(f"[{where}] {error}") from error


def _settings_of_table(name: Any, where: str) -> Any:
    """Settings class of the embedding table of that name."""
    try:
        return table_class(str(name)).Config
    except ShortlistError as error:
        raise ConfigError(f"[{where}] {error}") from error


def refuse_unknown(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """ConfigError for the first name that is not known, with the nearest one."""
    known = list(known)
    for name in names:
        if name not in known:
            raise ConfigError(f"[{where}] has no setting {name!r}: {nearest(name, known)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """What to try instead of `name`: the nearest known names, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=2)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"known are {', '.join(known) or 'none'}"


def plain(settings: Any) -> dict[str, Any]:
    """The table that `build` makes `settings` from, with every value spelt out; None is left out where it is the default."""
    table: dict[str, Any] = {}
    for f in fields(settings):
        value = getattr(settings, f.name)
        if value is None:
            if _default(f) is not None:
                table[f.name] = NONE
        elif is_dataclass(value):
            table[f.name] = plain(value)
        elif isinstance(value, Mapping):
            table[f.name] = {str(key): inner for key, inner in value.items()}
        else:
            table[f.name] = [_plain(inner) for inner in value] if isinstance(value, tuple | frozenset) else value
    return table


def _plain(value: Any) -> Any:
    return plain(value) if is_dataclass(value) else value


def parse_value(text: str) -> Any:
    """A value as TOML reads it; a bare word is a string, so that `protocol=time` needs no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def toml(table: Plain, path: tuple[str, ...] = ()) -> str:
    """A nested table as TOML text: first its values, then its inner tables under their dotted heads."""
    values = {name: value for name, value in table.items() if not isinstance(value, Mapping)}
    inner = {name: value for name, value in table.items() if isinstance(value, Mapping)}
    lines = [f"[{'.'.join(map(_key, path))}]"] if path and (values or not inner) else []
    lines += [f"{_key(name)} = {_literal(value)}" for name, value in values.items()]
    blocks = ["\n".join(lines)] if lines else []
    return "\n\n".join([*blocks, *(toml(value, (*path, name)).rstrip("\n") for name, value in inner.items())]) + "\n"


def _value(kind: Any, value: Any, where: str) -> Any:
    inner = _settings_class(kind)
    if inner is not None and isinstance(value, Mapping):
        return build(inner, value, where)
    if value == NONE and type(None) in get_args(kind) and not _accepts_text(kind):
        return None
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ConfigError(f"{where} is {value!r}: {_sentence(problem['msg'])}") from error


def _settings_class(kind: Any) -> type | None:
    """The settings dataclass in a type, alone or in `X | None`; None where there is none."""
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return next((option for option in options if isinstance(option, type) and is_dataclass(option)), None)


def _accepts_text(kind: Any) -> bool:
    return str in get_args(kind)


def _sentence(message: str) -> str:
    return (
        message.removeprefix("Value error, ").replace("Input should be", "it should be").replace("valid tuple", "list")
    )


def _types(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _default(f: Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not MISSING else f.default


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)


def _literal(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return json.dumps(value, ensure_ascii=False)
        case int() | float():
            return repr(value)
        case list() | tuple():
            return "[" + ", ".join(map(_literal, value)) + "]"
        case Mapping():
            return "{" + ", ".join(f"{_key(name)} = {_literal(inner)}" for name, inner in value.items()) + "}"
    raise ConfigError(f"{value!r} can not be written as TOML")
