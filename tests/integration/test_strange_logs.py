"""`shortlist train` on logs it was not written for, through the real command: each ends with a run that the others accept."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from cli_support import LIGHT, PLAIN, refused, succeeds
from support import shop_frames

Writer = Callable[[Path, pl.DataFrame, pl.DataFrame], tuple[Path, list[object], object]]
"""Writes a log into a folder; gives its path, more arguments for `train`, and a user to recommend to."""


def semicolons(folder, events, items):
    """Comma decimals, ids with spaces and letters from everywhere, quoted."""
    lines = ["shop;user_id;item_id;timestamp;preis"]
    for row in events.iter_rows(named=True):
        price = f"{row['price']:.2f}".replace(".", ",")
        lines.append(
            f'"Müller; Söhne";"{row["user_id"]}–ÿ 名前";"{row["item_id"]}/Größe №1";{row["timestamp"]};{price}'
        )
    path = folder / "log.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path, ["--value", "preis"], "u3–ÿ 名前"


def several_actions(folder, events, items):
    """Views, carts and purchases; purchases are to be predicted."""
    number = pl.int_range(events.height)
    action = (
        pl.when(number % 3 == 0)
        .then(pl.lit("buy"))
        .when(number % 3 == 1)
        .then(pl.lit("cart"))
        .otherwise(pl.lit("view"))
    )
    path = folder / "log.csv"
    events.with_columns(event_type=action).write_csv(path)
    return path, ["--set", 'data.target_actions=["buy"]'], "u3"


def wide_items(folder, events, items):
    """An items table with all that product feeds have, and items that nobody touched."""
    feed = items.with_columns(
        sku=pl.col("item_id") + "-SKU", url="https://shop.example/" + pl.col("item_id"), empty=pl.lit(None, dtype=pl.String),
        constant=pl.lit("EUR"), listed=pl.date(2023, 1, 1) + pl.duration(days=pl.int_range(pl.len())),
        tags=pl.when(pl.int_range(pl.len()) % 2 == 0).then(pl.lit("red|round")).otherwise(pl.lit("blue|square|round")),
        in_stock=pl.int_range(pl.len()) % 3 == 0, user_id=pl.lit("a column with a role's name"),
    )  # fmt: skip
    path = folder / "log.csv"
    events.write_csv(path)
    feed.write_csv(folder / "feed.tsv", separator="\t")
    return path, ["--items", folder / "feed.tsv"], "u3"


def json_lines(folder, events, items):
    """Nested extras, keys that are missing in some rows."""
    path = folder / "log.jsonl"
    rows = events.to_dicts()
    for number, row in enumerate(rows):
        row["device"] = {"os": "x", "version": number}
        if number % 2:
            row["note"] = "seldom"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, ["--items", write(items, folder / "items.jsonl")], "u3"


def parquet(folder, events, items):
    """Typed times with a zone, integer users as Int32, categorical items."""
    typed = events.select(
        visitor=pl.col("user_id").str.slice(1).cast(pl.Int32),
        product=pl.col("item_id").cast(pl.Categorical),
        at=pl.from_epoch("timestamp", time_unit="s").dt.replace_time_zone("Europe/Lisbon", ambiguous="earliest"),
    )
    return write(typed, folder / "log.parquet"), [], 3


def zipped(folder, events, items):
    """A CSV under gzip with Windows line ends and a byte order mark."""
    path = folder / "log.csv.gz"
    text = events.write_csv().replace("\n", "\r\n")
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.encode()))
    return path, [], "u3"


def other_language(folder, events, items):
    """Headers nobody can guess, named by flags; ISO times with an offset."""
    iso = pl.from_epoch("timestamp", time_unit="s").dt.strftime("%Y-%m-%dT%H:%M:%S+02:00")
    frame = events.select(Покупатель="user_id", 商品="item_id", Fecha=iso)
    return write(frame, folder / "log.csv"), ["--user", "Покупатель", "--item", "商品", "--timestamp", "Fecha"], "u3"


def milliseconds(folder, events, items):
    """Times in milliseconds, rows in no order, ids as numbers far apart."""
    frame = events.select(
        uid=pl.col("user_id").str.slice(1).cast(pl.Int64) * 10**12,
        iid=pl.col("item_id").str.slice(1).cast(pl.Int64) - 7,
        ts=pl.col("timestamp") * 1000 + 123,
    )
    return write(frame.sample(fraction=1.0, shuffle=True, seed=1), folder / "log.csv"), [], 3 * 10**12


def clicks(folder, events, items):
    """A label column of zeros and ones, with rows that were shown and not clicked."""
    frame = events.with_columns(click=(pl.int_range(events.height) % 4 == 0).cast(pl.Int64))
    return write(frame, folder / "log.tsv", separator="\t"), [], "u3"


def headless(folder, events, items):
    """MovieLens' own layout."""
    number = pl.int_range(1, events.height + 1)
    frame = events.select(
        pl.col("user_id").str.slice(1), pl.col("item_id").str.slice(1), rating=number % 5 + 1, timestamp="timestamp"
    )
    path = folder / "ratings.dat"
    path.write_text("\n".join("::".join(map(str, row)) for row in frame.iter_rows()) + "\n")
    return path, [], 3


