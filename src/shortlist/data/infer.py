"""Which columns become fields, of which type, and why: decided from training values, said in words.

A column that varies from event to event says how the event turned out (a quantity, a rating, a watch time): reading it before the event
would give the answer away. So such columns become fields only where `DataConfig.context` names them. Columns of the events that are the
same at every event of an item, or of a user, describe the item or user, and become its fields.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from shortlist.data.encode import EncodedEvents, column_of
from shortlist.data.fields import WORDS, FittedField, Unused, as_number, as_text, tokens
from shortlist.data.ingested import Log
from shortlist.data.schema import Side
from shortlist.data.schema_file import Schema
from shortlist.data.targets import label_columns
from shortlist.data.vocabulary import Vocabulary
from shortlist.errors import DataError

CANONICAL = frozenset({
    "user_id", "item_id", "timestamp", "action", "group_id", "request_id", "basket_id", "position", "value", "bid", "query", "propensity",
})  # fmt: skip
"""Columns of an event log that have a meaning of their own and are no fields."""
# No column of a log can have these names.
_ITEM, _USER, _GROUP = "\0item", "\0user", "\0group"
MAX_VALUES = 100_000
MAX_WORDS = 20_000
MIN_WORD_COUNT = 2
_MAX_INTEGER_CATEGORIES = 32
_MAX_VECTOR = 4_096
_UNIQUE_SHARE = 0.5
_FEW_VALUES = 20
_SEPARATORS = ("|", ";", ",")
_SKEWED = 2.0
_MIN_ENTITIES = 10
_DIFFERING_SHARE = 0.01
_ID_LIKE = re.compile(
    r"(^|_)(id|code|zip|sku|no|key|category|cat|cate|genre|brand|type|class|kind|segment|cluster|region|city|store|shop|seller)$|(id|code)$",
    re.IGNORECASE,
)
_IMAGE_HEADS = (b"\x89PNG", b"\xff\xd8\xff")
_TITLES = (
    "title", "name", "item_name", "product_name", "item_title", "product_title", "movie_title", "short_text", "headline", "description",
    "product_type",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class _Type:
    """What a column was taken for."""

    kind: str
    why: str
    split: str = ""
    dim: int = 0


def infer_schema(
    log: Log,
    context: tuple[str, ...],
    events: EncodedEvents,
    training: NDArray[np.bool_],
    item_ids: Vocabulary,
    user_ids: Vocabulary,
) -> tuple[Schema, pl.DataFrame, pl.DataFrame]:
    """Fields of all sides, and the raw columns of items and users in row order (row 1 first).

    Args:
        context: event columns known before the event.
        training: [N] events that may be learned from; users with training events have the lowest rows.

    Raises DataError where a context column is no single value.
    """
    row = events.row[training]
    item, user = events.histories.item[training], events.histories.user_of_event[training]
    open_columns = [name for name in log.events.columns if name not in {*CANONICAL, *label_columns(log), *context}]
    items, users, outcomes = _with_event_columns(
        _in_row_order(item_ids, log.items, "item_id"),
        _in_row_order(user_ids, log.users, "user_id"),
        pl.DataFrame({_ITEM: item, _USER: user, _GROUP: events.histories.group[training]}).with_columns(
            column_of(log.events, name, row) for name in open_columns
        ),
    )
    known_items = items[np.flatnonzero(np.bincount(item)) - 1]
    known_users = users[np.flatnonzero(np.bincount(user)) - 1]
    known_context = pl.DataFrame({name: column_of(log.events, name, row) for name in context})
    item_fields, unused_i = fit_fields(known_items, "item", items.columns[1:])
    user_fields, unused_u = fit_fields(known_users, "user", users.columns[1:])
    context_fields, unused_c = fit_fields(known_context, "context", context)
    for f in context_fields:
        if f.kind not in ("Categorical", "Numeric"):
            raise DataError(
                f"context column {f.column!r} was read as {f.kind}; only single values can be context: drop it from `context`"
            )
    schema = Schema(
        roles={name: value for name, value in asdict(log.roles).items() if isinstance(value, str) and value},
        has_clock=log.has_clock,
        actions=(),
        title=title_column(items, item_fields),
        fields=(*item_fields, *user_fields, *context_fields),
        unused=(*unused_i, *unused_u, *unused_c, *outcomes),
    )
    return schema, items, users


def _in_row_order(ids: Vocabulary, table: pl.DataFrame | None, name: str) -> pl.DataFrame:
    """The table's columns behind the id column, one row per id of the vocabulary."""
    frame = pl.DataFrame({name: ids.ids})
    return frame if table is None else frame.join(table, on=name, how="left", maintain_order="left")


