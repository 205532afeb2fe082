"""Sorts by packed words against NumPy's lexsort, and group numbers against plain Python."""

import numpy as np
import polars as pl
import pytest

from shortlist.data.log import dense_codes
from shortlist.data.sorting import dense_numbers, first_of_equal, stable_order

EXTREMES = np.array([np.iinfo(np.int64).max, 0, np.iinfo(np.int64).min, -1, 0, np.iinfo(np.int64).max])


@pytest.mark.parametrize("seed", range(20))
def test_the_order_is_that_of_lexsort(seed):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 3_000))
    narrow = rng.integers(-5, 5, size)
    wide = rng.integers(-(2**62), 2**62, size)
    rising = np.sort(rng.integers(0, 50, size))
    for keys in ((narrow,), (wide, narrow), (narrow, wide, rising), (rising, narrow), (rising,)):
        assert (stable_order(*keys) == np.lexsort(keys)).all()


@pytest.mark.parametrize("key", [EXTREMES, EXTREMES[:1], EXTREMES[:0], np.array([3, 1]), np.arange(2**16)[::-1].copy()])
def test_the_order_of_extreme_empty_and_falling_keys(key):
    order = stable_order(key)
    assert order.dtype == np.int64
    assert (order == np.argsort(key, kind="stable")).all()


def test_a_key_that_just_fits_a_word_and_one_that_does_not():
    for bits in (54, 55):
        key = np.concatenate([[2**bits, 0], np.arange(1022)])  # 1024 rows take 10 bits
        assert (stable_order(key) == np.argsort(key, kind="stable")).all()


@pytest.mark.parametrize("seed", range(5))
def test_numbers_follow_first_appearance(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 9, 400), rng.integers(-3, 3, 400)
    seen: dict[tuple[int, int], int] = {}
    places: dict[tuple[int, int], int] = {}
    numbers, firsts = [], []
    for row, pair in enumerate(zip(first.tolist(), second.tolist())):
        numbers.append(seen.setdefault(pair, len(seen)))
        firsts.append(places.setdefault(pair, row))
    assert dense_numbers(first, second).tolist() == numbers
    assert first_of_equal(first, second).tolist() == firsts


def plain_codes(keys):
    """As polars compares rows: missing equals missing, NaN equals NaN, 0.0 equals -0.0."""
    first = keys.with_columns(row_=pl.int_range(pl.len())).select(pl.col("row_").min().over(keys.columns)).to_series()
    seen: dict[int, int] = {}
    return [seen.setdefault(row, len(seen)) for row in first.to_list()]


@pytest.mark.parametrize("seed", range(5))
def test_rows_of_any_types_are_equal_where_polars_says_so(seed):
    rng = np.random.default_rng(seed)
    size = 300
    frame = pl.DataFrame({
        "text": pl.Series(rng.choice(["a", "b", "", "ä"], size)).set(pl.Series(rng.random(size) < 0.2), None),
        "whole": pl.Series(rng.integers(-2, 2, size)).set(pl.Series(rng.random(size) < 0.2), None),
        "real": pl.Series(rng.choice([0.0, -0.0, np.nan, 1.5, -np.inf], size)).set(pl.Series(rng.random(size) < 0.2), None),
        "small": pl.Series(rng.integers(0, 3, size)).cast(pl.Float32),
        "huge": pl.Series(rng.choice([2**63 + 1, 1], size), dtype=pl.UInt64),
        "truth": rng.random(size) < 0.5,
        "when": pl.Series(rng.integers(0, 2, size)).cast(pl.Datetime("ns")),
        "kind": pl.Series(rng.choice(["x", "y"], size)).cast(pl.Categorical),
        "nothing": pl.Series([None] * size, dtype=pl.Null),
    })  # fmt: skip
    for names in (
        ["text"],
        ["whole", "text"],
        ["real", "small"],
        ["huge", "truth"],
        ["when", "kind"],
        ["nothing", "whole"],
    ):
        assert dense_codes(frame.select(names)).to_list() == plain_codes(frame.select(names)), names
    codes = dense_codes(frame)
    assert codes.dtype == pl.Int64
    assert codes.to_list() == plain_codes(frame)
