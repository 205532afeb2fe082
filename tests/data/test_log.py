"""The event log: the same from every source, groups as counted by hand, bad rows aside, k-core as by brute force."""

from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from shortlist.data.log import EventLog, dense_codes, k_core, read
from shortlist.data.roles import Roles
from shortlist.errors import DataError

START = datetime(2021, 5, 31)


def shop(num_rows: int = 200, seed: int = 0) -> pl.DataFrame:
    """A small log with text items, two actions, prices and a label; some users act twice in one second."""
    rng = np.random.default_rng(seed)
    seconds = np.sort(rng.integers(0, num_rows // 2, num_rows))
    return pl.DataFrame(
        {
            "customer_id": rng.integers(1, 20, num_rows),
            "sku": [f"p{number}" for number in rng.integers(0, 30, num_rows)],
            "timestamp": [int((START + timedelta(seconds=int(second))).timestamp()) for second in seconds],
            "event": rng.choice(np.array(["view", "buy"]), num_rows),
            "price": rng.integers(100, 999, num_rows) / 100,
            "click": rng.integers(0, 2, num_rows),
        }
    )


def save(frame: pl.DataFrame, path: Path) -> Path:
    match path.name.split(".", 1)[1]:
        case "csv":
            frame.write_csv(path)
        case "tsv":
            frame.write_csv(path, separator="\t")
        case "csv.gz":
            frame.write_csv(path, compression="gzip", check_extension=False)
        case "parquet":
            frame.write_parquet(path)
        case "jsonl":
            frame.write_ndjson(path)
        case "arrow":
            frame.write_ipc(path)
        case "feather":
            frame.write_ipc_stream(path)
    return path


def same(log: EventLog, other: EventLog) -> bool:
    return log.events.equals(other.events) and log.roles == other.roles and log.time_unit == other.time_unit


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.csv.gz", "t.parquet", "t.jsonl", "t.arrow", "t.feather"])
def test_every_file_format_gives_the_same_log(tmp_path: Path, name: str) -> None:
    assert same(read(save(shop(), tmp_path / name)), read(shop()))


@pytest.mark.parametrize("convert", [pl.DataFrame.lazy, pl.DataFrame.to_pandas, pl.DataFrame.to_arrow])
def test_every_frame_gives_the_same_log(convert: object) -> None:
    pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    assert callable(convert)
    assert same(read(convert(shop())), read(shop()))


def test_canonical_columns_come_first_and_file_order_stays() -> None:
    source = shop().with_columns(colour=pl.lit("red"), request_id=pl.lit(1))
    log = read(source)
    names = ["user_id", "item_id", "timestamp", "action", "group_id", "request_id", "value", "click", "colour"]
    assert log.events.columns == names
    types = [pl.Int64, pl.String, pl.Datetime("ms"), pl.String, pl.Int64]
    assert log.events.dtypes[:5] == types
    assert log.events["item_id"].to_list() == source["sku"].to_list()
    assert log.events["value"].to_list() == source["price"].to_list()
    assert (log.has_time, log.has_clock, log.time_unit) == (True, True, "s")
    assert log.quarantined.total == 0


def groups_by_hand(keys: list[tuple[object, ...]]) -> list[int]:
    numbers: dict[tuple[object, ...], int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def test_groups_are_user_and_exact_time() -> None:
    source = shop()
    expected = groups_by_hand(source.select("customer_id", "timestamp").rows())
    assert read(source).events["group_id"].to_list() == expected
    assert len(set(expected)) < source.height
    apart = pl.DataFrame(
        {"user_id": [1, 1], "item_id": [1, 2], "timestamp": [1_600_000_000_000_000, 1_600_000_000_000_001]}
    )
    assert read(apart).events["group_id"].to_list() == [0, 1]


def test_a_basket_is_one_group_whatever_the_time() -> None:
    source = shop().with_columns(basket_id=pl.Series(["a", "b", None, "a"] * 50))
    keys = [
        (user, basket, None if basket else at)
        for user, basket, at in source.select("customer_id", "basket_id", "timestamp").iter_rows()
    ]
    assert read(source).events["group_id"].to_list() == groups_by_hand(keys)


def test_without_times_every_event_is_its_own_group() -> None:
    log = read(shop().drop("timestamp"))
    assert log.events["group_id"].to_list() == list(range(200))
    assert "timestamp" not in log.events.columns
    assert (log.has_time, log.has_clock, log.time_unit) == (False, False, None)
    empty = read(shop().with_columns(timestamp=pl.lit(None, dtype=pl.Int64)), roles=Roles(timestamp="timestamp"))
    assert empty.events.equals(log.events)
    assert "'timestamp' is empty" in empty.notes[0]


def test_counter_is_order_and_no_clock() -> None:
    log = read(pl.DataFrame({"user_id": [1, 1], "item_id": [5, 6], "timestamp": [1, 0]}))
    assert (log.has_time, log.has_clock, log.time_unit) == (True, False, "order")
    assert "order only" in log.notes[0]


def test_roles_override_field_by_field() -> None:
    log = read(shop().with_columns(user=pl.lit("x")), roles=Roles(user="user", value="price*click"))
    assert log.events["user_id"].unique().to_list() == ["x"]
    assert log.roles.item == "sku"
    assert log.events["value"].to_list() == (shop()["price"] * shop()["click"]).to_list()
    assert {"price", "click", "customer_id"} <= set(log.events.columns)


def test_a_reserved_name_in_the_source_gives_way() -> None:
    source = pl.DataFrame({"user_id": [1], "item_id": [9], "asin": ["B0"], "action": ["buy"], "verb": ["v"]})
    log = read(source, roles=Roles(item="asin", action="verb"))
    assert log.events["item_id"].to_list() == ["B0"]
    assert log.events["source_item_id"].to_list() == [9]
    assert log.events["source_action"].to_list() == ["buy"]


def damaged(tmp_path: Path) -> Path:
    lines = ["user,item,timestamp,value"] + [f"u{i},i{i},{1_600_000_000 + i},1.5" for i in range(20)]
    lines[3] = ",i2,1600000002,1"
    lines[5] = "u4,,1600000004,1"
    lines[7] = "u6,i6,soon,1"
    lines[9] = "u8,i8,17,1"
    lines[11] = "u10,i10,1600000010,inf"
    lines[13] = "u12,i12"
    lines[15] = "u14,i14,1600000014,cheap"
    path = tmp_path / "damaged.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


REASONS = {
    4: "missing user", 6: "missing item", 8: "unparsable time", 10: "absurd time", 12: "non-finite number in value",
    14: "wrong number of fields", 16: "value is not a number",
}  # fmt: skip


@pytest.mark.parametrize("name", ["bad.parquet", "deep/bad.csv"])
def test_bad_rows_are_kept_aside_with_reason_and_line(tmp_path: Path, name: str) -> None:
    log = read(damaged(tmp_path), roles=Roles(value="value"), quarantine=tmp_path / name, max_bad_share=0.5)
    assert log.events["user_id"].to_list() == [f"u{i}" for i in range(20) if i not in (2, 4, 6, 8, 10, 12, 14)]
    assert log.events["group_id"].to_list() == list(range(13))
    assert dict(log.quarantined.counts) == dict(Counter(REASONS.values()))
    assert log.quarantined.total == 7
    path = tmp_path / name
    assert log.quarantined.path == path
    kept = pl.read_csv(path) if path.suffix == ".csv" else pl.read_parquet(path)
    assert dict(kept.select("line", "reason").rows()) == REASONS
    assert kept["table"].unique().to_list() == ["events"]
    assert kept.filter(pl.col("line") == 14)["row"].to_list() == ["u12,i12"]
    assert '"user":"u6"' in kept.filter(pl.col("line") == 8)["row"][0]


def test_too_many_bad_rows_stop_the_reading(tmp_path: Path) -> None:
    file = tmp_path / "bad.parquet"
    message = r"damaged.csv: 7 of 20 events rows are bad .*first is line 4 \(missing user\).*bad.parquet.*--max-bad-share 0.36"
    with pytest.raises(DataError, match=message):
        read(damaged(tmp_path), quarantine=file, roles=Roles(value="value"))
    assert pl.read_parquet(file).height == 7
    assert read(damaged(tmp_path), roles=Roles(value="value"), max_bad_share=0.36).events.height == 13


def test_not_a_number_without_role_is_merely_missing() -> None:
    source = pl.DataFrame({"user_id": [1, 2], "item_id": [1, 2], "heat": [float("nan"), 1.0]})
    log = read(source)
    assert log.events["heat"].to_list() == [None, 1.0]
    assert log.quarantined.total == 0


def test_ids_of_items_follow_the_events(tmp_path: Path) -> None:
    events = pl.DataFrame({"user_id": [1, 2], "item_id": ["1", "2"]})
    log = read(events, items=pl.DataFrame({"item_id": [1, 2], "title": ["a", "b"]}))
    assert log.items is not None
    assert log.items["item_id"].to_list() == ["1", "2"]
    log = read(events.cast({"item_id": pl.Int32}), items=pl.DataFrame({"title": ["a", "b"], "item_id": ["1", "2"]}))
    assert log.items is not None
    assert log.items.columns == ["item_id", "title"]
    assert log.items["item_id"].to_list() == [1, 2]


def test_ids_that_cannot_be_numbers_make_both_text() -> None:
    events = pl.DataFrame({"user_id": [1, 2], "item_id": [1, 2]})
    log = read(events, items=pl.DataFrame({"item_id": ["1", "x7"]}))
    assert log.items is not None
    assert log.events["item_id"].to_list() == ["1", "2"]
    assert log.items["item_id"].to_list() == ["1", "x7"]
    assert "text in both" in log.notes[0]


def test_whole_floats_are_integers_and_huge_ids_are_text() -> None:
    log = read(pl.DataFrame({"user_id": [1.0, 2.0], "item_id": pl.Series([1, 2**64 - 1], dtype=pl.UInt64)}))
    assert log.events["user_id"].to_list() == [1, 2]
    assert log.events["item_id"].to_list() == ["1", str(2**64 - 1)]


def test_side_tables_find_their_id_by_the_name_in_the_events() -> None:
    items = pl.DataFrame({"id": [5], "title": ["Heat"], "movie": ["m1"], "price": [float("nan")]})
    log = read(
        pl.DataFrame({"user": ["a"], "movie": ["m1"]}), items=items, users=pl.DataFrame({"id": ["a"], "age": [3]})
    )
    assert log.items is not None
    assert log.users is not None
    assert log.items.row(0, named=True) == {"item_id": "m1", "id": 5, "title": "Heat", "price": None}
    assert log.users.row(0, named=True) == {"user_id": "a", "age": 3}
    with pytest.raises(DataError, match="cannot tell the item id among colour, size"):
        read(pl.DataFrame({"user": ["a"], "movie": ["m1"]}), items=pl.DataFrame({"colour": [1], "size": [2]}))


def test_repeated_item_ids_are_set_aside_or_refused() -> None:
    events = pl.DataFrame({"user_id": [1, 2], "item_id": [1, 2]})
    items = pl.DataFrame({"item_id": [*range(200), 7], "title": [f"t{i}" for i in range(201)]})
    log = read(events, items=items)
    assert log.items is not None
    assert log.items.filter(pl.col("item_id") == 7)["title"].to_list() == ["t7"]
    assert dict(log.quarantined.counts) == {"repeated item id": 1}
    assert log.quarantined.rows is not None
    assert log.quarantined.rows.select("table", "line").row(0) == ("items", 201)
    with pytest.raises(DataError, match="2 of 4 items rows are bad"):
        read(events, items=pl.DataFrame({"item_id": [1, 1, 2, 2]}))


def test_k_core_agrees_with_brute_force() -> None:
    source = shop(400, seed=3)
    items = pl.DataFrame({"sku": [f"p{i}" for i in range(40)], "size": range(40)})
    rows = source.select("customer_id", "sku").rows()
    while True:
        users, skus = Counter(user for user, _ in rows), Counter(sku for _, sku in rows)
        left = [(user, sku) for user, sku in rows if users[user] >= 9 and skus[sku] >= 9]
        if len(left) == len(rows):
            break
        rows = left
    assert 0 < len(rows) < source.height
    log = read(source, items=items, kcore=9)
    assert log.events.select("user_id", "item_id").rows() == rows
    assert log.items is not None
    assert set(log.items["item_id"]) == {sku for _, sku in rows}
    assert log.events["group_id"].to_list() == groups_by_hand([(g,) for g in log.events["group_id"]])
    with pytest.raises(DataError, match="at least 1000 events"):
        k_core(log, 1000)


def test_dense_codes_follow_first_appearance() -> None:
    keys = pl.DataFrame({"a": [3, 1, 3, None, 1, None], "b": ["x", "x", "x", None, "y", None]})
    assert dense_codes(keys).to_list() == [0, 1, 0, 2, 3, 2]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (pl.DataFrame({"user_id": [], "item_id": []}), "empty"),
        (
            pl.DataFrame({"user_id": [None], "item_id": ["a"]}, schema={"user_id": pl.String, "item_id": pl.String}),
            "1 of 1",
        ),
    ],
)
def test_nothing_to_read_is_refused(source: pl.DataFrame, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(source)


def test_unclear_columns_are_told_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t\.csv: no column looks like the user; the log has colour"):
        read(save(pl.DataFrame({"colour": ["red"], "size": ["l"]}), tmp_path / "t.csv"))
    with pytest.raises(DataError, match=r"DataFrame: column 'when'.*--timestamp"):
        read(pl.DataFrame({"user_id": [1], "item_id": [2], "when": ["soon"]}), roles=Roles(timestamp="when"))


def test_large_log_is_read_whole(tmp_path: Path) -> None:
    source = pl.concat([shop(1000, seed) for seed in range(100)])
    log = read(save(source, tmp_path / "t.csv"))
    assert log.events.height == 100_000
    assert log.events["value"].sum() == pytest.approx(source["price"].sum())
