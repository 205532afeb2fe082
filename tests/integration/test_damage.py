"""Damaged runs and dirty logs: each is refused, or its bad rows set aside, by name; no code runs, and nothing is half-written.

Three kinds of mutation. `DAMAGES` change a file of a trained run behind its manifest's back. `FORGERIES` write the manifest anew too,
so that only the content itself is left to give them away. `DIRTY` are logs as they come out of other people's systems.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from cli_support import benchmark, refused, train_shop
from shortlist.cascade.engine import Engine
from shortlist.cascade.live import load_live
from shortlist.data.datasets import load
from shortlist.data.ingest import IngestConfig, ingest
from shortlist.data.log import read
from shortlist.data.roles import Roles
from shortlist.errors import DataError, ShortlistError, SnapshotError
from shortlist.store.snapshot import MANIFEST

damage = benchmark("damage")
files = benchmark("_damage")
PICKLE, array, instead, object_array, put, raw, seal, table, tensors, text = (
    files.PICKLE, files.array, files.instead, files.object_array, files.put, files.raw, files.seal, files.table, files.tensors, files.text,
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_code_runs():
    """Whatever a test does: code in a file has left no mark."""
    yield
    assert not files.code_ran()


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Folder of a run of counting systems."""
    return train_shop(tmp_path_factory.mktemp("damage"), "counted")


@pytest.fixture
def copy(shop, tmp_path):
    """A copy that may be damaged, alone in its folder."""
    shutil.copytree(shop, tmp_path / "place" / "run")
    return tmp_path / "place" / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_bomb_would_go_off():
    """The payload of these tests does run when it is unpickled, so their silence means something."""
    for unpickle in (lambda: pickle.loads(PICKLE), lambda: np.load(io.BytesIO(object_array()), allow_pickle=True)):
        with pytest.raises(SystemExit, match="code-ran"):
            unpickle()
        assert files.code_ran()


# -- runs, damaged behind the manifest's back ------------------------------------------------------------------------


def flipped(content: bytes) -> bytes:
    place = 2 * len(content) // 3
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


FILES = (
    "manifest.json", "cascade.toml", "metrics.json", "popular.safetensors", "systems/counts.safetensors", "systems/systems.json",
    "dataset/dataset.json", "dataset/schema.toml", "dataset/histories/item.npy", "dataset/users.parquet",
)  # fmt: skip
DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "one bit": flipped,
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda _: b"",
    "longer": lambda content: content + b"\n#",
    "pickle": lambda _: PICKLE,
    "gone": lambda _: None,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_refused_by_name(copy, name, damage):
    path, made = copy / name, DAMAGES[damage]((copy / name).read_bytes())
    path.unlink() if made is None else path.write_bytes(made)
    if (name, damage) == (MANIFEST, "longer"):
        path.write_bytes(path.read_bytes().replace(b"\n#", b"}"))
    before = contents(copy)
    with pytest.raises(SnapshotError) as error:
        load_live(copy)
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)
    assert contents(copy) == before
    assert [each.name for each in copy.parent.iterdir()] == ["run"]


