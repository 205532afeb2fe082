"""Item fields as rules read them: values of the catalogue by field name, and those that came since the run was trained.

n items, total = values of a field with several per item; row 0 is the unknown item.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shortlist.cascade.rules import Filter, Rules, Value
from shortlist.cascade.settings import nearest
from shortlist.data.dataset import Dataset
from shortlist.data.fields import WORDS, FittedField, as_text
from shortlist.data.histories import Int
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Column
from shortlist.errors import ConfigError
from shortlist.models.ranking.mmr import SetLikeness, VectorLikeness, comparable, distinct_sets, likeness_of

_MASKS = 32
"""Filters whose items are remembered."""
_LARGEST = 1e300
"""Whole numbers beyond it are no numbers here: they have no place among floating ones."""
Mask = NDArray[np.bool_]


class Attributes:
    """Fields of a run's items; safe to use from many threads.

    Args:
        dataset: whose items.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._fitted: dict[str, FittedField] = {f.name: f for f in dataset.schema.of("item")}
        self._columns: dict[str, Column] = dict(dataset.space.items.columns)
        self._masks: dict[str, tuple[Mask, int]] = {}
        """By the filter's text, since to a dictionary 1 and True are one value."""
        self._sets: dict[str, Jagged] = {}
        self._likeness: dict[str, nn.Module] = {}
        self._lock = threading.Lock()

    def field(self, name: str) -> FittedField:
        """The field; ConfigError says which there are."""
        if name not in self._fitted:
            raise ConfigError(f"items have no field {name!r}: {nearest(name, self._fitted)}")
        return self._fitted[name]

    def check(self, rules: Rules) -> None:
        """Refuse rules that name a field that is not there or can not do what they ask."""
        for part in rules.filters:
            kind = self.field(part.field).kind
            if kind in ("Vector", "Text", "Image"):
                raise ConfigError(f"{part.field!r} is a field of type {kind} and can not be filtered by")
            if part.is_range and not self._has_numbers(part.field):
                raise ConfigError(f"{part.field!r} holds no numbers, so it has no at_least and at_most; use any_of")
            if kind == "Numeric" and not part.is_range and not all(_is_number(value) for value in part.values):
                raise ConfigError(f"{part.field!r} holds numbers; {part.values!r:.80} are none")
        for name in [quota.field for quota in rules.quotas or ()] + ([rules.mix.field] if rules.mix else []):
            if self.field(name).kind not in ("Categorical", "Sequence"):
                raise ConfigError(f"{name!r} is no field of categories or sets, so it has no quota and no mix")
        if rules.diversity is not None:
            for name in rules.diversity.fields:
                if not comparable(self.field(name).field):
                    raise ConfigError(f"{name!r} can not be compared for diversity; name categories, sets or vectors")
            if not self.compared(rules.diversity.fields):
                raise ConfigError("items have no field that could be compared for diversity")

    def matches(self, wanted: Filter) -> tuple[Mask, int]:
        """bool [n + 1], False for row 0: items that pass a filter; and how many of its values no item can have."""
        key = repr(wanted)
        found = self._masks.get(key)
        if found is None:
            found = self._matches(wanted)
            with self._lock:
                if len(self._masks) >= _MASKS:
                    self._masks.pop(next(iter(self._masks)))
                self._masks[key] = found
        return found

    def _matches(self, wanted: Filter) -> tuple[Mask, int]:
        fitted, column = self.field(wanted.field), self._columns[wanted.field]
        num_unknown = 0
        if fitted.kind == "Numeric":
            mask = _numbers(fitted, column, wanted)
        else:
            ids = _ids_in_range(fitted, wanted) if wanted.is_range else self.ids(wanted.field, wanted.values)
            num_unknown = int((ids == 0).sum())
            ids = ids[ids > 0]
            if isinstance(column, Jagged):
                mask = np.zeros(column.num_rows, dtype=bool)
                mask[column.row_of_value.numpy()[np.isin(column.values.numpy(), ids)]] = True
            else:
                mask = np.isin(column.numpy(), ids)
        if wanted.negate:
            mask = ~mask
        mask[0] = False
        return mask, num_unknown

    def _has_numbers(self, name: str) -> bool:
        """Whether the field has numbers; those that take few values are categories to systems."""
        fitted = self.field(name)
        return fitted.kind == "Numeric" or (
            fitted.vocabulary is not None and bool(np.isfinite(_as_numbers(fitted)).any())
        )

    def ids(self, name: str, values: Sequence[Value]) -> Int:
        """int64 [V] ids of values of a field of categories or sets, 0 where no item of the training log had them."""
        fitted = self.field(name)
        assert fitted.vocabulary is not None
        texts = [_text(value) for value in values]
        if fitted.split == WORDS:
            texts = [text.lower() for text in texts]
        return fitted.vocabulary.encode(as_text(pl.Series(texts, dtype=pl.String)))

    def sets(self, name: str) -> Jagged:
        """Distinct values of every item of a field of categories or sets: n + 1 rows of ids from 1 on."""
        if name not in self._sets:
            column = self._columns[name]
            if isinstance(column, Tensor):
                column = Jagged.from_padded(column[:, None], column[:, None] > 0)
            self._sets[name] = distinct_sets(column)
        return self._sets[name]

    def compared(self, names: Sequence[str]) -> list[SetLikeness | VectorLikeness]:
        """How alike items are by each of the fields; of all that can be compared where none is named."""
        names = list(names) or [name for name, f in self._fitted.items() if comparable(f.field)]
        for name in names:
            if name not in self._likeness:
                self._likeness[name] = likeness_of(self._fitted[name].field, self._columns[name])
        return [self._likeness[name] for name in names]  # type: ignore[misc]

    def knows(self, name: str) -> bool:
        """Whether items have the field."""
        return name in {f.column for f in self._fitted.values()}

    def patched(self, rows: Int, attributes: Sequence[Mapping[str, Any]]) -> Attributes:
        """The same with other values for some items, by source column; what an item does not name stays as it is.

        Args:
            rows: int64 [m] distinct catalogue rows.
            attributes: [m] raw values by column; None = missing.
        """
        fresh = Attributes(self._dataset)
        for name, fitted in self._fitted.items():
            mine = [i for i, given in enumerate(attributes) if fitted.column in given]
            if mine:
                raw = [attributes[i][fitted.column] for i in mine]
                fresh._columns[name] = replaced(self._columns[name], rows[mine], encoded(fitted, raw))
            else:
                fresh._columns[name] = self._columns[name]
        return fresh