def _with_event_columns(
    items: pl.DataFrame, users: pl.DataFrame, events: pl.DataFrame
) -> tuple[pl.DataFrame, pl.DataFrame, list[Unused]]:
    """Items and users with the columns that training events say of them, and the columns that stay outcomes.

    Rows without training events stay missing there. A column that the table has itself is not overwritten.
    """
    names = events.columns[3:]
    of_item, item_values = constant_columns(events, _ITEM, [n for n in names if n not in items.columns])
    of_user, user_values = constant_columns(events, _USER, [n for n in names if n not in {*of_item, *users.columns}])
    taken = {*of_item, *of_user, *items.columns, *users.columns}
    why = "varies from event to event and is not named in `context`: taken as an outcome"
    outcomes = [Unused(side="context", column=name, why=why) for name in names if name not in taken]
    return _joined(items, item_values, _ITEM), _joined(users, user_values, _USER), outcomes


def _joined(frame: pl.DataFrame, values: pl.DataFrame, row: str) -> pl.DataFrame:
    """The frame, whose first row is row 1, with the columns of `values` by row number."""
    numbered = frame.with_columns(pl.int_range(1, pl.len() + 1, dtype=pl.Int64).alias(row))
    return numbered.join(values, on=row, how="left", maintain_order="left").drop(row)


def fit_fields(frame: pl.DataFrame, side: Side, columns: Collection[str]) -> tuple[list[FittedField], list[Unused]]:
    """Fields of the given columns, fitted on the rows of `frame`, which must be training rows only."""
    fitted: list[FittedField] = []
    unused: list[Unused] = []
    for column in columns:
        taken = _decide(frame[column].drop_nulls())
        if not taken.kind:
            unused.append(Unused(side=side, column=column, why=taken.why))
            continue
        fitted += _fit(frame[column], side, column, taken)
    return fitted, unused


def title_column(frame: pl.DataFrame, fitted: Collection[FittedField]) -> str | None:
    """The column to show an item by: named like a title, or else the first text."""
    lower = {name.lower(): name for name in frame.columns if frame[name].dtype == pl.String}
    for name in _TITLES:
        if name in lower:
            return lower[name]
    return next((f.column for f in fitted if f.kind == "Text"), None)


def constant_columns(events: pl.DataFrame, owner: str, columns: Collection[str]) -> tuple[list[str], pl.DataFrame]:
    """Columns that say something about the owner of an event rather than about the event, and their newest value per owner.

    A column counts where nearly all owners with several groups have one value throughout (a few customers move house).

    Args:
        events: training events in time order, with their group and the column `owner`.
        owner: column of item or user rows.
        columns: those to be judged; lists and binaries are never taken.
    """
    scalar = [name for name in columns if not (events[name].dtype.is_nested() or events[name].dtype == pl.Binary)]
    if not scalar or not events.height:
        return [], pl.DataFrame({owner: []}, schema={owner: pl.Int64})
    differs = [(pl.col(name).min() != pl.col(name).max()).alias(f"differs_{i}") for i, name in enumerate(scalar)]
    newest = [pl.col(name).drop_nulls().last() for name in scalar]
    several = (pl.col(_GROUP).min() != pl.col(_GROUP).max()).alias("several_groups")
    table = events.group_by(owner).agg(*newest, *differs, several)
    judges = table.filter("several_groups")
    chosen = []
    for i, name in enumerate(scalar):
        share: Any = judges[f"differs_{i}"].fill_null(False).mean()
        if judges.height >= _MIN_ENTITIES and share <= _DIFFERING_SHARE and table[name].n_unique() > 1:
            chosen.append(name)
    return chosen, table.select(owner, *chosen)