def test_a_damaged_run_does_not_take_the_place_of_the_one_that_is_served(shop, copy):
    (copy / "popular.safetensors").write_bytes(PICKLE)
    with Engine.load(shop) as engine:
        version, page = engine.snapshot_version, engine.recommend("u3").items
        with pytest.raises(SnapshotError, match=r"popular\.safetensors"):
            engine.swap(copy)
        assert engine.snapshot_version == version
        assert engine.recommend("u3").items == page


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/hostname"])
def test_a_manifest_can_not_point_outside_its_folder_and_be_believed(copy, name):
    """Files are read by the names that the run's own code knows, never by the manifest's; a strange entry is at most compared."""
    (copy.parent / "outside.txt").write_text("x")
    content = json.loads((copy / MANIFEST).read_text())
    content["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    (copy / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(SnapshotError, match=r"manifest\.json is damaged"):
        load_live(copy)


# -- runs whose manifest was written anew ----------------------------------------------------------------------------


FORGED = (
    ("systems/counts.safetensors", raw(PICKLE)),
    ("popular.safetensors", raw(PICKLE)),
    ("systems/known_items.safetensors", raw(PICKLE)),
    ("dataset/histories/item.npy", raw(object_array())),
    ("dataset/histories/time.npy", raw(PICKLE)),
    ("dataset/users.parquet", raw(PICKLE)),
    ("dataset/vocabularies/004_user.parquet", raw(PICKLE)),
    ("metrics.json", raw(PICKLE)),
    ("dataset/titles.parquet", raw(b"PAR1" + bytes(300) + b"PAR1")),
    ("dataset/histories/value.npy", raw(b"1,2,3")),
    ("dataset/histories/item.npy", array(lambda found: found[:-5])),
    ("dataset/histories/offsets.npy", array(lambda found: found[::-1].copy())),
    ("dataset/histories/offsets.npy", put(-1, 10**9)),
    ("dataset/dataset.json", text("[]")),
    ("dataset/dataset.json", text("{}")),
    ("dataset/schema.toml", text("")),
    ("cascade.toml", text("= =")),
    ("cascade.toml", text("")),
    ("cascade.toml", text("[nothing]\nx = 1\n")),
    ("cascade.toml", instead('"counts"', '"os.system"')),
    ("cascade.toml", instead('"counts"', '"../../etc/passwd"')),
    ("systems/systems.json", text("[]")),
    ("systems/systems.json", text("{}")),
    ("systems/systems.json", text('{"counts": 5, "popularity": 6}')),
    ("dataset/items.parquet", table(lambda found: found.head(3))),
    ("dataset/users.parquet", table(lambda found: found.head(3))),
    ("dataset/titles.parquet", table(lambda found: found.head(2))),
    ("dataset/users.parquet", table(lambda found: found.rename({found.columns[0]: "x"}))),
    ("dataset/vocabularies/000_item.parquet", table(lambda found: found.head(1))),
    ("systems/counts.safetensors", tensors(lambda _: {"x": torch.zeros(2)})),
    ("systems/counts.safetensors", tensors(lambda found: {name: t.flatten()[:2] for name, t in found.items()})),
    ("systems/counts.safetensors", tensors(lambda found: {**found, "columns": found["columns"] + 10**6})),
    ("systems/popularity.safetensors", tensors(lambda _: {})),
    ("popular.safetensors", tensors(lambda _: {"rows": torch.tensor([10**6, -4])})),
    ("popular.safetensors", tensors(lambda _: {"rows": torch.rand(5)})),
    ("popular.safetensors", tensors(lambda found: {"lines": found["rows"]})),
    ("dataset/fit.safetensors", tensors(lambda _: {"x": torch.zeros(1)})),
    ("dataset/item_fields.safetensors", tensors(lambda found: {name: t[:2] for name, t in found.items()})),
)
"""Files whose content can not be what a training wrote."""
PLAUSIBLE = (
    ("dataset/histories/item.npy", put(5, 10**6)), ("dataset/histories/item.npy", put(5, -3)), ("dataset/histories/action.npy", put(5, 99)),
    ("dataset/histories/value.npy", put(5, np.nan)), ("dataset/histories/offsets.npy", put(3, -7)),
    ("systems/popularity.safetensors", tensors(lambda found: {name: t.to(torch.bool) for name, t in found.items()})),
)  # fmt: skip
"""Files of the right form with wrong numbers, which only a full check of every number would find."""


def forge(run: Path, name: str, change: Callable[[Path], None]) -> None:
    """Change a file and write a manifest that agrees with it."""
    change(run / name)
    seal(run)


@pytest.mark.parametrize(
    ("name", "change"), FORGED, ids=[f"{n}-{Path(name).name}" for n, (name, _) in enumerate(FORGED)]
)
def test_a_forged_run_is_refused_and_runs_no_code(copy, name, change):
    forge(copy, name, change)
    before = contents(copy)
    with pytest.raises(ShortlistError) as error:
        load_live(copy)
    named = str(copy) in str(error.value) or (Path(name).name == "cascade.toml" and "cascade" in str(error.value))
    assert named, error.value
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("name", "change"), PLAUSIBLE, ids=[f"{n}-{Path(name).name}" for n, (name, _) in enumerate(PLAUSIBLE)]
)
def test_wrong_numbers_in_the_right_form_still_give_pages(copy, name, change):
    """Refused, or served: then every user gets a whole page, degraded where a system can not work."""
    forge(copy, name, change)
    try:
        engine = Engine.load(copy)
    except SnapshotError:
        return
    with engine:
        for user in ("u1", "u2", "u3", "nobody"):
            assert len({item.item_id for item in engine.recommend(user).items}) == 4


