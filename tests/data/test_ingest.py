"""An ingested log against the same log read at once, whatever kind of file it was, and a kill in the middle."""

import gzip
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from data_support import small_frame
from shortlist.data.check import check
from shortlist.data.dataset import DataConfig, build_dataset
from shortlist.data.ingest import IngestConfig, ingest
from shortlist.data.ingested import Ingested, open_log
from shortlist.data.log import read
from shortlist.data.manifest import write_manifest
from shortlist.data.roles import Roles
from shortlist.errors import DataError, SnapshotError

SMALL = IngestConfig(block_bytes=1500, batch_rows=37, part_rows=50, max_bad_share=0.5)


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def same_as_read(made: Ingested, path, **options):
    """All that `read` would have given, and byte for byte the data set that comes of it."""
    log = read(path, max_bad_share=0.5, **options)
    mine = made.in_memory()
    assert_frame_equal(mine.events, log.events)
    for ours, theirs in ((mine.items, log.items), (mine.users, log.users)):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            assert_frame_equal(ours, theirs)
    assert (made.roles, made.time_unit, made.has_time, made.has_clock) == (
        log.roles, log.time_unit, log.has_time, log.has_clock,
    )  # fmt: skip
    assert made.notes == log.notes
    assert dict(made.quarantined.counts) == dict(log.quarantined.counts)
    if log.quarantined.total:
        assert_frame_equal(made.quarantined.rows, log.quarantined.rows)
        assert_frame_equal(pl.read_parquet(made.folder / "rejected.parquet"), log.quarantined.rows)
    assert replace(check(made), source="") == replace(check(log), source="")
    build_dataset(made).save(made.folder / "ours")
    build_dataset(log).save(made.folder / "theirs")
    assert files_of(made.folder / "ours") == files_of(made.folder / "theirs")
    return log


def variants(seed):
    """Logs with baskets, without, with gaps in the baskets, counters for times or none, sub-millisecond ties, ids like 007."""
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
    yield "timeless", frame.drop("timestamp", "basket_id")
    yield "timeless-baskets", frame.drop("timestamp")
    yield "fields", frame.with_columns(
        colour=(pl.col("item_id") % 3).cast(pl.String), device=pl.int_range(pl.len()) % 4,
        click=(pl.int_range(pl.len()) % 5 > 0).cast(pl.Int64), mark=pl.when(pl.int_range(pl.len()) % 2 > 0).then(pl.lit("a, \"b\"\nc")),
    )  # fmt: skip


def write(frame, kind, folder, name):
    path = folder / f"{name}.{kind}"
    if kind == "csv":
        frame.write_csv(path)
    elif kind == "csv.gz":
        path.write_bytes(gzip.compress(frame.write_csv(separator="\t").encode()))
    elif kind == "jsonl":
        frame.write_ndjson(path)
    elif kind == "folder":
        path.mkdir()
        frame[:100].write_parquet(path / "1.parquet")
        frame[100:].write_parquet(path / "2.parquet")
    else:
        frame.write_parquet(path)
    return path


@pytest.mark.parametrize(
    ("kind", "seed"), [("parquet", 0), ("parquet", 1), ("csv", 0), ("csv.gz", 1), ("jsonl", 2), ("folder", 3)]
)
def test_the_same_as_read_at_once(tmp_path, kind, seed):
    for name, frame in variants(seed):
        path = write(frame, kind, tmp_path, name)
        made = ingest(path, tmp_path / f"{name}-out", config=SMALL)
        assert made.events.height == frame.height
        same_as_read(made, path)


def test_with_tables_whose_ids_are_of_another_type(tmp_path):
    """Items without events get rows; text "103" in the table is the number 103, and "x" makes text of all."""
    path = write(small_frame(4), "csv", tmp_path, "log")
    users = pl.DataFrame({"user_id": [f"u{n}" for n in range(20)], "country": [f"c{n % 3}" for n in range(20)]})
    for extra in (["150"], ["150", "x"]):
        names = [str(n) for n in range(100, 112)] + extra
        items = pl.DataFrame({"item_id": names, "title": [f"thing {n}" for n in names]})
        made = ingest(path, tmp_path / f"out{len(extra)}", items=items, users=users, config=SMALL)
        same_as_read(made, path, items=items, users=users)
        assert len(made.item_ids) == 12 + len(extra)


