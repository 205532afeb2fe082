"""Encoding of events against plain Python, and fields against values worked out by hand."""

import math

import numpy as np
import polars as pl
import pytest
import torch

from data_support import baskets_of, plain_log, shuffled_inside_groups, small_frame, small_log
from shortlist.data.encode import encode_events, sort_events
from shortlist.data.fields import FittedField, field_table, first_rows, stacked
from shortlist.data.infer import constant_columns, fit_fields
from shortlist.data.jagged import Jagged
from shortlist.data.log import read
from shortlist.data.vocabulary import Vocabulary
from shortlist.errors import DataError

# -- events -------------------------------------------------------------------------------------------------------


def encoded(log, **kwargs):
    items, users = Vocabulary.build(log.events["item_id"]), Vocabulary.build(log.events["user_id"])
    return encode_events(log, items, users, **kwargs), items, users


@pytest.mark.parametrize("seed", range(5))
def test_histories_are_the_users_baskets_in_time_order(seed):
    log = small_log(seed)
    events, items, users = encoded(log)
    histories = events.histories
    for user, baskets in baskets_of(log).items():
        row = int(users.encode([user])[0])
        a, b = histories.offsets[row : row + 2]
        lines = [(basket.at, line) for basket in baskets for line in basket.lines]
        assert items.decode(histories.item[a:b]) == [line["item_id"] for _, line in lines]
        assert histories.time[a:b].tolist() == [at for at, _ in lines]
        assert histories.value[a:b].tolist() == [line["value"] for _, line in lines]
        assert [events.actions[i - 1] for i in histories.action[a:b]] == [line["action"] for _, line in lines]
        groups = histories.group[a:b]
        assert (np.diff(groups) >= 0).all()
        assert len(np.unique(groups)) == len(baskets)
    assert histories.offsets[1] == 0
    assert log.events["item_id"].gather(events.row).to_list() == items.decode(histories.item)


def test_baskets_that_overlap_in_time_stay_whole_and_are_read_when_complete():
    user = np.ones(4, dtype=np.int64)
    histories, row = sort_events(
        user, np.array([10, 11, 12, 13]), np.array([0, 50, 10, 20]), group=np.array([0, 0, 1, 1]), num_users=1
    )
    assert histories.item.tolist() == [12, 13, 10, 11]
    assert histories.time.tolist() == [20, 20, 50, 50]
    assert row.tolist() == [2, 3, 0, 1]


def test_groups_of_one_moment_follow_their_numbers_and_lines_the_file():
    histories, _ = sort_events(
        np.array([1, 1, 1, 2]),
        np.array([5, 4, 3, 9]),
        np.array([7, 7, 7, 1]),
        group=np.array([1, 0, 1, 2]),
        num_users=3,
    )
    assert histories.item.tolist() == [4, 5, 3, 9]
    assert histories.offsets.tolist() == [0, 0, 3, 4, 4]


def test_without_group_numbers_one_user_and_moment_is_a_group():
    histories, _ = sort_events(np.array([2, 1, 1, 2]), np.array([1, 2, 3, 4]), np.array([5, 9, 8, 5]), num_users=2)
    assert histories.item.tolist() == [3, 2, 1, 4]
    assert [int(g) for g in np.diff(histories.group) != 0] == [1, 1, 0]


def test_a_counter_gives_places_and_no_times_give_a_shuffle_of_whole_groups():
    frame = small_frame(1).with_columns(timestamp=pl.int_range(pl.len()))
    counted = read(frame)
    assert not counted.has_clock
    histories = encoded(counted)[0].histories
    for user in range(1, histories.num_users + 1):
        a, b = histories.offsets[user : user + 2]
        places = histories.time[a:b]
        assert places[0] == 0
        assert set(np.diff(places)) <= {0, 1}
        assert ((np.diff(places) == 0) == (np.diff(histories.group[a:b]) == 0)).all()

    sorted_file = read(small_frame(1).drop("timestamp").sort("user_id", "item_id"))
    one, two = (encoded(sorted_file, seed=seed)[0] for seed in (0, 1))
    assert one.row.tolist() != two.row.tolist()
    assert one.row.tolist() == encoded(sorted_file, seed=0)[0].row.tolist()
    assert (
        sorted_file.events["group_id"].gather(one.row).rle_id().max() + 1 == sorted_file.events["group_id"].n_unique()
    )


