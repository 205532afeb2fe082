"""Files of other libraries, written by hand: what is read, what the printed command does, and what is refused with file and line."""

import json
import shlex
from datetime import datetime

import polars as pl
import pytest

from cli_support import refused, succeeds
from shortlist.data.imports import import_folder, write_import
from shortlist.data.log import read
from shortlist.data.roles import Roles
from shortlist.errors import DataError

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t10\t5\t881250949\n1\t12\t3.5\t881250950\n2\t10\t1\t881250951\n"
ITEM = (
    "item_id:token\tmovie_title:token_seq\tclass:token_seq\tvector:float_seq\tprice:float\n"
    "10\tToy Story\tAnimation Comedy\t0.5 1\t\n12\tHeat\t\t1 2\t3.5\n"
)
USER = 'user_id:token\tname:token\n1\ta "b\n2\t07\n'


@pytest.fixture
def recbole(tmp_path):
    folder = tmp_path / "ml"
    folder.mkdir()
    for name, text in (("inter", INTER), ("item", ITEM), ("user", USER)):
        (folder / f"ml.{name}").write_text(text)
    return folder


def jsonl(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")


@pytest.fixture
def gorse(tmp_path):
    folder = tmp_path / "gorse"
    folder.mkdir()
    feedback = [
        {"FeedbackType": kind, "UserId": user, "ItemId": item, "Timestamp": time, "Comment": ""}
        for kind, user, item, time in (
            ("read", "ann", "b1", "2024-05-31T18:00:00Z"),
            ("star", "ann", "b2", "2024-05-31T20:00:00.5+02:00"),
            ("read", "bob", "b1", "0001-01-01T00:00:00Z"),
        )
    ]
    jsonl(folder / "feedback.jsonl", *feedback)
    jsonl(
        folder / "items.jsonl",
        {"ItemId": "b1", "IsHidden": False, "Categories": ["x", "y"], "Timestamp": "2020-01-01T00:00:00Z",
         "Labels": {"genres": ["g"], "size": 3}, "Comment": "First"},
        {"ItemId": "b2", "IsHidden": True, "Categories": [], "Timestamp": "0001-01-01T00:00:00Z", "Labels": {"deep": {"a": 1}},
         "Comment": "Second"},
    )  # fmt: skip
    jsonl(folder / "users.jsonl", {"UserId": "ann", "Labels": ["a", "b"]}, {"UserId": "bob", "Labels": None})
    return folder


@pytest.fixture
def fuxictr(tmp_path):
    folder = tmp_path / "ctr"
    folder.mkdir()
    (folder / "train.csv").write_text("clk,userid,adgroup_id,hist\n1,a,7,1^2\n0,b,8,3\n")
    (folder / "valid.csv").write_text("clk,userid,adgroup_id,hist\n1,5,9,2\n")
    (folder / "test.csv").write_text("adgroup_id,clk,userid,hist\n7,0,6,\n")
    return folder


# -- RecBole ----------------------------------------------------------------------------------------------------------


def test_atomic_files_keep_their_declared_types(recbole):
    made = import_folder("recbole", recbole)
    assert made.events.rows() == [(1, 10, 5.0, 881250949.0), (1, 12, 3.5, 881250950.0), (2, 10, 1.0, 881250951.0)]
    assert made.items.rows() == [
        (10, ["Toy", "Story"], ["Animation", "Comedy"], [0.5, 1.0], None),
        (12, ["Heat"], None, [1.0, 2.0], 3.5),
    ]
    assert made.users.rows() == [(1, 'a "b'), (2, "07")], "no quoting, and a token is text"
    assert (made.roles.user, made.roles.item, made.roles.timestamp) == ("user_id", "item_id", "timestamp")
    assert made.roles.labels == ("rating",)


def test_parts_of_a_benchmark_split_are_joined_and_named(recbole):
    (recbole / "ml.train.inter").write_text(INTER)
    (recbole / "ml.test.inter").write_text(INTER.replace("\n1\t10", "\nx1\t10"))
    made = import_folder("recbole", recbole)
    assert made.events.height == 3, "the whole file is there, so parts repeat it"
    assert len([note for note in made.notes if "left out" in note]) == 2
    (recbole / "ml.inter").unlink()
    made = import_folder("recbole", recbole)
    assert made.events["split"].to_list() == ["test"] * 3 + ["train"] * 3
    assert made.events["user_id"].to_list() == ["x1", "1", "2", "1", "1", "2"], "text in one part is text in all"
    assert "data.protocol" in made.notes[0]


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("inter", "user_id:token,item_id:token\n1,2\n", "line 1: column 'user_id:token,item_id:token'"),
        ("inter", INTER.replace("rating:float", "rating"), "line 1: column 'rating' has no type"),
        ("inter", INTER.replace("rating:float", "item_id:float"), "line 1: column 'item_id' occurs twice"),
        ("inter", INTER.replace("\t3.5\t", "\t"), "line 3 has 3 fields, the header has 4"),
        ("inter", INTER.replace("3.5", "good"), "line 3: rating 'good' is not a number"),
        ("inter", "", "the file is empty"),
        ("inter", INTER.split("\n")[0], "no events"),
        ("item", ITEM.replace("1 2", "1 two"), "line 3: vector '1 two' is not a list of numbers"),
    ],
)
def test_a_damaged_atomic_file_is_refused_by_file_and_line(recbole, name, text, wanted):
    (recbole / f"ml.{name}").write_text(text)
    with pytest.raises(DataError) as error:
        import_folder("recbole", recbole)
    assert wanted in str(error.value)
    assert str(recbole) in str(error.value)


