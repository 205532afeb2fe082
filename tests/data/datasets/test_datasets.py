"""Loaders on tiny files in the published formats; on the real sets where SHORTLIST_DATA names them; counts as published."""

import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from shortlist.data.datasets import data_sets, load, names
from shortlist.data.datasets.builtin import ATTRIBUTION
from shortlist.data.datasets.s3rec import permuted_ids
from shortlist.data.log import EventLog
from shortlist.errors import DataError

EPOCH = 978_300_760
AT = datetime(2000, 12, 31, 22, 12, 40)


def put(path: Path, text: str, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))


def first_item(log: EventLog) -> dict[str, object]:
    assert log.items is not None
    return log.items.row(0, named=True)


def test_builtin_log_is_the_published_shop() -> None:
    log = load("builtin")
    assert (log.events.height, log.events["user_id"].n_unique(), log.events["item_id"].n_unique()) == (
        387_841,
        4_338,
        3_665,
    )
    assert log.events["group_id"].n_unique() == log.events["basket_id"].n_unique() == 18_532
    assert log.events.row(0, named=True) == {
        "user_id": 17850, "item_id": 715, "timestamp": datetime(2010, 12, 1, 8, 26), "action": "event", "group_id": 0,
        "basket_id": "536365", "value": pytest.approx(15.3), "quantity": 6, "price": 2.55, "country": "United Kingdom",
    }  # fmt: skip
    assert log.events["value"].to_numpy() == pytest.approx((log.events["price"] * log.events["quantity"]).to_numpy())
    assert log.items is not None
    assert log.items.columns == ["item_id", "stock_code", "title", "price"]
    assert log.quarantined.total == 0
    assert log.notes == (ATTRIBUTION,)
    assert "CC BY 4.0" in ATTRIBUTION


def test_movielens_100k_files(tmp_path: Path) -> None:
    put(tmp_path / "ml-100k/u.data", f"7\t1\t3\t{EPOCH}\n8\t1\t5\t{EPOCH + 1}\n")
    flags = "0|0|0|1|1|1|0|0|0|0|0|0|0|0|0|0|0|0|0"
    items = f"1|Café Story (1995)|01-Jan-1995||http://x|{flags}\n2|unknown||||1{'|0' * 18}\n"
    put(tmp_path / "ml-100k/u.item", items, "latin-1")
    put(tmp_path / "ml-100k/u.user", "7|24|M|technician|02139\n8|53|F|other|94043\n")
    log = load("ml-100k", tmp_path)
    assert log.events.columns == ["user_id", "item_id", "timestamp", "action", "group_id", "rating"]
    assert log.events.row(0) == (7, 1, AT, "event", 0, 3)
    assert log.items is not None
    assert log.items.rows() == [
        (1, "Café Story", 1995, ["Animation", "Children's", "Comedy"]),
        (2, "unknown", None, ["unknown"]),
    ]
    assert log.users is not None
    assert log.users.row(0, named=True) == {
        "user_id": 7, "age": 24, "gender": "M", "occupation": "technician", "zip_code": "02139",
    }  # fmt: skip
    assert log.roles.labels == ("rating",)


def test_movielens_1m_files(tmp_path: Path) -> None:
    put(tmp_path / "ml-1m/ratings.dat", f"1::9::5::{EPOCH}\n1::2::3::{EPOCH}\n")
    put(
        tmp_path / "ml-1m/movies.dat",
        "9::Léon: The Pro, II (1994)::Crime|Drama\n2::Jumanji (1995)::Comedy\n",
        "latin-1",
    )
    put(tmp_path / "ml-1m/users.dat", "1::F::1::10::48067\n")
    log = load("ml-1m", tmp_path)
    assert log.events["item_id"].to_list() == [9, 2]
    assert log.events["group_id"].to_list() == [0, 0]
    assert log.has_clock
    assert first_item(log) == {
        "item_id": 9,
        "title": "Léon: The Pro, II",
        "release_year": 1994,
        "genres": ["Crime", "Drama"],
    }
    assert log.users is not None
    assert log.users.row(0, named=True) == {"user_id": 1, "gender": "F", "age": 1, "occupation": 10, "zip_code": 48067}


