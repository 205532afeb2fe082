"""Bad input to every command: exit code 2, one sentence that names the thing and the remedy, no traceback, nothing half-written."""

import shutil

import pytest

from cli_support import refused, shortlist, succeeds


@pytest.fixture
def tables(shop):
    folder = shop.parents[1]
    return [folder / "events.csv", "--items", folder / "items.csv"]


@pytest.fixture(autouse=True)
def unchanged(shop, tmp_path):
    """No test here may leave anything beside what it made itself: no partial run, no temporary file."""
    before = {path: path.stat().st_mtime_ns for path in shop.parents[1].rglob("*")}
    yield
    assert {path: path.stat().st_mtime_ns for path in shop.parents[1].rglob("*")} == before
    left = [path.name for path in tmp_path.rglob("*") if path.suffix in (".tmp", ".part", ".training", ".writing")]
    assert left == []


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.csv", None, "no such file"),
        ("empty.csv", b"", "empty"),
        ("header.csv", b"user_id,item_id,timestamp\n", "no rows"),
        ("noise.csv", bytes(range(256)) * 20, "not a text table"),
        ("noise.parquet", b"PAR1 but not really", "not readable"),
        ("half.csv.gz", b"\x1f\x8b\x08\x00half", "not readable"),
        ("columns.csv", b"a,b\n1,2\n3,4\n", "--user"),
        ("times.csv", b"user_id,item_id,timestamp\n1,2,soon\n1,3,later\n", "timestamp"),
        ("rows.csv", b"user_id,item_id,timestamp\n1,2,1700000000\n,3,1700000000\n1,,1700000000\n", "missing"),
        ("short.csv", b"user_id,item_id,timestamp\n1,2,1700000000\n", "part empty"),
    ],
)
def test_unusable_logs(command, name, content, said, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    if command == "check" and name == "short.csv":
        assert "1 events" in succeeds("check", path).out  # little, but a log
        return
    more = ("--out", tmp_path / "run", "--quiet") if command == "train" else ()
    sentence = refused(command, path, *more)
    assert said in sentence
    assert name in sentence or name == "short.csv" or "rows are bad" in sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--user", "nobody"], ("nobody", "--user", "user_id")),
        (["--label", "nothing"], ("nothing", "--label")),
        (["--items", "none.csv"], ("none.csv", "no such file")),
        (["--separator", "ab"], ("separator", "'ab'")),
        (["--max-bad-share", "7"], ("max_bad_share", "7.0")),
        (["--timestamp", "item_id", "--item", "item_id"], ("item_id",)),
    ],
)
def test_wrong_options_of_a_log(options, said, tables):
    sentence = refused("check", tables[0], *options)
    for part in said:
        assert part in sentence


BAD_SETTINGS = [
    ("k = 3", ("'k'", "run")),
    ("[surface]\nk = 'ten'", ("surface.k", "'ten'", "integer")),
    ("[surface]\nkk = 3", ("'kk'", "did you mean 'k'")),
    ("[stages.retrieval]\nsystems = ['dinn']", ("'dinn'", "din")),
    ("[stages.retrieval]\nsystems = 'popularity'", ("stages.retrieval.systems", "list")),
    ("[stages.retrieval]\nsystems = []", ("at least one system",)),
    ("[stages.ranking]\nsystems = ['dnn']", ("retrievers", "'dnn'")),
    ("[stages.retrieval]\nsystems = ['popularity']\nkeep = 12\n[stages.ranking]\nsystems = ['dnn']\nkeep = 20", ("20", "12", "ranking.keep")),  # noqa: E501
    ("[stages.retrieval]\nsystems = ['popularity']\n[systems.popularity]\nwindow_days = 'x'", ("systems.popularity.window_days", "'x'")),
    ("[stages.retrieval]\nsystems = ['popularity']\n[systems.popularity]\nwindow = 3", ("'window'", "window_days")),
    ("[systems.din]\ndim = 3", ("din", "no stage")),
    ("[trainer]\nlr = -1", ("lr", "-1")),
    ("[trainer]\nepochs = 1.5", ("trainer.epochs", "1.5")),
    ("[trainer]\ndevice = 'abacus'", ("abacus", "cpu")),
    ("[data]\nprotocol = 'tim'", ("data.protocol", "'tim'", "'time'")),
    ("[data]\ntarget_actions = ['buy']", ("'buy'", "event")),
    ("[data]\ncontext = ['weather']", ("'weather'",)),
    ("[data]\nkcore = 900", ("900",)),
    ("[data]\nfit_share = 0.9\ntest_share = 0.2", ("fit_share", "1.15")),
    ("stages = 3", ("stages", "[stages]")),
    ("not toml at all", ("not TOML", "line 1")),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), BAD_SETTINGS, ids=[text.replace("\n", " ")[:40] for text, _ in BAD_SETTINGS])
def test_bad_settings(text, said, tables, tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    sentence = refused("train", *tables, "--config", path, "--out", tmp_path / "run", "--quiet")
    for part in said:
        assert part in sentence, sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "said"),
    [("x", "'='"), ("ranking.kep=3", "'keep'"), ("foo.bar=3", "'foo'"), ("surface=3", "surface"), ("surface.k=0", "at least 1")],
)  # fmt: skip
def test_bad_overrides(setting, said, tables, tmp_path):
    config = tables[0].parent / "light.toml"
    assert said in refused("train", *tables, "--config", config, "--set", setting, "--out", tmp_path / "run", "--quiet")


