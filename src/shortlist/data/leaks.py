"""Columns that give the answer away: one column alone tells a label (or the action) almost perfectly.

For every column the label rate per value is learned on one half of a sample and its AUC is measured on the other half,
so a column of unique values, which tells each row apart but predicts nothing, is not suspected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

SUSPICIOUS_AUC = 0.95
"""AUC of a single column from which it is reported."""
_SAMPLE_ROWS = 200_000
_NUM_BINS = 256
_NUM_VALUES = 1000
_MOST_CLASSES = 10
_FEWEST_ROWS = 10
_NO_FEATURES = ("user_id", "item_id", "group_id", "request_id", "basket_id", "action")


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """One column that tells a label alone."""

    column: str
    """The column, canonical name where it has a role."""
    label: str
    """The label it tells; "action" for the kind of event."""
    auc: float
    """AUC of the column alone on rows it was not learned from; of the best-told class where there are several."""
    kind: Literal["values", "missing"]
    """Whether its values tell, or already whether it is missing."""


def find_leaks(events: pl.DataFrame, labels: tuple[str, ...]) -> tuple[Leak, ...]:
    """Leaks of every label and of the action (where there is more than one), strongest kind only, in column order."""
    sample = events.sample(min(_SAMPLE_ROWS, events.height), seed=0, shuffle=True)
    targets = [name for name in (*labels, "action") if name in sample.columns]
    columns = [name for name in sample.columns if name not in (*_NO_FEATURES, *labels)]
    leaks = []
    for label in targets:
        classes = _classes(sample[label])
        for column in columns if classes else ():
            missing = _best_auc(sample[column].is_null().to_numpy().astype(np.int64), classes)
            if missing >= SUSPICIOUS_AUC:
                leaks.append(Leak(column=column, label=label, auc=missing, kind="missing"))
                continue
            codes = _codes(sample[column])
            values = 0.5 if codes is None else _best_auc(codes, classes)
            if values >= SUSPICIOUS_AUC:
                leaks.append(Leak(column=column, label=label, auc=values, kind="values"))
    return tuple(leaks)


def _classes(label: pl.Series) -> list[NDArray[np.bool_]]:
    """One bool array [rows] per class worth asking about: is the row of this class? A long numeric label is cut at its median."""
    if label.dtype.is_nested():
        return []
    values = label.drop_nulls().unique()
    if len(values) > _MOST_CLASSES:
        if not label.dtype.is_numeric():
            values = label.drop_nulls().value_counts(sort=True).to_series(0).head(_MOST_CLASSES)
        else:
            return _usable([(label > label.median()).fill_null(False).to_numpy()])
    masks = [(label == value).fill_null(False).to_numpy() for value in values]
    return _usable(masks[:1] if len(masks) == 2 and label.null_count() == 0 else masks)


def _usable(masks: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_]]:
    """Masks in which both halves hold enough rows of either answer."""
    halves = [(mask, (mask[::2], mask[1::2])) for mask in masks]
    return [
        mask for mask, parts in halves if all(_FEWEST_ROWS <= part.sum() <= len(part) - _FEWEST_ROWS for part in parts)
    ]


def _codes(column: pl.Series) -> NDArray[np.int64] | None:
    """int64 [rows]: 0 is missing, then one number per value (numbers with many values: per quantile bin). None if not comparable."""
    if column.dtype.is_nested() or column.dtype == pl.Binary:
        return None
    if column.dtype == pl.String or isinstance(column.dtype, pl.Categorical | pl.Enum):
        text = column.cast(pl.String)
        frequent = text.drop_nulls().value_counts(sort=True).to_series(0).head(_NUM_VALUES)
        ranks = text.set(~text.is_in(frequent.implode()).fill_null(True), "").rank("dense")
    else:
        numbers = column.to_physical()
        ranks = numbers.rank("dense")
        if numbers.n_unique() > _NUM_BINS:
            ranks = numbers.rank("ordinal") * _NUM_BINS // len(column) + 1
    return ranks.fill_null(0).cast(pl.Int64).to_numpy()


def _best_auc(codes: NDArray[np.int64], classes: list[NDArray[np.bool_]]) -> float:
    return max(_held_out_auc(codes, mask) for mask in classes)


def _held_out_auc(codes: NDArray[np.int64], positive: NDArray[np.bool_]) -> float:
    """Rates per code from even rows (drawn to the overall rate by one pseudo-row), AUC on odd rows."""
    learn, test = slice(0, None, 2), slice(1, None, 2)
    size = int(codes.max()) + 1
    counts = np.bincount(codes[learn], minlength=size)
    hits = np.bincount(codes[learn], weights=positive[learn], minlength=size)
    rates = (hits + positive[learn].mean()) / (counts + 1)
    _, order = np.unique(rates[codes[test]], return_inverse=True)
    of_positive = np.bincount(order, weights=positive[test])
    of_negative = np.bincount(order, weights=~positive[test])
    below = np.cumsum(of_negative) - of_negative
    return float((of_positive * (below + of_negative / 2)).sum() / (of_positive.sum() * of_negative.sum()))