def test_bytes_that_are_no_utf8_name_their_line(recbole):
    (recbole / "ml.user").write_bytes("user_id:token\tname:token\n1\tplain\n2\tcafé\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"ml\.user: line 3 is not UTF-8"):
        import_folder("recbole", recbole)


# -- Gorse ------------------------------------------------------------------------------------------------------------


def test_a_gorse_dump_becomes_events_with_actions_and_tables_with_labels(gorse):
    made = import_folder("gorse", gorse)
    assert made.events.select("action", "user_id", "item_id").rows() == [
        ("read", "ann", "b1"), ("star", "ann", "b2"), ("read", "bob", "b1"),
    ]  # fmt: skip
    assert made.events["timestamp"].to_list() == [
        datetime(2024, 5, 31, 18), datetime(2024, 5, 31, 18, 0, 0, 500_000), None,
    ]  # fmt: skip
    first, second = made.items.to_dicts()
    assert first == {
        "item_id": "b1", "is_hidden": False, "categories": ["x", "y"], "added_at": datetime(2020, 1, 1), "comment": "First",
        "deep": None, "genres": ["g"], "size": 3.0,
    }  # fmt: skip
    assert (second["is_hidden"], second["categories"], second["added_at"], second["deep"]) == (
        True,
        None,
        None,
        '{"a": 1}',
    )
    assert made.users.to_dicts() == [{"user_id": "ann", "labels": ["a", "b"]}, {"user_id": "bob", "labels": None}]
    assert any("1 of 3 feedbacks have no time" in note for note in made.notes)
    assert any("1 items are hidden" in note for note in made.notes)


def test_a_gorse_dump_without_times_has_no_order(gorse):
    jsonl(
        gorse / "feedback.jsonl",
        {"FeedbackType": "a", "UserId": "1", "ItemId": "2", "Timestamp": "0001-01-01T00:00:00Z"},
    )
    made = import_folder("gorse", gorse)
    assert made.events.rows() == [("a", 1, 2)]
    assert made.roles.timestamp is None
    assert any("no order" in note for note in made.notes)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ('{"FeedbackType": "a", "UserId": "1"', "line 4 is no JSON"),
        ("[1]", "line 4 is no JSON object"),
        ('{"FeedbackType": "a", "UserId": "1"}', "line 4: ItemId is missing"),
        ('{"FeedbackType": "a", "UserId": 1, "ItemId": "2"}', "line 4: UserId is missing or no text"),
        ('{"FeedbackType": "a", "UserId": "1", "ItemId": "2", "Timestamp": "soon"}', "line 4: timestamp 'soon' is no time"),
    ],
)  # fmt: skip
def test_a_damaged_dump_is_refused_by_file_and_line(gorse, line, wanted):
    with (gorse / "feedback.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError) as error:
        import_folder("gorse", gorse)
    assert wanted in str(error.value)
    assert "feedback.jsonl" in str(error.value)


# -- FuxiCTR ----------------------------------------------------------------------------------------------------------


def test_split_files_are_stacked_with_their_name_and_label(fuxictr):
    made = import_folder("fuxictr", fuxictr, Roles(item="adgroup_id"))
    assert made.events.rows() == [
        (1, "a", 7, "1^2", "train"), (0, "b", 8, "3", "train"), (1, "5", 9, "2", "valid"), (0, "6", 7, None, "test"),
    ]  # fmt: skip
    assert made.roles.labels == ("clk",)
    assert made.roles.user == "userid"
    assert made.roles.timestamp is None


def test_columns_that_do_not_tell_their_role_are_asked_for(fuxictr):
    with pytest.raises(DataError, match=r"no column looks like the item.*--item COLUMN"):
        import_folder("fuxictr", fuxictr)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("clk,userid,adgroup_id\n1,5,9\n", r"valid.csv: line 1: column 'hist' is not in all parts"),
        ("clk,userid,adgroup_id,hist\n1,5,9,2,2\n1,5,9,2\n", r"valid.csv: line 2: wrong number of fields"),
    ],
)
def test_a_damaged_part_is_refused(fuxictr, text, wanted):
    (fuxictr / "valid.csv").write_text(text)
    with pytest.raises(DataError, match=wanted):
        import_folder("fuxictr", fuxictr, Roles(item="adgroup_id"))