def _numbers(fitted: FittedField, column: Column, wanted: Filter) -> Mask:
    """Bounds go the way the column's numbers went, so that a number on a bound is found."""
    assert isinstance(column, Tensor)
    number = column.numpy()

    def scaled(values: Sequence[Any]) -> NDArray[np.float32]:
        return fitted.scaled(pl.Series([float(value) for value in values], dtype=pl.Float64)).astype(np.float32)

    if not wanted.is_range:
        return np.isin(number, scaled(wanted.values))
    mask = np.ones(len(number), dtype=bool)
    if wanted.at_least is not None:
        mask &= number >= scaled([wanted.at_least])
    if wanted.at_most is not None:
        mask &= number <= scaled([wanted.at_most])
    return mask


def _as_numbers(fitted: FittedField) -> NDArray[np.float64]:
    """Known values of a field as numbers, NaN where one is none."""
    assert fitted.vocabulary is not None
    return fitted.vocabulary.ids.cast(pl.Float64, strict=False).fill_null(float("nan")).to_numpy()


def _ids_in_range(fitted: FittedField, wanted: Filter) -> Int:
    """int64 [V] ids of the known values that a range holds."""
    number = _as_numbers(fitted)
    low = -np.inf if wanted.at_least is None else wanted.at_least
    high = np.inf if wanted.at_most is None else wanted.at_most
    return np.flatnonzero((number >= low) & (number <= high)) + 1


def _text(value: Value) -> str:
    """As `fields.as_text` reads the value from a table."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST


def encoded(fitted: FittedField, raw: Sequence[Any]) -> Column:
    """Raw values of some items as the field has them; what can not be read is missing."""
    if fitted.kind == "Numeric":
        numbers = [float(value) if _is_number(value) else None for value in raw]
        return fitted.encode(pl.Series(fitted.column, numbers, dtype=pl.Float64))
    if fitted.kind == "Categorical":
        texts = [None if value is None or isinstance(value, list) else _text(value) for value in raw]
        return fitted.encode(pl.Series(fitted.column, texts, dtype=pl.String))
    if fitted.kind == "Sequence" and not fitted.split:
        lists = [[_text(v) for v in value] if isinstance(value, list) else [] for value in raw]
        return fitted.encode(pl.Series(fitted.column, lists, dtype=pl.List(pl.String)))
    if fitted.kind == "Vector":
        whole = [value if isinstance(value, list) and all(map(_is_number, value)) else None for value in raw]
        return fitted.encode(pl.Series(fitted.column, whole, dtype=pl.List(pl.Float64)))
    joined = [(fitted.split.join(map(str, v)) if isinstance(v, list) else v) for v in raw]
    texts = [None if value is None else str(value) for value in joined]
    return fitted.encode(pl.Series(fitted.column, texts, dtype=pl.String))


def replaced(column: Column, rows: Int, fresh: Column) -> Column:
    """A column with the values of `fresh` [m] in the given rows [m]."""
    at = torch.from_numpy(rows)
    if isinstance(column, Tensor) and isinstance(fresh, Tensor):
        column = column.clone()
        column[at] = fresh
        return column
    assert isinstance(column, Jagged)
    assert isinstance(fresh, Jagged)
    both = Jagged.from_lengths(torch.cat([column.values, fresh.values]), torch.cat([column.lengths, fresh.lengths]))
    source = torch.arange(column.num_rows)
    source[at] = column.num_rows + torch.arange(len(at))
    return both.select(source)
