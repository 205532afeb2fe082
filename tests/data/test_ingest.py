"""Out-of-core histories against the in-memory way, and a kill in the middle."""

import signal
import subprocess
import sys
import time
from dataclasses import fields

import numpy as np
import polars as pl
import pytest

from data_support import small_frame
from shortlist.data.encode import encode_events
from shortlist.data.histories import Histories
from shortlist.data.ingest import IngestConfig, Ingested, ingest
from shortlist.data.log import read
from shortlist.data.roles import Roles
from shortlist.errors import DataError, SnapshotError

SMALL = IngestConfig(batch_rows=37, part_rows=50)


def same_as_in_memory(made, path, roles=None):
    log = read(path, roles=roles, max_bad_share=0.5)
    plain = encode_events(log, made.items, made.users)
    for f in fields(Histories):
        ours, theirs = getattr(made.histories, f.name), getattr(plain.histories, f.name)
        assert ours.dtype == theirs.dtype, f.name
        assert np.array_equal(ours, theirs), f.name
    assert np.array_equal(made.row, plain.row)
    assert made.actions == plain.actions
    assert made.time_unit == log.time_unit
    assert made.num_bad == log.quarantined.total
    assert set(made.items.ids.to_list()) == set(log.events["item_id"].to_list())
    assert made.items.ids.dtype == log.events["item_id"].dtype
    assert made.users.ids.dtype == log.events["user_id"].dtype