def test_single_events_stand_in_time_then_file_order():
    log = plain_log([("u", "c", 5), ("u", "a", 1), ("u", "b", 5), ("u", "d", 5)])
    events, items, _ = encoded(log, single=True)
    assert items.decode(events.histories.item) == ["a", "c", "b", "d"]
    assert len(np.unique(events.histories.group)) == 4


@pytest.mark.parametrize("seed", range(3))
def test_the_order_inside_groups_changes_only_that_order(seed):
    frame = small_frame(seed)
    (one, *_), (two, *_) = encoded(read(frame)), encoded(read(shuffled_inside_groups(frame, seed)))
    assert one.histories.item.tolist() != two.histories.item.tolist()
    for name in ("offsets", "time", "group"):
        np.testing.assert_array_equal(getattr(one.histories, name), getattr(two.histories, name))
    keys = [
        sorted(zip(h.group.tolist(), h.item.tolist(), h.value.tolist(), h.action.tolist()))
        for h in (one.histories, two.histories)
    ]
    assert keys[0] == keys[1]


def test_users_can_be_renumbered():
    events, _, users = encoded(small_log(2))
    order = np.random.default_rng(0).permutation(len(users)) + 1
    moved = events.reordered(order)
    for new, old in enumerate(order, start=1):
        a, b = events.histories.offsets[old : old + 2]
        c, d = moved.histories.offsets[new : new + 2]
        assert moved.row[c:d].tolist() == events.row[a:b].tolist()
        assert moved.histories.item[c:d].tolist() == events.histories.item[a:b].tolist()


def test_missing_money_is_worth_nothing_and_no_money_column_means_one():
    log = read(
        pl.DataFrame(
            {"user_id": ["a", "a"], "item_id": ["x", "y"], "timestamp": [1_600_000_000] * 2, "value": [2.5, None]}
        )
    )
    assert encoded(log)[0].histories.value.tolist() == [2.5, 0.0]
    assert encoded(plain_log([("a", "x", 1)]))[0].histories.value.tolist() == [1.0]


# -- fields -------------------------------------------------------------------------------------------------------


def only(frame: pl.DataFrame, column: str, side="item") -> FittedField:
    fitted, unused = fit_fields(frame, side, [column])
    assert not unused, unused
    assert len(fitted) == 1, fitted
    return fitted[0]


def test_a_category_has_ids_by_frequency_and_0_for_what_came_later():
    f = only(pl.DataFrame({"colour": ["red", "blue", "red", "red", "blue", "green"] * 3}), "colour")
    assert f.field.size == 3
    assert f.encode(pl.Series(["green", "red", "blue", "violet", None, " red "])).tolist() == [3, 1, 2, 0, 0, 1]


@pytest.mark.parametrize("column", [[1, 2, 2, 3] * 5, [1.0, 2.0, 2.0, 3.0] * 5, ["1", "2", "2", "3"] * 5])
def test_a_category_of_numbers_reads_them_as_integer_float_or_text(column):
    f = only(pl.DataFrame({"size": column}), "size")
    assert f.kind == "Categorical"
    for values in (pl.Series([3, 2, 9]), pl.Series([3.0, 2.0, None]), pl.Series(["3", "2", "x"])):
        assert f.encode(values).tolist() == [3, 1, 0]
    flags = only(pl.DataFrame({"flag": [True, False, True]}), "flag")
    assert flags.encode(pl.Series([True, False, None])).tolist() == [1, 2, 0]


