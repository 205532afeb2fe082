"""`shortlist ingest`, and its folder in place of a log."""

import polars as pl
import pytest

from cli_support import refused, succeeds, write_shop


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return write_shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def ingested(shop):
    named = ("--items", shop / "items.csv", "--users", shop / "users.csv")
    told = succeeds("ingest", shop / "events.csv", *named, "--out", shop / "big")
    assert "Next: shortlist check" in told.out
    assert "events; numbering their ids" in told.err
    return shop / "big"


def test_check_says_the_same_of_the_folder(shop, ingested):
    named = ("--items", shop / "items.csv", "--users", shop / "users.csv")
    plain = succeeds("check", shop / "events.csv", *named, "--json")
    assert succeeds("check", ingested, "--json").json == plain.json


def test_training_on_the_folder_ends_with_the_same_page(shop, ingested):
    settings = ("--config", shop / "counted.toml", "--quiet", "--no-report", "--json")
    named = ("--items", shop / "items.csv", "--users", shop / "users.csv")
    ours = succeeds("train", ingested, "--out", shop / "runs" / "ours", *settings).json
    theirs = succeeds("train", shop / "events.csv", *named, "--out", shop / "runs" / "theirs", *settings).json
    assert 0 < ours["validation"]["ndcg@4"] == theirs["validation"]["ndcg@4"]
    assert ours["validation"]["lost_at"] == theirs["validation"]["lost_at"]
    for name in ("dataset/histories/item.npy", "dataset/items.parquet", "dataset/test.safetensors"):
        assert (shop / "runs" / "ours" / name).read_bytes() == (shop / "runs" / "theirs" / name).read_bytes()


def test_json_counts_and_reasons(shop):
    frame = pl.read_csv(shop / "events.csv", infer_schema=False)
    late = pl.int_range(pl.len()) == 7
    frame.with_columns(timestamp=pl.when(late).then(pl.lit("soon")).otherwise("timestamp")).write_csv(shop / "torn.csv")
    told = succeeds("ingest", shop / "torn.csv", "--out", shop / "torn", "--json", "--quiet")
    assert told.err == ""
    assert told.json["events"] == frame.height - 1
    assert told.json["rejected"] == {"unparsable time": 1}
    assert pl.read_parquet(shop / "torn" / "rejected.parquet")["line"].to_list() == [9]


def test_what_does_not_fit_is_one_sentence(shop, ingested):
    events, out = shop / "events.csv", ("--out", shop / "x")
    assert "no ingested log" in refused("ingest", events, "--out", shop)
    assert "leave --quarantine out" in refused("ingest", events, *out, "--quarantine", "q.csv")
    assert "no such file" in refused("ingest", shop / "absent.csv", *out)
    assert "--items has no effect" in refused("train", ingested, "--items", shop / "items.csv", *out)