# -- round trips --------------------------------------------------------------------------------------------------------


def flags(command):
    """Options of the printed command by name."""
    words = shlex.split(command)
    return {words[i]: words[i + 1] for i in range(3, len(words), 2)}


@pytest.mark.parametrize("kind", ["recbole", "gorse", "fuxictr"])
def test_the_printed_flags_read_the_written_tables_back(kind, request, tmp_path):
    made = import_folder(kind, request.getfixturevalue(kind), Roles(item="adgroup_id") if kind == "fuxictr" else None)
    given = flags(write_import(made, tmp_path / "out"))
    roles = Roles(
        **{name.removeprefix("--"): value for name, value in given.items() if name not in ("--items", "--users", "--out", "--label")},
        labels=(given["--label"],) if "--label" in given else (),
    )  # fmt: skip
    log = read(
        tmp_path / "out" / "events.parquet",
        items=given.get("--items"),
        users=given.get("--users"),
        roles=roles,
        max_bad_share=0.5,
    )
    wanted = made.events.filter(pl.col("timestamp").is_not_null()) if made.roles.timestamp else made.events
    assert log.events["user_id"].to_list() == wanted[made.roles.user].to_list()
    assert log.events["item_id"].to_list() == wanted[made.roles.item].to_list()
    assert log.has_clock == bool(made.roles.timestamp)
    assert [name for name in log.roles.labels if name] == [name for name in made.roles.labels if name]
    for name in ("items", "users"):
        ours, theirs = getattr(made, name), getattr(log, name)
        assert (ours is None) == (theirs is None)
        assert ours is None or theirs.equals(ours)


def test_columns_that_training_would_take_for_a_role_are_switched_off(recbole):
    (recbole / "ml.inter").write_text(INTER.replace("rating:float", "price:float"))
    made = import_folder("recbole", recbole)
    given = flags(write_import(made, recbole.parent / "out"))
    assert given["--value"] == "", "RecBole's price is a feature, not the worth of the event"


def test_an_import_replaces_an_import_and_nothing_else(recbole, tmp_path):
    out = tmp_path / "out"
    succeeds("import", recbole, "--from", "recbole", "--out", out)
    said = succeeds("import", recbole, "--from", "recbole", "--out", out, "--json").json
    assert (said["events"], said["items"], said["users"]) == (3, 2, 2)
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("kept")
    assert "no earlier import" in refused("import", recbole, "--from", "recbole", "--out", other)
    assert (other / "mine.txt").read_text() == "kept"
    (recbole / "ml.inter").write_text("broken")
    before = sorted(path.read_bytes() for path in out.iterdir())
    assert "line 1" in refused("import", recbole, "--from", "recbole", "--out", out)
    assert sorted(path.read_bytes() for path in out.iterdir()) == before, "bad input changes nothing"


def test_an_unknown_format_or_an_absent_folder_is_refused(recbole, tmp_path):
    assert "choose from recbole, gorse, fuxictr" in refused(
        "import", recbole, "--from", "spotlight", "--out", tmp_path / "o"
    )
    assert "no such file" in refused("import", tmp_path / "absent", "--from", "gorse", "--out", tmp_path / "o")
    assert "no feedback.jsonl" in refused("import", recbole, "--from", "gorse", "--out", tmp_path / "o")
    assert "no .inter file" in refused("import", tmp_path, "--from", "recbole", "--out", tmp_path / "o")
    assert "no train.csv" in refused("import", recbole, "--from", "fuxictr", "--out", tmp_path / "o")


def test_the_printed_command_trains(tmp_path):
    """Enough events for every part of a split, through the command line as printed."""
    folder = tmp_path / "shop"
    folder.mkdir()
    lines = [f"u{e % 20}\ti{(e * 7 + e // 20) % 15}\t{1_600_000_000 + 3600 * e}" for e in range(400)]
    (folder / "shop.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n" + "\n".join(lines) + "\n")
    said = succeeds("import", folder, "--from", "recbole", "--out", tmp_path / "out", "--json").json
    words = shlex.split(said["command"])[1:-2]
    (tmp_path / "light.toml").write_text("[stages.retrieval]\nsystems = ['popularity']\nkeep = 10\n")
    succeeds(*words, "--out", tmp_path / "run", "--config", tmp_path / "light.toml", "--quiet")
    assert (tmp_path / "run").is_dir()