@pytest.mark.parametrize("option", ["--events", "--request-log"])
@pytest.mark.parametrize(
    "content", [PICKLE, b"SQLite format 3\0" + bytes(range(256)) * 16, b"x" * 5_000], ids=["pickle", "broken", "text"]
)
def test_files_that_are_no_stores_are_refused_and_left_alone(shop, tmp_path, option, content):
    path = tmp_path / "store.db"
    path.write_bytes(content)
    assert "store.db" in refused("serve", shop, "--port", 0, "--events", tmp_path / "e.db", option, path)
    assert path.read_bytes() == content


# -- dirty logs ------------------------------------------------------------------------------------------------------

HEADER = "user,item,timestamp,value"
ROWS = [f"u{i % 9},i{i % 7},{1_600_000_000 + 60 * i},1.5" for i in range(40)]
GOOD = ("\n".join([HEADER, *ROWS]) + "\n").encode()
BAD_LINE = 9
"""Line of the file, counted from 1 with the header, in which a row is spoilt."""


def with_cell(column: str, value: str) -> bytes:
    rows = [row.split(",") for row in ROWS]
    rows[BAD_LINE - 2][HEADER.split(",").index(column)] = value
    return "\n".join([HEADER, *(",".join(row) for row in rows)]).encode() + b"\n"


def with_line(line: str) -> bytes:
    rows = [*ROWS]
    rows[BAD_LINE - 2] = line
    return "\n".join([HEADER, *rows]).encode() + b"\n"


CELLS = {
    "missing user": ("user", ("", "  ", "null", "NaN", "\\N")),
    "missing item": ("item", ("", "  ", "null", "NaN", "\\N")),
    "missing time": ("timestamp", ("", "nan")),
    "unparsable time": ("timestamp", ("soon", "1e400", "inf", "2024-13-45", "0x10", "१२३", "1600000002 or 1=1", "true", "1.5.2")),
    "absurd time": ("timestamp", ("-5", "17", "99999999999999999", "1970")),
    "non-finite number in value": ("value", ("inf", "-inf", "1e999")),
    "value is not a number": ("value", ("cheap", "1.5.2", "--5", "0x1F", "=1+1")),
}  # fmt: skip
"""By the reason under which the row is set aside: a column and what stands there."""
LINES = {
    "u1,i1": "wrong number of fields", "u1,i1,1600000000,1,2,3": "wrong number of fields", '{"user": 1}': "wrong number of fields",
    PICKLE.hex(): "wrong number of fields", ",,,": "missing user", '"u1,i1,1600000000,1': "quote not closed", HEADER: "unparsable time",
}  # fmt: skip
SET_ASIDE = [
    *((with_cell(column, value), reason) for reason, (column, values) in CELLS.items() for value in values),
    *((with_line(line), reason) for line, reason in LINES.items()),
]


def as_reader_and_ingester(path: Path, roles: Roles | None = None):
    """What both ways to take a log in make of it: rows kept and set aside, or the refusal."""
    found = []
    for take in (
        lambda: read(path, roles=roles, quarantine=path.with_name("bad.parquet"), max_bad_share=0.2),
        lambda: ingest(path, path.with_name("out"), roles=roles, config=IngestConfig(max_bad_share=0.2)),
    ):
        try:
            log = take()
            found.append((log.events.height, dict(log.quarantined.counts)))
        except DataError as error:
            found.append(error)
    return found