def test_numbers_are_scaled_by_what_training_saw():
    f = only(pl.DataFrame({"weight": [1.5, 2.5, 3.5, 4.5]}), "weight")
    mean, std = 3.0, math.sqrt(1.25)
    assert not f.log
    assert f.encode(pl.Series([1.5, None, 4.0])).tolist() == pytest.approx([(1.5 - mean) / std, 0.0, (4 - mean) / std])
    assert f.encode(pl.Series([1e12, float("nan"), float("-inf")])).tolist() == [10.0, 0.0, -10.0]


def test_heavy_tails_are_taken_by_logarithm():
    prices = np.exp(np.random.default_rng(0).normal(1, 1.5, size=400))
    f = only(pl.DataFrame({"price": prices}), "price")
    assert f.log
    logs = np.log1p(prices)
    assert f.encode(pl.Series([9.0])).item() == pytest.approx((math.log(10) - logs.mean()) / logs.std(), rel=1e-5)
    assert math.isfinite(f.encode(pl.Series([-5.0])).item())


def test_lists_are_read_from_text_and_from_list_columns():
    genres = ["a|b", "b", "c|a", "b|c", "a", "c|b|a"] * 4
    for column in (genres, [g.split("|") for g in genres]):
        f = only(pl.DataFrame({"genres": column}), "genres")
        assert f.kind == "Sequence"
        assert f.field.size == 3
        known = {f.vocabulary.decode([i])[0]: i for i in (1, 2, 3)}
        got = f.encode(pl.Series(["c|zz|a", None, ""] if isinstance(column[0], str) else [["c", "zz", "a"], None, []]))
        assert got.lengths.tolist() == [2, 0, 0]
        assert got.values.tolist() == [known["c"], known["a"]]


def test_titles_give_words_seen_twice_and_keep_the_raw_text():
    titles = [f"Red {kind} cup no{i}" for i, kind in enumerate(["tea", "Tea", "coffee", "tin"] * 8)]
    fitted, _ = fit_fields(pl.DataFrame({"title": titles}), "item", ["title"])
    words, text = fitted
    assert (words.name, words.kind, text.name, text.kind) == ("title_words", "Sequence", "title", "Text")
    assert set(words.vocabulary.ids) == {"red", "tea", "coffee", "tin", "cup"}
    got = words.encode(pl.Series(["RED cup, unheard-of!", None]))
    assert words.vocabulary.decode(got.values) == ["red", "cup"]
    assert got.lengths.tolist() == [2, 0]
    raw = text.encode(pl.Series(["Tasse é", None]))
    assert bytes(raw.values[: raw.offsets[1]].tolist()).decode() == "Tasse é"
    assert raw.lengths.tolist() == [8, 0]
    assert [f.name for f in fit_fields(pl.DataFrame({"bio": titles}), "user", ["bio"])[0]] == ["bio_words"]


