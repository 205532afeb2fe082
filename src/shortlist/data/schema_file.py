"""The schema of a log as a TOML file a person can read: fields by side, what they were inferred from, what was left out and why."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from shortlist.data.fields import FittedField, Kind, Unused
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Column, FieldTable, Side
from shortlist.data.vocabulary import Vocabulary
from shortlist.errors import DataError, SnapshotError

_FILE = "schema.toml"
_VOCABULARIES = "vocabularies"
_DTYPES = {
    "Categorical": torch.int64,
    "Sequence": torch.int64,
    "Numeric": torch.float32,
    "Vector": torch.float32,
    "Text": torch.uint8,
    "Image": torch.uint8,
}
_RAGGED = ("Sequence", "Text", "Image")


@dataclass(frozen=True, kw_only=True, slots=True)
class Schema:
    """What was read from a log and how."""

    roles: Mapping[str, str]
    """Source column of each role that the log has."""
    has_clock: bool
    """False where times only give an order."""
    actions: tuple[str, ...]
    """Action names of the training events; ids 1.. in this order."""
    title: str | None
    """Column that items are shown by."""
    fields: tuple[FittedField, ...]
    """Fields of all sides, with what was fitted."""
    unused: tuple[Unused, ...] = ()
    """Columns that are no field."""

    def of(self, side: Side) -> tuple[FittedField, ...]:
        """The fields of one side."""
        return tuple(f for f in self.fields if f.side == side)

    def check(self, side: Side, table: FieldTable) -> None:
        """DataError that names the first field whose column in `table` is not what the schema says."""
        wanted = self.of(side)
        names = {f.name for f in table.fields}
        for f in wanted:
            if f.name not in names:
                raise DataError(
                    f"field {f.name!r} of the {side} side stands in the schema but not in the table; encode the log again"
                )
            fault = _fault(f, table.columns[f.name])
            if fault:
                raise DataError(
                    f"field {f.name!r} of the {side} side: {fault}; schema and table do not belong together"
                )
        for name in sorted(names - {f.name for f in wanted}):
            raise DataError(
                f"field {name!r} of the {side} side stands in the table but not in the schema; encode the log again"
            )

    def to_toml(self) -> str:
        """The whole as TOML, without the vocabularies' contents."""
        lines = [f"has_clock = {_value(self.has_clock)}", f"actions = {_value(list(self.actions))}"]
        if self.title is not None:
            lines.append(f"title = {_value(self.title)}")
        lines += ["", "[roles]", *(f"{_key(role)} = {_value(column)}" for role, column in self.roles.items())]
        for number, f in enumerate(self.fields):
            entry: dict[str, Any] = {"name": f.name, "type": f.kind, "column": f.column, "why": f.why}
            if f.vocabulary is not None:
                entry |= {"size": f.size, "vocabulary": _vocabulary_file(number, f)}
            if f.kind == "Sequence":
                entry["split"] = f.split
            if f.kind == "Numeric":
                entry |= {"log": f.log, "mean": f.mean, "std": f.std}
            if f.kind == "Vector":
                entry["dim"] = f.dim
            lines += ["", f"[[fields.{f.side}]]", *(f"{key} = {_value(value)}" for key, value in entry.items())]
        for column in self.unused:
            lines += ["", "[[unused]]"]
            lines += [f"{key} = {_value(getattr(column, key))}" for key in ("side", "column", "why")]
        return "\n".join(lines) + "\n"

    def save(self, folder: Path) -> None:
        """schema.toml, and the vocabularies as Parquet."""
        (folder / _VOCABULARIES).mkdir(parents=True, exist_ok=True)
        for number, f in enumerate(self.fields):
            if f.vocabulary is not None:
                f.vocabulary.save(folder / _VOCABULARIES / _vocabulary_file(number, f))
        (folder / _FILE).write_text(self.to_toml(), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Schema:
        """From a folder of `save`. SnapshotError names a missing or damaged file, DataError a field that does not fit its vocabulary."""
        path = folder / _FILE
        try:
            read = tomllib.loads(path.read_text(encoding="utf-8"))
            fields = [
                _field(side, entry, folder) for side, entries in read.get("fields", {}).items() for entry in entries
            ]
            return cls(
                roles=dict(read["roles"]),
                has_clock=bool(read["has_clock"]),
                actions=tuple(read["actions"]),
                title=read.get("title"),
                fields=tuple(fields),
                unused=tuple(Unused(**entry) for entry in read.get("unused", [])),
            )
        except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise SnapshotError(
                f"{path} is missing or damaged ({error!r}); restore the snapshot or train again"
            ) from error


def _field(side: Side, entry: dict[str, Any], folder: Path) -> FittedField:
    name, kind = entry["name"], entry["type"]
    if kind not in get_args(Kind):
        raise DataError(f"field {name!r} of the {side} side has type {kind!r}; known are {', '.join(get_args(Kind))}")
    vocabulary = None
    if "vocabulary" in entry:
        vocabulary = Vocabulary.load(folder / _VOCABULARIES / entry["vocabulary"])
        if len(vocabulary) != entry["size"]:
            raise DataError(
                f"field {name!r} of the {side} side: the schema says {entry['size']} known values, its vocabulary has {len(vocabulary)}; "
                "restore the snapshot or encode the log again"
            )
    elif kind in ("Categorical", "Sequence"):
        raise DataError(
            f"field {name!r} of the {side} side is a {kind} without a vocabulary; restore the snapshot or encode the log again"
        )
    rest = {
        key: value for key, value in entry.items() if key in ("column", "why", "split", "log", "mean", "std", "dim")
    }
    return FittedField(name=name, side=side, kind=kind, vocabulary=vocabulary, **rest)


def _vocabulary_file(number: int, f: FittedField) -> str:
    """Numbered, since a column may have any name."""
    return f"{number:03d}_{f.side}.parquet"


def _fault(f: FittedField, column: Column) -> str | None:
    values = column.values if isinstance(column, Jagged) else column
    if isinstance(column, Jagged) != (f.kind in _RAGGED) or values.dtype != _DTYPES[f.kind]:
        return f"a {f.kind} is expected, a {'ragged' if isinstance(column, Jagged) else 'dense'} column of {values.dtype} was found"
    if f.kind in ("Categorical", "Sequence") and len(values) and (int(values.max()) > f.size or int(values.min()) < 0):
        return f"ids run from {int(values.min())} to {int(values.max())} where {f.size} values are known"
    if f.kind == "Vector" and (values.dim() != 2 or values.shape[1] != f.dim):
        return f"vectors of length {f.dim} are expected, the column has shape {tuple(values.shape)}"
    return None


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else _value(name)


def _value(value: str | bool | int | float | list[str]) -> str:
    """A TOML value: its strings are JSON's, but for the delete character."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(_value(item) for item in value)}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