@pytest.mark.parametrize(
    ("content", "reason"), SET_ASIDE, ids=[f"{n}-{reason}" for n, (_, reason) in enumerate(SET_ASIDE)]
)
def test_a_dirty_row_is_set_aside_by_name_and_the_others_are_kept(tmp_path, content, reason):
    path = tmp_path / "log.csv"
    path.write_bytes(content)
    assert as_reader_and_ingester(path, Roles(value="value")) == [(39, {reason: 1})] * 2
    for kept in (tmp_path / "bad.parquet", tmp_path / "out" / "rejected.parquet"):
        assert pl.read_parquet(kept).select("line", "reason").rows() == [(BAD_LINE, reason)]
    assert path.read_bytes() == content


def packed(suffix: str) -> bytes:
    frame, made = pl.read_csv(io.BytesIO(GOOD)), io.BytesIO()
    match suffix:
        case ".parquet":
            frame.write_parquet(made)
        case ".arrow":
            frame.write_ipc(made)
        case ".jsonl":
            frame.write_ndjson(made)
        case ".csv.gz":
            made.write(gzip.compress(GOOD, mtime=0))
    return made.getvalue()


def scratched(content: bytes, at: float) -> bytes:
    place = int(len(content) * at)
    return content[:place] + bytes(byte ^ 0xFF for byte in content[place : place + 40]) + content[place + 40 :]


