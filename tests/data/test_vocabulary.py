"""Ids to rows and back."""

import numpy as np
import polars as pl
import pytest

from data_support import small_log
from shortlist.data.vocabulary import Vocabulary
from shortlist.errors import DataError, SnapshotError


@pytest.mark.parametrize("ids", [pl.Series(["b7", "a1", "c3", "ä", "日本"]), pl.Series([7, -3, 10**15, 0])])
def test_every_id_comes_back(ids):
    vocabulary = Vocabulary.build(ids, seed=3)
    assert len(vocabulary) == len(ids)
    rows = vocabulary.encode(ids)
    assert sorted(rows) == list(range(1, len(ids) + 1))
    assert vocabulary.decode(rows) == ids.to_list()
    assert vocabulary.decode([0]) == [None]


def test_unknown_and_missing_ids_are_row_0():
    vocabulary = Vocabulary(pl.Series(["b", "a"]))
    assert vocabulary.encode(["a", "zz", None, "b", ""]).tolist() == [2, 0, 0, 1, 0]
    assert vocabulary.encode([]).tolist() == []
    assert Vocabulary(pl.Series([], dtype=pl.String)).encode(["a"]).tolist() == [0]


def test_numbers_and_their_text_are_one_id_but_leading_zeros_are_not():
    numbers = Vocabulary(pl.Series([7, 12]))
    assert numbers.encode(["12", "7", "07", "7.0", "x"]).tolist() == [2, 1, 0, 0, 0]
    assert numbers.encode([7, 12, 8]).tolist() == [1, 2, 0]
    assert numbers.encode(pl.Series([12], dtype=pl.Int32)).tolist() == [2]
    text = Vocabulary(pl.Series(["07", "7"]))
    assert text.encode([7]).tolist() == [2]


def test_large_and_small_batches_find_the_same_rows():
    """One is a hash join, the other a binary search."""
    rng = np.random.default_rng(0)
    known = pl.Series(rng.permutation(5_000)[:3_000]).cast(pl.String)
    vocabulary = Vocabulary(known)
    wanted = pl.Series(rng.integers(0, 6_000, size=30_000)).cast(pl.String)
    wanted = wanted.set(pl.Series(rng.random(len(wanted)) < 0.01), None)
    whole = vocabulary.encode(wanted)
    pieces = np.concatenate([vocabulary.encode(wanted.slice(a, 1_000)) for a in range(0, len(wanted), 1_000)])
    row_of = {value: i for i, value in enumerate(known.to_list(), start=1)}
    assert whole.tolist() == pieces.tolist() == [row_of.get(value, 0) for value in wanted.to_list()]
    assert whole.flags.writeable


@pytest.mark.parametrize(
    "known",
    [
        pl.Series(["b", "a", "", "07", "7", "-3", "é", "e\u0301", "日本", "\U0001f600", "\uffff", "Z", "z", "\x00a"]),
        pl.Series([7, -3, 0, 2**63 - 1, -(2**63), 12]),
    ],
)
def test_a_handful_is_found_as_a_column_is(known):
    """Ids one by one in plain Python, or as a column in Polars."""
    vocabulary = Vocabulary.build(known, seed=1)
    asked = [
        *known.to_list(),
        None,
        "07",
        "+7",
        " 7",
        "7 ",
        "1_2",
        "7.0",
        "-0",
        "\uff17",
        "9" * 30,
        "9" * 5_000,
        "y",
        "日",
    ]
    asked += [str(value) for value in known] + [7, 12, 0, -(2**63), 2**70, True]
    column = pl.Series([None if value is None else str(value) for value in asked], dtype=pl.String)
    one_by_one = [int(vocabulary.encode([value])[0]) for value in asked]
    assert one_by_one == vocabulary.encode(column).tolist() == vocabulary.encode(asked).tolist()
    assert vocabulary.encode(["b"]).dtype == np.int64
    assert sorted(one_by_one[: len(known)]) == list(range(1, len(known) + 1))


def test_numbering_keeps_no_order_of_the_log():
    """Rows must tell neither first appearance nor popularity nor the order of ids: all rank correlations are small."""
    rng = np.random.default_rng(1)
    ids = pl.Series(rng.permutation(2_000))
    rows = Vocabulary.build(ids).encode(ids)
    assert abs(np.corrcoef(rows, np.arange(2_000))[0, 1]) < 0.08
    assert abs(np.corrcoef(rows, ids.to_numpy())[0, 1]) < 0.08


def test_numbering_depends_on_the_ids_and_the_seed_alone():
    events = small_log(0).events
    one = Vocabulary.build(events["user_id"], seed=5)
    two = Vocabulary.build(events["user_id"].reverse().head(150), events["user_id"], seed=5)
    assert one.ids.to_list() == two.ids.to_list()
    assert one.ids.to_list() != Vocabulary.build(events["user_id"], seed=6).ids.to_list()


def test_reordered_and_extended_keep_what_they_say():
    vocabulary = Vocabulary(pl.Series(["a", "b", "c"]))
    assert vocabulary.reordered(np.array([3, 1, 2])).ids.to_list() == ["c", "a", "b"]
    longer = vocabulary.extended(pl.Series(["z", "b", "y"]))
    assert longer.ids.to_list()[:3] == ["a", "b", "c"]
    assert sorted(longer.ids.to_list()[3:]) == ["y", "z"]
    assert vocabulary.extended(pl.Series(["b"])) is vocabulary


def test_saved_and_loaded(tmp_path):
    vocabulary = Vocabulary.build(pl.Series(["x", "y", "z"]))
    vocabulary.save(tmp_path / "deep" / "items.parquet")
    assert Vocabulary.load(tmp_path / "deep" / "items.parquet").ids.to_list() == vocabulary.ids.to_list()
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    for name in ("bad.parquet", "absent.parquet"):
        with pytest.raises(SnapshotError, match=name):
            Vocabulary.load(tmp_path / name)


def test_what_can_not_be_ids_is_refused():
    with pytest.raises(DataError, match="each must occur once"):
        Vocabulary(pl.Series(["a", "a"]))
    with pytest.raises(DataError, match="text or whole numbers"):
        Vocabulary(pl.Series([1.5]))
    with pytest.raises(DataError, match="text or whole numbers"):
        Vocabulary(pl.Series(["a"])).encode(pl.Series([1.5]))