def test_other_settings_than_those_of_the_folder(tmp_path):
    """A k-core, another seed or published groups need the whole log, and get it."""
    path = write(small_frame(5), "parquet", tmp_path, "log")
    made, log = ingest(path, tmp_path / "out", config=SMALL), read(path)
    for name, config in (
        ("kcore", DataConfig(kcore=12)), ("seed", DataConfig(seed=3)), ("last", DataConfig(protocol="leave-last-out-as-published")),
        ("user", DataConfig(protocol="user")),
    ):  # fmt: skip
        build_dataset(made, config).save(tmp_path / f"{name}-ours")
        build_dataset(log, config).save(tmp_path / f"{name}-theirs")
        assert files_of(tmp_path / f"{name}-ours") == files_of(tmp_path / f"{name}-theirs")
    assert_frame_equal(open_log(tmp_path / "out", kcore=12).events, read(path, kcore=12).events)


def test_bad_rows_are_kept_aside_with_their_reasons(tmp_path):
    frame = small_frame(1).with_columns(
        item_id=pl.when(pl.int_range(pl.len()) % 11 != 0).then("item_id"),
        timestamp=pl.when(pl.int_range(pl.len()) % 13 != 0).then("timestamp"),
        value=pl.when(pl.int_range(pl.len()) % 17 == 0).then(float("inf")).otherwise("value"),
    )
    path = write(frame, "parquet", tmp_path, "log")
    made = ingest(path, tmp_path / "out", config=SMALL)
    same_as_read(made, path)
    assert made.quarantined.total == sum(1 for i in range(frame.height) if i % 11 == 0 or i % 13 == 0 or i % 17 == 0)
    with pytest.raises(DataError, match=r"(?s)events rows are bad.*out\.rejected\.parquet"):
        ingest(path, tmp_path / "out", config=replace(SMALL, max_bad_share=0.01))
    assert pl.read_parquet(tmp_path / "out.rejected.parquet").height == made.quarantined.total
    assert Ingested.load(tmp_path / "out").quarantined.total == made.quarantined.total, "a refused log changes nothing"
    assert not (tmp_path / "out.part").exists()
    ingest(path, tmp_path / "out", config=SMALL)
    assert not (tmp_path / "out.rejected.parquet").exists(), "a later success leaves nothing of the refusal"


def test_broken_lines_keep_their_numbers_across_blocks(tmp_path):
    lines = small_frame(6).write_csv().splitlines()
    for at in (5, 90, 180):
        lines[at] += ",too much"
    lines.insert(120, "")
    path = tmp_path / "log.csv"
    path.write_text("\n".join(lines) + "\n")
    made = ingest(path, tmp_path / "out", config=SMALL)
    same_as_read(made, path)
    assert made.quarantined.rows["line"].to_list() == [6, 91, 182]
    path = tmp_path / "log.jsonl"
    rows = small_frame(6).write_ndjson().splitlines()
    rows[150] = '{"user_id": '
    path.write_text("\n".join(rows))
    made = ingest(path, tmp_path / "json", config=SMALL)
    same_as_read(made, path)
    assert made.quarantined.rows["line"].to_list() == [151]


def test_text_in_other_layouts(tmp_path):
    """No header and "::"; semicolons with decimal commas, whole numbers only in the first blocks."""
    frame = small_frame(7)
    columns = ("user_id", "item_id", "value", "timestamp")
    ratings = frame.select(pl.col(columns).cast(pl.String).str.strip_prefix("u"))
    (tmp_path / "ratings.dat").write_text("\n".join("::".join(row) for row in ratings.rows()))
    same_as_read(ingest(tmp_path / "ratings.dat", tmp_path / "dat", config=SMALL), tmp_path / "ratings.dat")
    worth = (
        pl.when(pl.int_range(pl.len()) < 150)
        .then(pl.col("value").cast(pl.Int64).cast(pl.String))
        .otherwise(pl.lit("3,75"))
    )
    frame.with_columns(value=worth).write_csv(tmp_path / "log.csv", separator=";")
    made = ingest(tmp_path / "log.csv", tmp_path / "out", config=SMALL)
    assert same_as_read(made, tmp_path / "log.csv").events["value"].dtype == pl.Float64


