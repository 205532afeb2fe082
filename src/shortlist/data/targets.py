"""Which rows of a log are choices: all of them, or those whose label says that the item was chosen and not merely shown.

    user  item  click        with target_label = "click", target_min = 1
    ann   a     0            shown: in no history, no target; still a logged impression
    ann   b     1            a choice: stands in histories, and is asked for in the held-out windows

One rule for every label: a row below the minimum, or without a label, is no choice. By default a single label of 0 and 1 is read so;
ratings are not, since whoever rates an item has chosen it, whatever the rating (the usual implicit protocol).
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from shortlist.data.ingested import Log, StoredEvents
from shortlist.data.log import RESERVED
from shortlist.data.roles import flag
from shortlist.data.splits import DataConfig
from shortlist.errors import DataError

AUTO = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetRule:
    """What makes a row a choice."""

    label: str | None
    """Label column that decides; None = every row is a choice."""
    least: float
    """Least value of it that counts."""
    note: str
    """What was done, in words; empty where the log has no label and nothing had to be decided."""

    def chosen(self, events: pl.DataFrame | StoredEvents) -> pl.Series:
        """Bool [rows of the log]: the row is a choice. Rows without a label are none."""
        if self.label is None:
            return pl.repeat(True, events.height, dtype=pl.Boolean, eager=True)
        return (label_values(events[self.label]) >= self.least).fill_null(False)


def target_rule(log: Log, config: DataConfig) -> TargetRule:
    """What `config.target_label` and `config.target_min` mean for this log.

    "auto" takes the only label of the log where it holds nothing but 0 and 1 (or true and false), or where a minimum is given.

    Raises DataError: no such label, none or several where a minimum wants one, no minimum for a label that is not 0/1, or no row that
    reaches it.
    """
    labels = label_columns(log)
    label = _label_of(labels, config)
    if label is None:
        return _every_row(labels)
    values, least = label_values(log.events[label]), config.target_min
    if least is None and not is_binary(values):
        if config.target_label == AUTO:
            return _every_row(labels)
        raise DataError(
            f"label {label!r} runs from {_shown(values.min())} to {_shown(values.max())}, and which of them make a row a choice is not "
            "said; set `data.target_min`"
        )
    least = 1.0 if least is None else least
    num_chosen, num_rows = int((values >= least).sum()), len(values)
    if not num_chosen:
        raise DataError(
            f"no row has {label!r} of {least:g} or more (the highest is {_shown(values.max())}); "
            'lower `data.target_min`, or set `data.target_label = ""` to make every row a choice'
        )
    note = (
        f"A row is a choice where {label} is at least {least:g}: {num_chosen:,} of {num_rows:,} rows. "
        "The others were shown only: they stand in no history and are never asked for."
    )
    return TargetRule(label=label, least=least, note=note)


def target_words(log: Log) -> str:
    """What counts as a choice with default settings, and which flag of `shortlist train` changes it; empty without labels."""
    labels = label_columns(log)
    if not labels:
        return ""
    rule = target_rule(log, DataConfig())
    if rule.label is not None:
        return f"{rule.note} `--set data.target_label=` makes every row a choice."
    binary = [name for name in labels if is_binary(label_values(log.events[name]))]
    if binary:
        return f"{rule.note} `--set data.target_label={binary[0]}` makes only rows with {binary[0]} of 1 choices, the others shown items."
    named = "" if len(labels) == 1 else f" --set data.target_label={labels[0]}"
    return f"{rule.note} `--set data.target_min=VALUE{named}` leaves rows with less than that out."


def label_columns(log: Log) -> tuple[str, ...]:
    """The label columns under the names that they have in `log.events`."""
    columns = log.events.columns
    named = (name if name in columns and name not in RESERVED else f"source_{name}" for name in log.roles.labels)
    return tuple(name for name in named if name in columns)


def label_values(column: pl.Series) -> pl.Series:
    """Labels as Float64, null where missing. DataError where a column holds text that is no number."""
    values = column.cast(pl.Float64, strict=False)
    if values.null_count() > column.null_count():
        raise DataError(
            f"label {column.name!r} holds text such as {column.filter(values.is_null() & column.is_not_null())[0]!r}; "
            "labels are numbers or true and false"
        )
    return values


def is_binary(values: pl.Series) -> bool:
    """Nothing but 0 and 1 (missing ones not counted), and at least one of them."""
    return values.null_count() < len(values) and bool(values.drop_nulls().is_in([0.0, 1.0]).all())


def _label_of(labels: tuple[str, ...], config: DataConfig) -> str | None:
    """The column that decides, before its values are looked at."""
    found = ", ".join(labels) or "none"
    if config.target_label == AUTO and config.target_min is not None and len(labels) != 1:
        raise DataError(
            f"target_min is {config.target_min:g}, but which label is meant? The log has {found}; name one with `data.target_label`"
        )
    if config.target_label == AUTO:
        return labels[0] if len(labels) == 1 else None
    if config.target_label and config.target_label not in labels:
        raise DataError(
            f"target_label {config.target_label!r} is no label of the log, which has {found}; "
            f"`{flag('labels')} COLUMN` makes a column a label"
        )
    return config.target_label or None


def _every_row(labels: tuple[str, ...]) -> TargetRule:
    """Without a label there was nothing to decide, so nothing is said."""
    note = f"Every row is a choice, whatever its {' or '.join(labels)}." if labels else ""
    return TargetRule(label=None, least=0.0, note=note)


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else "nothing"