@pytest.mark.parametrize("where", ["a file", "someone's folder", "under a file", "no folder can be made", "the root"])
def test_places_that_can_not_be_a_run(where, tables, tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "letter").write_text("precious")
    out = {
        "a file": tmp_path / "file", "someone's folder": tmp_path / "folder", "under a file": tmp_path / "file" / "run",
        "no folder can be made": "/proc/nowhere/run", "the root": "/",
    }[where]  # fmt: skip
    sentence = refused("train", *tables, "--config", tables[0].parent / "light.toml", "--out", out, "--quiet")
    assert str(out) in sentence or "/proc/nowhere" in sentence
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "letter").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def cut(run):
    path = run / "systems" / "two-tower.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    return "two-tower.safetensors"


def flip(run):
    path = run / "systems" / "dnn.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    return "dnn.safetensors"


def lose(run):
    (run / "dataset" / "histories" / "item.npy").unlink()
    return "item.npy"


def scribble(run):
    (run / "manifest.json").write_text("{")
    return "manifest.json"


def forget(run):
    (run / "manifest.json").unlink()
    return "not a snapshot"


@pytest.mark.parametrize("damage", [cut, flip, lose, scribble, forget], ids=lambda f: f.__name__)
def test_damaged_runs_are_refused_by_every_command(damage, shop, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(shop, run)
    name = damage(run)
    for command in ("evaluate", "recommend", "compare", "serve", "explain"):
        assert name in refused(command, run), command


@pytest.mark.parametrize("command", ["evaluate", "recommend", "compare", "serve", "explain"])
def test_runs_that_are_not_there(command, tmp_path):
    assert "runs/none" in refused(command, tmp_path / "runs" / "none")
    (tmp_path / "file").write_text("x")
    assert "file" in refused(command, tmp_path / "file")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluate", "RUN", "--k", 0], ("k must be at least 1",)),
        (["evaluate", "RUN", "--max-requests", 0], ("max_requests", "at least 1")),
        (["evaluate", "RUN", "--out", "TMP"], ("folder",)),
        (["evaluate", "RUN", "--out", "/proc/nowhere/x.json"], ("/proc/nowhere",)),
        (["compare", "RUN", "nosystem"], ("'nosystem'", "shortlist systems")),
        (["compare", "RUN", "din"], ("din", "train a run")),
        (["compare", "RUN", "mmr"], ("reranker",)),
        (["compare", "RUN", "RUN"], ("twice",)),
        (["compare", "RUN", "popularity", "--reference", "x"], ("'x'", "popularity")),
        (["compare", "popularity", "ease"], ("folder of a trained run", "popularity, ease")),
        (["compare", "RUN", "TMP/other"], ("TMP/other", "not a snapshot")),
        (["recommend", "RUN", "--k", 0], ("k must be from 1",)),
        (["recommend", "RUN", "--events", "TMP/none.db"], ("none.db", "no such file")),
        (["serve", "RUN", "--port", 99999], ("port", "99999")),
        (["serve", "RUN", "--at-once", 0], ("num_workers",)),
        (["systems", "dinn"], ("'dinn'", "din")),
        (["systems", "--stage", "rank"], ("'rank'", "ranking")),
        (["systems", "--evidence", "TMP/none"], ("none",)),
        (["prove", "x", "--evidence", "TMP/none"], ("none", "--evidence")),
        (["prove", "x", "--evidence", "TMP"], ("'x'",)),
        (["check", "builtin", "--user", "x"], ("builtin", "--user")),
        (["check", "ml-1m"], ("ml-1m", "https://")),
        (["demo", "--set", "x"], ("'='",)),
    ],
    ids=lambda value: " ".join(map(str, value[:4])) if isinstance(value, list) else None,
)
def test_wrong_arguments(arguments, said, shop, tmp_path, monkeypatch):
    monkeypatch.delenv("SHORTLIST_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    places = {"RUN": str(shop), "TMP": str(tmp_path)}
    filled = [str(a).replace("TMP", places["TMP"]) if str(a) != "RUN" else places["RUN"] for a in arguments]
    sentence = refused(*filled)
    for part in said:
        assert part.replace("TMP", str(tmp_path)) in sentence


def test_a_file_that_is_no_event_store_is_not_written_over(shop, tmp_path):
    for content in (b"x", b"precious " * 1000):
        path = tmp_path / "notes.db"
        path.write_bytes(content)
        assert "can not be used as an event store" in refused("recommend", shop, "--events", path)
        assert path.read_bytes() == content


MISSPELT = (
    ["nosuch"],
    ["train"],
    ["train", "x.csv"],
    ["evaluate", "r", "--window", "later"],
    ["check", "x", "--nope"],
)


@pytest.mark.parametrize("arguments", MISSPELT, ids=" ".join)
def test_misspelt_commands_and_options(arguments):
    """Typer's own words: usage, and one line that says what is wrong."""
    ended = shortlist(*arguments)
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.startswith("Usage: shortlist")
    assert ended.err.splitlines()[-1].startswith("Error: ")