@pytest.mark.parametrize("dtype", [pl.List(pl.Float64), pl.Array(pl.Float32, 3)])
def test_vectors_are_taken_as_they_are(dtype):
    frame = pl.DataFrame({"picture": [[0.5, 1.0, 2.0], [1.0, 0.0, 0.0], None]}, schema={"picture": dtype})
    f = only(frame, "picture")
    assert (f.kind, f.dim) == ("Vector", 3)
    assert f.encode(frame["picture"]).tolist() == [[0.5, 1.0, 2.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert f.encode(pl.Series([[1.0, 2.0]])).tolist() == [[0.0, 0.0, 0.0]]


def test_dates_are_days_and_pictures_are_bytes():
    f = only(pl.DataFrame({"since": pl.Series(["2020-01-01", "2020-01-03"]).str.to_date()}), "since")
    assert f.kind == "Numeric"
    assert f.encode(pl.Series(["2020-01-02", "2020-01-03"]).str.to_date()).tolist() == pytest.approx(
        [0.0, 1.0], abs=1e-3
    )
    picture = only(pl.DataFrame({"image": [b"\x89PNG1", b"\xff\xd8\xff22"]}), "image")
    assert picture.kind == "Image"
    assert picture.encode(pl.Series([b"\x89PNG1", None])).lengths.tolist() == [5, 0]


@pytest.mark.parametrize("count", [3, 70_000])
def test_raw_text_is_its_utf8_bytes(count):
    words = [None if i % 5 == 4 else "é" * (i % 4) + str(i) for i in range(count)]
    text = FittedField(name="title", side="item", column="title", kind="Text", why="").encode(pl.Series(words))
    wanted = [(word or "").encode() for word in words]
    assert text.lengths.tolist() == [len(piece) for piece in wanted]
    assert bytes(text.values.numpy()) == b"".join(wanted)


@pytest.mark.parametrize(
    ("column", "why"),
    [
        ([f"x{i}9" for i in range(50)], "nearly every row"),
        (list(range(50)), "row number"),
        ([3] * 50, "same value"),
        ([None] * 50, "no value"),
        ([f"0{i:04d}" for i in range(50)], "nearly every row"),
        ([{"a": 1}] * 50, "not read"),
        ([b"zz"] * 50, "no PNG"),
    ],
)
def test_columns_that_say_nothing_are_no_fields_and_the_reason_is_given(column, why):
    fitted, unused = fit_fields(pl.DataFrame({"c": column}), "item", ["c"])
    assert not fitted
    assert why in unused[0].why


def test_a_table_starts_with_the_unknown_row_and_can_be_cut_and_grown():
    frame = pl.DataFrame(
        {"colour": ["red", "blue", "red"] * 4, "tags": ["a|b", "b", "a"] * 4, "weight": [1.5, 2.5, 0.5] * 4}
    )
    fitted, _ = fit_fields(frame, "item", frame.columns)
    table = field_table(fitted, frame)
    assert table.num_rows == 13
    assert table.columns["colour"].tolist() == [0, *[1, 2, 1] * 4]
    assert table.columns["weight"][0] == 0
    assert table.columns["tags"].lengths.tolist() == [0, *[2, 1, 1] * 4]
    upper = first_rows(table, 6)
    again = stacked(upper, field_table(fitted, frame[5:]))
    for name, column in table.columns.items():
        other = again.columns[name]
        if isinstance(column, Jagged):
            assert torch.equal(column.offsets, other.offsets)
            assert torch.equal(column.values, other.values)
        else:
            assert torch.equal(column, other)


def test_a_type_that_can_not_be_read_names_the_field():
    f = only(pl.DataFrame({"genres": [["a", "b"], ["b"]] * 9}), "genres")
    with pytest.raises(DataError, match="'genres'"):
        f.encode(pl.Series([3, 4]))


def test_event_columns_belong_to_whom_they_are_constant_for():
    rng = np.random.default_rng(0)
    user, item = rng.integers(1, 40, size=600), rng.integers(1, 30, size=600)
    events = pl.DataFrame({
        "\0item": item, "\0user": user, "\0group": np.arange(600),
        "country": user % 5, "brand": item % 7, "rating": rng.integers(1, 6, size=600), "shop": np.ones(600),
    })  # fmt: skip
    names = ["country", "brand", "rating", "shop"]
    of_item, values = constant_columns(events, "\0item", names)
    assert of_item == ["brand"]
    assert dict(values.iter_rows()) == {int(i): int(i % 7) for i in np.unique(item)}
    assert constant_columns(events, "\0user", names)[0] == ["country"]


def test_one_event_per_owner_proves_nothing():
    events = pl.DataFrame({"\0item": np.arange(1, 201), "\0group": np.arange(200), "rating": np.arange(200) % 5})
    assert constant_columns(events, "\0item", ["rating"])[0] == []