# -- type -----------------------------------------------------------------------------------------------------------


def _decide(values: pl.Series) -> _Type:
    """Type of a column by its training values [n], nulls left out; kind "" where it is no field."""
    if not len(values):
        return _Type(kind="", why="no value among the training rows")
    dtype = values.dtype
    if isinstance(dtype, pl.List | pl.Array):
        return _decide_list(values)
    if dtype == pl.Binary:
        pieces: list[bytes] = values.head(20).to_list()
        if all(piece.startswith(_IMAGE_HEADS) for piece in pieces):
            return _Type(kind="Image", why="PNG or JPEG bytes")
        return _Type(kind="", why="bytes that are no PNG or JPEG image")
    if isinstance(dtype, pl.Struct) or dtype == pl.Object:
        return _Type(kind="", why=f"values of type {dtype} are not read")
    if values.n_unique() < 2:
        return _Type(kind="", why="the same value in all training rows")
    if dtype == pl.Boolean:
        return _Type(kind="Categorical", why="true or false")
    if dtype.is_temporal():
        return _Type(kind="Numeric", why="a date, read as days")
    if dtype.is_numeric():
        return _decide_number(values)
    return _decide_text(values)


def _decide_list(values: pl.Series) -> _Type:
    lists = values.arr.to_list() if isinstance(values.dtype, pl.Array) else values
    inner = getattr(lists.dtype, "inner", None)
    lengths = lists.list.len()
    shortest, longest = lengths.min(), lengths.max()
    if (
        inner is not None
        and inner.is_float()
        and shortest == longest
        and isinstance(longest, int)
        and 1 <= longest <= _MAX_VECTOR
    ):
        return _Type(kind="Vector", why=f"{longest} numbers in every row", dim=longest)
    if inner is not None and (inner == pl.String or inner.is_integer()):
        return _Type(kind="Sequence", why="a list in every row")
    return _Type(kind="", why=f"lists of type {lists.dtype} with {shortest!r} to {longest!r} entries are not read")


def _decide_number(values: pl.Series) -> _Type:
    distinct, rows = values.n_unique(), len(values)
    whole = values.dtype.is_integer() or bool((values == values.round()).all())
    if not whole:
        return _Type(kind="Numeric", why="numbers with fractions")
    if distinct <= _MAX_INTEGER_CATEGORIES and distinct <= max(_UNIQUE_SHARE * rows, 2):
        return _Type(kind="Categorical", why=f"whole numbers, {distinct} distinct")
    lowest: Any = values.min()
    highest: Any = values.max()
    if distinct == rows >= _FEW_VALUES and highest - lowest < 1.05 * rows:
        return _Type(kind="", why="every row has its own number in one run: a row number")
    if _ID_LIKE.search(values.name):
        if distinct > _UNIQUE_SHARE * rows:
            return _Type(kind="", why=f"ids: {distinct:,} distinct in {rows:,} rows")
        return _Type(kind="Categorical", why=f"named like an id or a kind, {distinct:,} distinct in {rows:,} rows")
    return _Type(kind="Numeric", why=f"whole numbers, {distinct:,} distinct")