def variants(seed):
    """Logs with baskets, without, with gaps in the baskets, counters for times, sub-millisecond ties, ids that are text in a CSV."""
    frame = small_frame(seed)
    whole = frame.with_columns(
        user_id=pl.col("user_id").str.slice(1).cast(pl.Int64), basket_id=pl.col("basket_id").str.slice(1).cast(pl.Int64)
    )
    yield "baskets", frame
    yield "numbers", whole
    yield "moments", whole.drop("basket_id", "value").with_columns(timestamp=pl.col("timestamp") // 40_000 * 40_000)
    yield "gaps", frame.with_columns(basket_id=pl.when(pl.col("timestamp") % 3 > 0).then("basket_id"))
    yield "counter", frame.drop("basket_id").with_columns(timestamp=pl.int_range(pl.len()) // 3)
    yield "micro", frame.drop("basket_id").with_columns(timestamp=pl.from_epoch("timestamp").dt.offset_by("0s").cast(pl.Datetime("us"))
        + pl.duration(microseconds=pl.int_range(pl.len()) % 4))  # fmt: skip
    yield "product", whole.with_columns(price=pl.col("value"), quantity=pl.col("item_id") % 3).drop("value")
    yield "odd", whole.with_columns(user_id=pl.col("user_id").cast(pl.String).replace("3", "007"))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_the_same_as_in_memory(tmp_path, seed, kind):
    for name, frame in variants(seed):
        path = tmp_path / f"{name}.{kind}"
        frame.write_parquet(path) if kind == "parquet" else frame.write_csv(path)
        made = ingest(path, tmp_path / name, config=SMALL)
        assert made.histories.num_events == frame.height
        same_as_in_memory(made, path)


def test_rows_that_can_not_be_used_are_counted_and_left_out(tmp_path):
    frame = small_frame(1).with_columns(
        item_id=pl.when(pl.int_range(pl.len()) % 11 != 0).then("item_id"),
        timestamp=pl.when(pl.int_range(pl.len()) % 13 != 0).then("timestamp"),
        value=pl.when(pl.int_range(pl.len()) % 17 == 0).then(float("inf")).otherwise("value"),
    )
    frame.write_parquet(tmp_path / "log.parquet")
    made = ingest(
        tmp_path / "log.parquet", tmp_path / "out", config=IngestConfig(batch_rows=50, part_rows=40, max_bad_share=0.5)
    )
    bad = sum(1 for i in range(frame.height) if i % 11 == 0 or i % 13 == 0 or i % 17 == 0)
    assert made.num_bad == bad
    same_as_in_memory(made, tmp_path / "log.parquet")
    with pytest.raises(DataError, match=f"{bad:,} of {frame.height:,} rows have no user"):
        ingest(tmp_path / "log.parquet", tmp_path / "out", config=SMALL)
    assert Ingested.load(tmp_path / "out").num_bad == bad, "a refused log changes nothing"
    assert not (tmp_path / "out.part").exists()


def test_one_user_may_be_larger_than_a_part(tmp_path):
    frame = pl.DataFrame(
        {
            "user_id": ["a"] * 90 + ["b"],
            "item_id": list(range(91)),
            "timestamp": list(range(1_600_000_090, 1_599_999_999, -1)),
        }
    )
    frame.write_parquet(tmp_path / "log.parquet")
    made = ingest(tmp_path / "log.parquet", tmp_path / "out", config=IngestConfig(batch_rows=7, part_rows=5))
    same_as_in_memory(made, tmp_path / "log.parquet")


def test_what_can_not_be_read_is_said(tmp_path):
    frame = small_frame(0)
    frame.write_parquet(tmp_path / "log.parquet")
    frame.write_ndjson(tmp_path / "log.jsonl")
    frame.drop("timestamp").write_parquet(tmp_path / "timeless.parquet")
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "log.parquet").read_bytes()[:-50])
    (tmp_path / "mine").mkdir()
    for source, folder, wanted in (
        ("log.jsonl", "out", "reads Parquet and CSV"), ("timeless.parquet", "out", "no column is the time"),
        ("absent.parquet", "out", "no such file"), ("torn.parquet", "out", "torn.parquet"), ("log.parquet", "mine", "no ingested log"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=wanted):
            ingest(tmp_path / source, tmp_path / folder, config=SMALL)
    with pytest.raises(DataError, match="no column 'who' for user"):
        ingest(tmp_path / "log.parquet", tmp_path / "out", roles=Roles(user="who"))
    assert not (tmp_path / "out").exists()
    made = ingest(tmp_path / "log.parquet", tmp_path / "out", config=SMALL)
    (tmp_path / "out" / "row.npy").write_bytes(b"torn")
    with pytest.raises(SnapshotError, match="ingest the log again"):
        Ingested.load(tmp_path / "out")
    assert made.histories.num_events == frame.height


def test_a_stop_between_the_two_renames_is_mended(tmp_path):
    small_frame(0).write_parquet(tmp_path / "log.parquet")
    made = ingest(tmp_path / "log.parquet", tmp_path / "out", config=SMALL)
    (tmp_path / "out").rename(tmp_path / "out.old")
    assert np.array_equal(Ingested.load(tmp_path / "out").histories.item, made.histories.item)
    assert not (tmp_path / "out.old").exists()


def test_times_in_two_forms_are_refused(tmp_path):
    frame = small_frame(0)
    mixed = frame.with_columns(
        timestamp=pl.when(pl.int_range(pl.len()) < 100).then("timestamp").otherwise(pl.col("timestamp") * 1000)
    )
    mixed.write_parquet(tmp_path / "log.parquet")
    with pytest.raises(DataError, match="times read as ms and as s"):
        ingest(tmp_path / "log.parquet", tmp_path / "out", config=IngestConfig(batch_rows=50))
    assert not (tmp_path / "out").exists()


def test_a_kill_in_the_middle_leaves_the_old_files_whole(tmp_path):
    small_frame(0).write_parquet(tmp_path / "old.parquet")
    old = ingest(tmp_path / "old.parquet", tmp_path / "out")
    before = {path: path.read_bytes() for path in sorted((tmp_path / "out").rglob("*")) if path.is_file()}
    pl.concat([small_frame(seed) for seed in range(40)]).write_parquet(tmp_path / "new.parquet")
    code = (
        "import sys; from shortlist.data.ingest import IngestConfig, ingest\n"
        "ingest(sys.argv[1], sys.argv[2], config=IngestConfig(batch_rows=5, part_rows=40))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "new.parquet"), str(tmp_path / "out")])
    try:
        deadline = time.monotonic() + 30
        while not list(tmp_path.glob("out.part/part-*.bin")) and time.monotonic() < deadline:
            time.sleep(0.002)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "out.part").exists(), "it was in the middle"
    assert {path: path.read_bytes() for path in before} == before
    assert Ingested.load(tmp_path / "out").histories.num_events == old.histories.num_events
    made = ingest(tmp_path / "new.parquet", tmp_path / "out", config=SMALL)
    same_as_in_memory(made, tmp_path / "new.parquet")
    assert not (tmp_path / "out.part").exists()
