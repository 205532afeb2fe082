"""Ids become rows: any strings or integers, numbered 1..n; row 0 is the unknown id."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from polars.exceptions import PolarsError

from shortlist.data.histories import Int
from shortlist.errors import DataError, SnapshotError

Id = str | int
_HANDFUL = 32
"""Up to so many ids are found one by one before a column is made of them, which takes longer than looking for them."""
_FEW = 20_000
"""Up to so many ids a binary search is quicker than a hash join, which first reads the whole vocabulary."""


class Vocabulary:
    """Distinct ids in row order. Row numbers carry no information: neither first appearance nor popularity can be read from them.

        ids   "b7"  "a1"  "c3"        encode(["c3", "zz", "b7"]) = [3, 0, 1]
        row    1     2     3

    Args:
        ids: String or Int64, distinct, without nulls; the first one gets row 1.
    """

    def __init__(self, ids: pl.Series) -> None:
        ids = ids.alias("id")
        if ids.dtype not in (pl.String, pl.Int64):
            raise DataError(f"ids must be text or whole numbers, got a column of type {ids.dtype}")
        if ids.null_count() or ids.n_unique() != len(ids):
            raise DataError(
                f"{len(ids):,} ids, {ids.null_count():,} missing, {ids.n_unique():,} distinct: each must occur once"
            )
        self.ids = ids
        order = ids.arg_sort()
        self._sorted = ids.gather(order)
        self._row_of_sorted = order.to_numpy().astype(np.int64) + 1

    @classmethod
    def build(cls, *columns: pl.Series, seed: int = 0) -> Vocabulary:
        """Number all ids of the columns: sorted, then shuffled with the seed, so that no order of the log survives."""
        ids = pl.concat([column.alias("id").drop_nulls().unique() for column in columns]).unique().sort()
        return cls(ids.gather(np.random.default_rng(seed).permutation(len(ids))))

    def reordered(self, rows: Int) -> Vocabulary:
        """The same ids with other numbers: what was rows[i] becomes i + 1; `rows` [n] is a permutation of 1..n."""
        return Vocabulary(self.ids.gather(rows - 1))

    def extended(self, ids: pl.Series, *, seed: int = 0) -> Vocabulary:
        """Old ids keep their rows; those of `ids` that are new follow, shuffled."""
        ids = self._own_type(ids).drop_nulls()
        fresh = ids.filter(self.encode(ids) == 0)
        return Vocabulary(pl.concat([self.ids, Vocabulary.build(fresh, seed=seed).ids])) if len(fresh) else self

    def __len__(self) -> int:
        return len(self.ids)

    def encode(self, ids: pl.Series | Sequence[Id | None]) -> Int:
        """int64 [n] rows, 0 where an id is unknown or missing. Text "7" finds the number 7 and the other way round; "07" does not."""
        if not isinstance(ids, pl.Series) and len(ids) <= _HANDFUL:
            return np.array([self._row(value) for value in ids], dtype=np.int64)
        wanted = self._own_type(ids)
        if not len(self) or not len(wanted):
            return np.zeros(len(wanted), dtype=np.int64)
        if len(wanted) > _FEW:
            rows = pl.int_range(1, len(self) + 1, dtype=pl.Int64, eager=True)
            table = pl.DataFrame({"id": self.ids, "row": rows})
            found = pl.DataFrame({"id": wanted}).join(table, on="id", how="left", maintain_order="left")
            return found["row"].fill_null(0).to_numpy(writable=True)
        place = self._sorted.search_sorted(wanted).clip(0, len(self) - 1)
        hit = (self._sorted.gather(place) == wanted).fill_null(False).to_numpy()
        return np.where(hit, self._row_of_sorted[place.to_numpy()], 0)

    def decode(self, rows: Int | Sequence[int]) -> list[Id | None]:
        """Ids of rows [n]; None for row 0. IndexError beyond the last row."""
        rows = np.asarray(rows, dtype=np.int64)
        if not len(self):
            return [None] * len(rows)
        known: list[Id | None] = self.ids.gather(np.maximum(rows - 1, 0)).to_list()
        return [value if row > 0 else None for value, row in zip(known, rows)]

    def save(self, path: Path) -> None:
        """One Parquet file with one column, in row order."""
        path.parent.mkdir(parents=True, exist_ok=True)
        pl.DataFrame({"id": self.ids}).write_parquet(path)

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """From a file of `save`; SnapshotError names a missing or damaged one."""
        try:
            return cls(pl.read_parquet(path)["id"])
        except (OSError, PolarsError, DataError) as error:
            raise SnapshotError(
                f"{path} is missing or damaged ({error}); restore the snapshot or train again"
            ) from error

    def _row(self, value: Id | None) -> int:
        """Row of one id, as `encode`."""
        if value is None:
            return 0
        wanted: Id = str(value)
        if self.ids.dtype != pl.String:
            try:
                number = int(wanted)
            except ValueError:
                return 0
            if str(number) != wanted:
                return 0
            wanted = number
        # Polars sorts text by its UTF-8 bytes, which is Python's order too.
        place = bisect_left(self._sorted, wanted)
        return int(self._row_of_sorted[place]) if place < len(self) and self._sorted[place] == wanted else 0

    def _own_type(self, ids: pl.Series | Sequence[Id | None]) -> pl.Series:
        """Ids as the type of this vocabulary; null where that is not possible."""
        if not isinstance(ids, pl.Series):
            ids = pl.Series("id", [None if value is None else str(value) for value in ids], dtype=pl.String)
        ids = ids.alias("id")
        if ids.dtype == self.ids.dtype:
            return ids
        if ids.dtype == pl.String or ids.dtype.is_integer():
            other = ids.cast(self.ids.dtype, strict=False)
            same = (other.cast(pl.String) == ids.cast(pl.String)).fill_null(False)
            return other.set(~same, None)
        raise DataError(f"ids must be text or whole numbers, got a column of type {ids.dtype}")