REFUSED = {
    "empty": (".csv", b"", "the file is empty"),
    "header alone": (".csv", HEADER.encode() + b"\n", "the log is empty"),
    "noise": (".csv", bytes(range(256)) * 40, "not a text table"),
    "zeros": (".csv", bytes(5_000), "not a text table"),
    "a zero in a row": (".csv", GOOD.replace(b"u3", b"u\0", 1), "not a text table"),
    "utf-16": (".csv", GOOD.decode().encode("utf-16"), "not a text table"),
    "archive": (".csv", b"PK\x03\x04" + bytes(500), "not a text table"),
    "database": (".csv", b"SQLite format 3\0" + bytes(4_000), "not a text table"),
    "web page": (".csv", b"<html><body>404 not found</body></html>\n" * 4, "no column looks like the user"),
    "all rows bad": (".csv", (HEADER + "\n" + ",,,\n" * 30).encode(), "30 of 30 events rows are bad"),
    "no user": (".csv", GOOD.replace(b"user", b"a", 1), "no column looks like the user"),
    "a name twice": (".csv", GOOD.replace(b"item", b"user", 1), "no column looks like the item"),
    "one column": (".csv", b"user\nu1\nu2\n", "no column looks like the item"),
    "zip cut": (".csv.gz", packed(".csv.gz")[:-20], "is the file whole"),
    "zip of nothing": (".csv.gz", GOOD, "Not a gzipped file"),
    "zip scratched early": (".csv.gz", scratched(packed(".csv.gz"), 0.08), "log.csv.gz"),
    "zip scratched": (".csv.gz", scratched(packed(".csv.gz"), 0.5), "not readable"),
    "parquet cut": (".parquet", packed(".parquet")[:-30], "is the file whole"),
    "parquet scratched": (".parquet", scratched(packed(".parquet"), 0.2), "log.parquet"),
    "arrow cut": (".arrow", packed(".arrow")[:300], "is the file whole"),
    "pickle as csv": (".csv", PICKLE + bytes(200), "not a text table"),
    "pickle as parquet": (".parquet", PICKLE, "is the file whole"),
    "pickle as arrow": (".arrow", PICKLE, "log.arrow"),
    "pickle as json lines": (".jsonl", PICKLE, "log.jsonl"),
    "pickle by name": (".pkl", PICKLE + bytes(200), "not a text table"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_is_no_log_is_refused_by_name_and_leaves_nothing(tmp_path, kind):
    suffix, content, said = REFUSED[kind]
    path = tmp_path / f"log{suffix}"
    path.write_bytes(content)
    for outcome in as_reader_and_ingester(path):
        assert isinstance(outcome, DataError), outcome
        assert str(path) in str(outcome)
        assert said in str(outcome)
    left = {each.name for each in tmp_path.iterdir()}
    assert left <= {
        path.name,
        "bad.parquet",
        "out.rejected.parquet",
    }  # bad rows may be kept for a look; never half a log
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "broken",
    [b'{"user":"u3', b"[1,2]", b"not json", PICKLE.hex().encode(), b'{"user":' * 50_000],
    ids=lambda b: str(b[:9]),
)
def test_a_line_that_is_no_json_object_is_set_aside(tmp_path, broken):
    path = tmp_path / "log.jsonl"
    path.write_bytes(packed(".jsonl") + broken + b"\n")
    assert as_reader_and_ingester(path) == [(40, {"not a JSON object": 1})] * 2


def test_there_are_as_many_mutations_as_promised():
    assert len(FILES) * len(DAMAGES) + len(FORGED) >= 50
    assert len(SET_ASIDE) + len(REFUSED) >= 50


# -- at random: the short form of benchmarks/damage.py -----------------------------------------------------------------


@pytest.fixture(scope="module")
def artifacts(shop, tmp_path_factory):
    """The run and its log, ingested, each alone in a folder."""
    folder = tmp_path_factory.mktemp("artifacts")
    shutil.copytree(shop, folder / "run" / "run")
    ingest(shop.parents[1] / "events.csv", folder / "ingested" / "log", items=shop.parents[1] / "items.csv")

    def pages(path: Path, stores: Path):
        return damage.pages_of(path, stores, ["u1", "u2", "nobody"])

    return [
        damage.Artifact(name="run", folder=folder / "run", opened="run", changed="run", ask=pages, command=("serve",)),
        damage.Artifact(
            name="log",
            folder=folder / "ingested",
            opened="log",
            changed="log",
            ask=damage.dataset_of,
            command=("check",),
        ),
    ]


def test_random_damage_is_refused_or_harmless(artifacts, tmp_path):
    fits = [n for n in range(60) if damage.can_be(artifacts, n, seed=5)]
    ends = [damage.damage(artifacts, number, 5, tmp_path / "scratch")[0] for number in fits[:24]]
    assert not [end for end in ends if end.end == "failed"]
    assert sum(end.end == "refused" for end in ends) > 12


def test_random_dirt_is_refused_or_set_aside(tmp_path):
    events = load("builtin").events
    ends = [damage.spoil(events, number, 5, tmp_path / "scratch") for number in range(24)]
    assert not [end for end in ends if end.end == "failed"]
    assert {"refused", "set aside"} <= {end.end for end in ends}


@pytest.mark.parametrize(
    ("opens", "said"),
    [
        (lambda path, _: json.loads((path / MANIFEST).read_text())["nothing"], "KeyError"),
        (lambda path, _: (path / "left").write_text("x") if "copy" in path.parts else 1, "files changed"),
        (lambda path, _: pickle.loads(PICKLE), "code ran"),
        (lambda path, _: (_ for _ in ()).throw(DataError("something is wrong")), "without the name"),
        (lambda path, _: {"pages": str(path), "whole": True, "told": []}, "unnoticed"),
    ],
)  # fmt: skip
def test_a_reader_that_does_worse_is_found_out(artifacts, tmp_path, opens, said):
    """Of the benchmark itself: every kind of failure that it knows is told apart."""
    shutil.copytree(artifacts[0].folder, tmp_path / "copy")
    careless = replace(artifacts[0], ask=opens)
    end, told = damage.opened(careless, tmp_path / "copy", Path("run") / MANIFEST, sealed=False)
    assert end == "failed"
    assert said in told