def write(frame: pl.DataFrame, path: Path, separator: str = ",") -> Path:
    match path.suffix:
        case ".parquet":
            frame.write_parquet(path)
        case ".jsonl":
            frame.write_ndjson(path)
        case _:
            frame.write_csv(path, separator=separator)
    return path


LOGS = (
    semicolons, several_actions, wide_items, json_lines, parquet, zipped, other_language, milliseconds, clicks, headless,
)  # fmt: skip


@pytest.mark.parametrize("log", LOGS, ids=lambda log: log.__name__)
def test_trained_evaluated_compared_and_recommended(log: Writer, tmp_path):
    events, items, _ = shop_frames(60)
    path, more, user = log(tmp_path, events, items)
    settings = tmp_path / "settings.toml"
    settings.write_text(LIGHT if "--items" in more else PLAIN)
    run = tmp_path / "run"
    trained = succeeds("train", path, "--config", settings, "--out", run, "--quiet", "--json", *more).json
    assert [s["name"] for s in trained["systems"]][:4] == ["popularity", "counts", "two-tower", "dnn"]
    assert trained["validation"]["requests"] >= 5
    assert not (tmp_path / "run.training").exists()
    report = succeeds("evaluate", run, "--json").json
    assert report["num_requests"] > 10
    assert 0 < report["metrics"]["ndcg@4"]["mean"] <= 1
    assert sum(report["lost_at"].values()) == pytest.approx(1)
    table = succeeds("compare", run, "popularity", "--json").json
    assert [r["name"] for r in table["reports"]] == [str(run), "popularity"]
    assert table["reports"][0]["metrics"]["ndcg@4"] == report["metrics"]["ndcg@4"]
    page = succeeds("recommend", run, "--user", user, "--json").json
    assert len({item["item_id"] for item in page["items"]}) == 4
    rows = events.gather_every(4) if log is clicks else events  # what was shown and not clicked is no history
    assert page["num_history"] == rows.filter(pl.col("user_id") == "u3").height
    assert page["degraded"] is None


def test_no_settings_at_all(tmp_path):
    events, _, _ = shop_frames(60)
    run = tmp_path / "run"
    succeeds("train", write(events, tmp_path / "log.csv"), "--out", run, "--quiet", "--set", "trainer.epochs=1")
    assert succeeds("evaluate", run, "--json").json["num_requests"] > 10
    assert len(succeeds("recommend", run, "--user", "u3", "--json").json["items"]) == 10


@pytest.fixture(scope="module")
def timeless(tmp_path_factory):
    folder = tmp_path_factory.mktemp("timeless")
    events, items, _ = shop_frames(60)
    write(items, folder / "items.csv")
    return write(events.drop("timestamp"), folder / "log.csv")


def test_a_sequence_system_is_refused_on_a_log_without_times(timeless):
    settings = timeless.with_name("sequence.toml")
    settings.write_text('[stages.retrieval]\nsystems = ["popularity", "sasrec"]\n')
    said = refused("train", timeless, "--config", settings, "--out", timeless.with_name("refused"), "--quiet")
    assert "sasrec" in said
    assert "no times" in said
    assert "two-tower" in said  # what can be used instead
    assert not timeless.with_name("refused").exists()


def test_a_log_without_times_gets_the_others(timeless):
    run = timeless.with_name("run")
    settings = timeless.with_name("light.toml")
    settings.write_text(LIGHT.replace('"counts"', '"ease"'))
    items = ("--items", timeless.with_name("items.csv"))
    trained = succeeds("train", timeless, *items, "--config", settings, "--out", run, "--quiet", "--json").json
    assert "no clock" in trained["split"]["note"]
    report = succeeds("evaluate", run, "--json").json
    assert report["protocol"].startswith("last-group split")
    assert succeeds("recommend", run, "--user", "u3", "--json").json["items"]


def test_a_log_without_times_gets_the_others_without_settings(timeless):
    run = timeless.with_name("default")
    said = succeeds("train", timeless, "--out", run, "--set", "trainer.epochs=1", "--json")
    used = {s["name"] for s in said.json["systems"]}
    assert "sasrec" not in used
    assert {"popularity", "dnn"} <= used
    assert succeeds("evaluate", run, "--json").json["num_requests"] > 10
