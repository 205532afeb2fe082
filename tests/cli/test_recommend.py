"""`shortlist recommend`: the page as text and as JSON."""

import json
from functools import partial

import polars as pl
import pytest

from cli_support import outcome
from engine_support import after, trained_shop
from shortlist.store.events import Event, EventStore


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained_shop(tmp_path_factory.mktemp("runs") / "shop")


output = partial(outcome, "recommend")


def test_the_page_with_titles_scores_and_past(run):
    code, out, _ = output(run, "--user", "user-3", "--k", 4)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "user user-3, 12 past events, the latest:"
    assert lines[1].split() == ["2024-01-12", "00:03", "114", "Item", "number", "14"]
    assert lines[12].split() == ["page", "retrieval", "ranking", "re-ranking"]
    assert lines[13].split()[:5] == ["1", "115", "Item", "number", "15"]
    assert [line.split()[0] for line in lines[13:17]] == ["1", "2", "3", "4"]
    assert any(line.startswith("retrieval    counts, popularity: 43 -> ") for line in lines)


def test_json_says_the_same(run):
    code, out, _ = output(run, "--user", "user-3", "--json")
    page = json.loads(out)
    assert code == 0
    assert len(page["items"]) == 6
    assert page["items"][0]["item_id"] == after(114)
    assert [past["item_id"] for past in page["history"]] == list(range(114, 104, -1))
    assert page["history"][0]["timestamp"] == 1_705_017_780


def test_a_history_on_the_command_line(run):
    code, out, _ = output(run, "--history", "110, 111,nowhere", "--json")
    page = json.loads(out)
    assert code == 0
    assert page["items"][0]["item_id"] == after(111)
    assert [past["item_id"] for past in page["history"]] == ["nowhere", "111", "110"]
    assert page["history"][1]["title"] == "Item number 11"
    _, out, _ = output(run, "--history", "110")
    assert out.startswith("a person without a name, 1 past events, the latest:\n    110  Item number 10\n")


def test_events_of_the_server_beside_the_run_are_read(run):
    beside = run.with_name("shop.events.db")
    store = EventStore(beside)
    store.append([Event(user="fresh", item="120", timestamp=1.75e9)])
    store.close()
    _, out, _ = output(run, "--user", "fresh", "--json")
    assert json.loads(out)["items"][0]["item_id"] == after(120)
    _, out, _ = output(run, "--user", "nobody")
    assert out.startswith("user nobody, 0 past events\n")


def test_bad_input_is_one_sentence(run):
    code, _, err = output(run, "--user", "u", "--k", 0)
    assert code == 2
    assert err == "shortlist: k must be from 1 to 500, got 0\n"


# -- pages of many ---------------------------------------------------------------------------------------------------


def test_pages_of_many_are_those_of_each(run, tmp_path):
    (tmp_path / "users.txt").write_text("user-3\nnobody\nuser-9\n")
    out = tmp_path / "pages.parquet"
    code, told, _ = output(run, "--users", tmp_path / "users.txt", "--out", out, "--k", 4)
    assert code == 0
    assert "12 places on the pages of 3 users" in told
    assert "1 users are unknown" in told
    pages = pl.read_parquet(out)
    assert pages.columns == ["user_id", "rank", "item_id", "title", "score"]
    for user in ("user-3", "nobody", "user-9"):
        _, alone, _ = output(run, "--user", user, "--k", 4, "--json")
        mine = pages.filter(pl.col("user_id") == user).sort("rank")
        assert mine["item_id"].to_list() == [item["item_id"] for item in json.loads(alone)["items"]]
        assert mine["title"][0] == f"Item number {mine['item_id'][0] - 100}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pages.parquet", "users.txt"]


def test_rules_of_a_file_hold_for_one_and_for_many(run, tmp_path):
    toml = tmp_path / "rules.toml"
    toml.write_text(
        'deny = ["115"]\npins = [{ item = "142", position = 1 }]\nquotas = [{ field = "shelf", most = 1 }]\n'
    )
    (tmp_path / "rules.json").write_text(json.dumps({"filters": [{"field": "shelf", "equals": "shelf-2"}]}))
    _, out, _ = output(run, "--user", "user-3", "--rules", toml, "--json")
    page = json.loads(out)
    assert page["items"][0]["item_id"] == 142
    assert len(page["items"]) == 4  # one of each shelf
    assert page["removed"]["deny"] == 1
    pl.DataFrame({"user_id": ["user-1", "user-2"]}).write_csv(tmp_path / "users.csv")
    many = tmp_path / "p.parquet"
    code, told, _ = output(
        run, "--users", tmp_path / "users.csv", "--out", many, "--rules", tmp_path / "rules.json", "--json"
    )
    assert code == 0
    assert json.loads(told)["num_rows"] == 12
    assert {(item - 100) % 4 for item in pl.read_parquet(many)["item_id"]} == {2}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--users", "users.txt"], "go together"),
        (["--out", "p.parquet"], "go together"),
        (["--users", "users.txt", "--out", "p.parquet", "--user", "u"], "no effect"),
        (["--users", "users.txt", "--out", "nowhere/p.parquet"], "can not be written"),
        (["--users", "missing.txt", "--out", "p.parquet"], "not readable"),
        (["--users", "users.txt", "--out", "p.parquet", "--rules", "wrong.toml"], "no setting 'denny'"),
        (["--rules", "missing.toml"], "can not be read as rules"),
    ],
    ids=str,
)
def test_wrong_wishes_write_nothing(run, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "users.txt").write_text("user-3\n")
    (tmp_path / "wrong.toml").write_text('denny = ["1"]\n')
    code, _, err = output(run, *arguments)
    assert code == 2
    assert sentence in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["users.txt", "wrong.toml"]