def test_movielens_1m_sequences_give_order_and_never_a_filled_time(tmp_path: Path) -> None:
    (tmp_path / "ml-1m").mkdir()
    rows = {
        "user_id": [1, 1, 1], "movie_id": [5, 6, 7], "pos": [2, 0, 1], "rating": [None, 4, None], "timestamp": [None, EPOCH, None],
        "rating_le3": [True, False, None], "timestamp_filled": [EPOCH, EPOCH, EPOCH],
    }  # fmt: skip
    pl.DataFrame(rows).write_parquet(tmp_path / "ml-1m/ml1m_sequences.parquet")
    movies = pl.DataFrame(
        {"movie_id": [5, 6, 7], "title": ["A (2000)", "B", "C"], "genres": ["Drama", "Comedy", "War|Drama"]}
    )
    movies.write_parquet(tmp_path / "ml-1m/movies.parquet")
    pl.DataFrame({"user_id": [1], "age": [3]}).write_parquet(tmp_path / "ml-1m/users.parquet")
    log = load("ml-1m", tmp_path)
    assert log.events["item_id"].to_list() == [6, 7, 5]
    assert (log.has_time, log.has_clock, log.time_unit) == (True, False, "order")
    assert log.events["timestamp"].is_sorted()
    assert log.events["rating"].to_list() == [4, None, None]
    assert set(log.events.columns) == {"user_id", "item_id", "timestamp", "action", "group_id", "rating", "rating_le3"}


def test_movielens_latest_small_files(tmp_path: Path) -> None:
    put(tmp_path / "ml-latest-small/ratings.csv", f"userId,movieId,rating,timestamp\n1,3,4.5,{EPOCH}\n")
    movies = 'movieId,title,genres\n3,"American President, The (1995)",Comedy|Drama\n4,Babylon 5,(no genres listed)\n'
    put(tmp_path / "ml-latest-small/movies.csv", movies)
    log = load("ml-latest-small", tmp_path)
    assert log.events.row(0) == (1, 3, AT, "event", 0, 4.5)
    assert log.items is not None
    assert log.items.rows() == [(3, "American President, The", 1995, ["Comedy", "Drama"]), (4, "Babylon 5", None, [])]


def test_s3rec_release_is_permuted_and_keeps_order(tmp_path: Path) -> None:
    put(tmp_path / "Toys_and_Games.txt", "1 1 2 3\n2 3 4 1 4\n")
    attributes = {"1": [7, 8], "2": [7], "3": [9], "4": []}
    put(tmp_path / "Toys_and_Games_item2attributes.json", json.dumps(attributes))
    log = load("s3rec-toys", tmp_path)
    new = permuted_ids(4)
    assert log.events["user_id"].to_list() == [1, 1, 1, 2, 2, 2, 2]
    assert log.events["item_id"].to_list() == [new[item] for item in (1, 2, 3, 3, 4, 1, 4)]
    assert log.events["group_id"].to_list() == list(range(7))
    assert (log.time_unit, log.has_clock) == ("order", False)
    assert log.events.filter(pl.col("user_id") == 2)["timestamp"].is_sorted()
    assert log.items is not None
    assert dict(log.items.rows()) == {
        int(new[int(item)]): [str(a) for a in listed] for item, listed in attributes.items()
    }
    assert log.items["item_id"].is_sorted()