def test_a_column_that_turns_into_text_late(tmp_path):
    frame = small_frame(8).with_columns(
        shelf=pl.when(pl.int_range(pl.len()) < 150).then(pl.lit("12")).otherwise(pl.lit("top"))
    )
    path = write(frame, "csv", tmp_path, "log")
    made = ingest(path, tmp_path / "out", config=SMALL)
    assert made.events["shelf"].to_list() == read(path).events["shelf"].to_list() == frame["shelf"].to_list()
    assert "column 'shelf' holds numbers in one part" in made.notes[0]


def test_one_user_may_be_larger_than_a_part(tmp_path):
    at = list(range(1_600_000_090, 1_599_999_999, -1))
    frame = pl.DataFrame({"user_id": ["a"] * 90 + ["b"], "item_id": list(range(91)), "timestamp": at})
    path = write(frame, "parquet", tmp_path, "log")
    made = ingest(path, tmp_path / "out", config=replace(SMALL, batch_rows=7, part_rows=5))
    user_a = int(made.user_ids.encode(["a"])[0])
    a, b = made.histories.offsets[user_a : user_a + 2]
    assert made.item_ids.decode(made.histories.item[a:b]) == list(range(89, -1, -1))


def test_what_can_not_be_read_is_said(tmp_path):
    frame = small_frame(0)
    path = write(frame, "parquet", tmp_path, "log")
    (tmp_path / "array.json").write_text(frame.write_json())
    (tmp_path / "torn.parquet").write_bytes(path.read_bytes()[:-50])
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "mine").mkdir()
    for source, folder, wanted in (
        ("array.json", "out", "one object per line"), ("absent.parquet", "out", "no such file"), ("torn.parquet", "out", "torn.parquet"),
        ("empty.csv", "out", "empty"), ("log.parquet", "mine", "no ingested log"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=wanted):
            ingest(tmp_path / source, tmp_path / folder, config=SMALL)
    with pytest.raises(DataError, match="no column 'who' for user"):
        ingest(path, tmp_path / "out", roles=Roles(user="who"))
    assert not (tmp_path / "out").exists()


def test_a_damaged_folder_is_refused_by_name(tmp_path):
    path = write(small_frame(0), "parquet", tmp_path, "log")
    for name in ("row.npy", "events/000002.parquet", "ingest.json", "item_ids.parquet", "histories/item.npy"):
        ingest(path, tmp_path / "out", config=SMALL)
        (tmp_path / "out" / name).write_bytes(b"torn")
        with pytest.raises(SnapshotError, match="damaged"):
            _ = Ingested.load(tmp_path / "out").in_memory()


@pytest.fixture(scope="module")
def laid_down(tmp_path_factory):
    """An ingested log with both tables, to be copied."""
    folder, frame = tmp_path_factory.mktemp("ingested"), small_frame(0)
    tables = {name: frame.select(f"{name}_id").unique() for name in ("user", "item")}
    options = {f"{name}s": write(table, "parquet", folder, name) for name, table in tables.items()}
    ingest(write(frame, "parquet", folder, "log"), folder / "out", config=SMALL, **options)
    return folder / "out"


def test_one_bit_in_any_file_is_refused_by_name(laid_down, tmp_path):
    paths = [path for path in laid_down.rglob("*") if path.is_file()]
    assert len(paths) > 12
    for path in paths:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        copy = tmp_path / path.name
        shutil.copytree(laid_down, copy)
        (copy / path.relative_to(laid_down)).write_bytes(content)
        with pytest.raises(SnapshotError, match=re.escape(path.name)):
            open_log(copy)


FORGED = {
    "row.npy": lambda found: found + 1,
    "group_id.npy": lambda found: found.astype(np.float32),
    "histories/item.npy": lambda found: np.where(found == 1, 10**6, found),
    "histories/action.npy": lambda found: found[:-1],
    "histories/offsets.npy": lambda found: found[::-1].copy(),
    "histories/value.npy": lambda found: found.astype("U5"),
    "events/000000.parquet": lambda found: found.head(1),
    "events/000001.parquet": lambda found: found.rename({"item_id": "x"}),
    "items.parquet": lambda found: found.with_columns(item_id=pl.lit([1])),
    "users.parquet": lambda found: found.rename({"user_id": "x"}),
}


@pytest.mark.parametrize("name", FORGED)
def test_files_that_do_not_fit_each_other_are_refused(laid_down, tmp_path, name):
    """The manifest was written anew, so only the content can tell."""
    copy = tmp_path / "out"
    shutil.copytree(laid_down, copy)
    path = copy / name
    if path.suffix == ".npy":
        np.save(path, FORGED[name](np.load(path)))
    else:
        FORGED[name](pl.read_parquet(path)).write_parquet(path)
    write_manifest(copy)
    with pytest.raises(SnapshotError, match="events" if path.parent.name == "events" else path.stem):
        _ = open_log(copy).in_memory()


def test_an_ingested_log_is_opened_as_it_is(tmp_path):
    path = write(small_frame(0), "parquet", tmp_path, "log")
    ingest(path, tmp_path / "out", config=SMALL)
    assert isinstance(open_log(tmp_path / "out", roles=Roles(user="user_id")), Ingested)
    assert not isinstance(open_log(path), Ingested)
    with pytest.raises(DataError, match="--items has no effect"):
        open_log(tmp_path / "out", items=tmp_path / "items.csv")
    with pytest.raises(
        DataError, match=r"with item_id as item, now action is wanted; ingest the log again with `--item action`"
    ):
        open_log(tmp_path / "out", roles=Roles(item="action"))
    with pytest.raises(DataError, match="is an ingested log, no table"):
        read(tmp_path / "out")
    with pytest.raises(DataError, match="an ingested log already"):
        ingest(tmp_path / "out", tmp_path / "again")


def test_a_stop_between_the_two_renames_is_mended(tmp_path):
    path = write(small_frame(0), "parquet", tmp_path, "log")
    made = ingest(path, tmp_path / "out", config=SMALL)
    (tmp_path / "out").rename(tmp_path / "out.old")
    again = open_log(tmp_path / "out")
    assert np.array_equal(again.histories.item, made.histories.item)
    assert not (tmp_path / "out.old").exists()


def test_times_in_two_forms_are_refused(tmp_path):
    mixed = small_frame(0).with_columns(
        timestamp=pl.when(pl.int_range(pl.len()) < 100).then("timestamp").otherwise(pl.col("timestamp") * 1000)
    )
    path = write(mixed, "parquet", tmp_path, "log")
    with pytest.raises(DataError, match="times read as ms and as s"):
        ingest(path, tmp_path / "out", config=replace(SMALL, batch_rows=50))
    assert not (tmp_path / "out").exists()


def test_a_kill_in_the_middle_leaves_the_old_files_whole(tmp_path):
    old = ingest(write(small_frame(0), "parquet", tmp_path, "old"), tmp_path / "out")
    before = files_of(tmp_path / "out")
    new = write(pl.concat([small_frame(seed) for seed in range(40)]), "parquet", tmp_path, "new")
    code = (
        "import sys; from shortlist.data.ingest import IngestConfig, ingest\n"
        "ingest(sys.argv[1], sys.argv[2], config=IngestConfig(batch_rows=100, part_rows=20))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(new), str(tmp_path / "out")])
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
    assert files_of(tmp_path / "out") == before
    assert Ingested.load(tmp_path / "out").histories.num_events == old.histories.num_events
    same_as_read(ingest(new, tmp_path / "out", config=replace(SMALL, batch_rows=999, part_rows=999)), new)
    assert not (tmp_path / "out.part").exists()