def _decide_text(values: pl.Series) -> _Type:
    text = as_text(values).drop_nulls()
    rows, distinct = len(text), text.n_unique()
    if distinct < 2:
        return _Type(kind="", why="the same value in all training rows")
    numbers = text.cast(pl.Float64, strict=False)
    if numbers.null_count() <= 0.02 * rows and not text.str.contains(r"^0\d").any():
        return _decide_number(numbers.drop_nulls())
    for separator in _SEPARATORS:
        _, parts = tokens(text, separator)
        kinds = parts.n_unique()
        splits = text.str.contains(separator, literal=True).mean()
        words: Any = parts.str.count_matches(r"\s+").mean()
        # A list draws on a small stock of short parts; a comma in a sentence does not.
        if (
            isinstance(splits, float)
            and splits >= 0.05
            and kinds <= 0.2 * len(parts)
            and kinds < distinct
            and words < 3
        ):
            return _Type(
                kind="Sequence", why=f"lists divided by {separator!r}, {kinds:,} distinct parts", split=separator
            )
    _, parts = tokens(text, WORDS)
    kinds, mean_words = parts.n_unique(), len(parts) / rows
    if mean_words >= 1.3 and distinct >= 30 and kinds <= distinct / 3 and distinct <= _UNIQUE_SHARE * rows:
        return _Type(
            kind="Sequence", why=f"tags divided by spaces, {kinds:,} distinct in {distinct:,} combinations", split=WORDS
        )
    if distinct <= max(_UNIQUE_SHARE * rows, 2):
        return _Type(kind="Categorical", why=f"text, {distinct:,} distinct in {rows:,} rows")
    repeated = 1 - kinds / max(len(parts), 1)
    if mean_words >= 2 and (repeated >= 0.2 or rows < _FEW_VALUES) and not text.str.contains(r"^[<{\[]").all():
        return _Type(kind="Text", why=f"text of {mean_words:.1f} words on average", split=WORDS)
    return _Type(kind="", why=f"nearly every row has its own value ({distinct:,} in {rows:,}) and it is no text")


# -- fit ------------------------------------------------------------------------------------------------------------


def _fit(values: pl.Series, side: Side, column: str, taken: _Type) -> list[FittedField]:
    """The fitted fields of one column; none where nothing could be learned."""
    plain = FittedField(name=column, side=side, column=column, kind="Image", why=taken.why)
    match taken.kind:
        case "Categorical":
            known = _frequent(as_text(values).drop_nulls(), MAX_VALUES, 1)
            return [replace(plain, kind="Categorical", vocabulary=known)]
        case "Sequence":
            known = _frequent(tokens(values, taken.split)[1], MAX_VALUES, 1)
            return [replace(plain, kind="Sequence", split=taken.split, vocabulary=known)] if len(known) else []
        case "Text":
            # Words for every system, and for items the raw text, which content systems read.
            known = _frequent(tokens(values, WORDS)[1], MAX_WORDS, MIN_WORD_COUNT)
            name, why = f"{column}_words", f"words of the {taken.why}"
            words = replace(plain, name=name, kind="Sequence", why=why, split=WORDS, vocabulary=known)
            return [words] * bool(len(known)) + [replace(plain, kind="Text")] * (side == "item")
        case "Numeric":
            return _fit_number(values, plain)
        case "Vector":
            return [replace(plain, kind="Vector", dim=taken.dim)]
        case _:
            return [plain]


def _fit_number(values: pl.Series, plain: FittedField) -> list[FittedField]:
    number = as_number(values).to_numpy()
    number = number[np.isfinite(number)]
    log = _is_skewed(number)
    number = np.log1p(number) if log else number
    std = float(number.std()) if len(number) else 0.0
    why = f"{plain.why}, heavy-tailed: logarithm taken" if log else plain.why
    return [replace(plain, kind="Numeric", why=why, log=log, mean=float(number.mean()), std=std)] if std else []


def _frequent(values: pl.Series, most: int, min_count: int) -> Vocabulary:
    """Values by falling frequency, ties by value."""
    counts = pl.DataFrame({"value": values}).group_by("value").len().filter(pl.col("len") >= min_count)
    return Vocabulary(counts.sort(["len", "value"], descending=[True, False])["value"].head(most))


def _is_skewed(number: np.ndarray[Any, np.dtype[np.float64]]) -> bool:
    if not len(number) or number.min() < 0 or number.std() == 0:
        return False
    return float(np.mean(((number - number.mean()) / number.std()) ** 3)) > _SKEWED