def test_s3rec_times_that_are_missing_keep_the_order(tmp_path: Path) -> None:
    (tmp_path / "amazon").mkdir()
    events = pl.DataFrame(
        {
            "user_id": [1, 1, 2, 2],
            "item_id": [1, 2, 2, 2],
            "pos": [0, 1, 0, 1],
            "timestamp": [EPOCH + 50, EPOCH + 90, None, None],
        }
    )
    events.write_parquet(tmp_path / "amazon/yelp_interactions.parquet")
    items = pl.DataFrame(
        {"item_id": [1, 2], "title": ["A", "B"], "attributes": [[1], [2, 3]], "letter_sid": [None, None]}
    )
    items.write_parquet(tmp_path / "amazon/yelp_items.parquet")
    log = load("s3rec-yelp", tmp_path)
    seconds = (log.events["timestamp"].dt.epoch("s") - EPOCH).to_list()
    assert seconds == [50, 90, 50, 51]
    assert log.has_clock
    assert "2 events have no time" in log.notes[1]
    assert log.items is not None
    assert log.items.columns == ["item_id", "title", "attributes"]


def test_permutation_is_fixed_complete_and_shuffles() -> None:
    new = permuted_ids(1000)
    assert sorted(new) == list(range(1001))
    assert new[0] == 0
    assert np.array_equal(new, permuted_ids(1000))
    assert (np.diff(new[1:]) == 1).sum() < 20


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_completejourney_tables(tmp_path: Path, suffix: str) -> None:
    tables = {
        "transactions": pl.DataFrame(
            {"household_id": [900, 900], "store_id": [330, 330], "basket_id": [3, 4], "product_id": [10, 11],
             "quantity": [1, 2], "sales_value": [0.5, 1.25], "transaction_timestamp": [AT, AT]}
        ),
        "products": pl.DataFrame({"product_id": [10, 11, 12], "brand": ["National", "Private", "National"]}),
        "demographics": pl.DataFrame({"household_id": [900], "age": ["65+"]}),
    }  # fmt: skip
    (tmp_path / "completejourney").mkdir()
    for name, table in tables.items():
        path = tmp_path / f"completejourney/{name}.{suffix}"
        table.write_csv(path) if suffix == "csv" else table.write_parquet(path)
    log = load("completejourney", tmp_path)
    assert log.events.select("user_id", "item_id", "timestamp", "group_id", "value").rows() == [
        (900, 10, AT, 0, 0.5),
        (900, 11, AT, 1, 1.25),
    ]
    assert log.items is not None
    assert log.items.height == 3
    assert log.users is not None
    assert log.users.rows() == [(900, "65+")]


@pytest.mark.parametrize("name", [name for name in names() if name != "builtin"])
def test_absent_files_say_where_to_download_them(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=rf"{name}: files not found \(none of .*Download .*SHORTLIST_DATA={tmp_path}"):
        load(name, tmp_path)
    monkeypatch.delenv("SHORTLIST_DATA", raising=False)
    with pytest.raises(DataError, match=r"SHORTLIST_DATA is not set.*Download"):
        load(name)


def test_unknown_names_get_a_hint() -> None:
    with pytest.raises(DataError, match=r"no data set is called 'ml-10k': did you mean ml-100k"):
        load("ml-10k")
    with pytest.raises(DataError, match="there are builtin, ml-100k"):
        load("netflix")


def test_listing_names_imports_nothing_heavy() -> None:
    code = "import sys, shortlist.data.datasets as d; d.names(); assert not {'polars', 'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


PUBLISHED = {
    "ml-100k": (100_000, 943, 1_682),
    "ml-1m": (1_000_209, 6_040, 3_706),
    "ml-latest-small": (100_836, 610, 9_724),
    "s3rec-beauty": (198_502, 22_363, 12_101),
    "s3rec-toys": (167_597, 19_412, 11_924),
    "s3rec-yelp": (316_354, 30_431, 20_033),
    "completejourney": (1_469_307, 2_469, 68_509),
}


def test_stated_counts_are_the_published_ones() -> None:
    stated = {d.name: (d.num_events, d.num_users, d.num_items) for d in data_sets()}
    assert stated == {"builtin": (387_841, 4_338, 3_665), **PUBLISHED}


@pytest.mark.skipif("SHORTLIST_DATA" not in os.environ, reason="SHORTLIST_DATA names no folder with the public sets")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name: str) -> None:
    events = load(name).events
    assert (events.height, events["user_id"].n_unique(), events["item_id"].n_unique()) == PUBLISHED[name]
