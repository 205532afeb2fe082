"""`shortlist explain`: the same page as `recommend`, with reasons."""

import re

import pytest

from cli_support import refused, succeeds


@pytest.fixture(scope="module")
def user(shop):
    return succeeds("recommend", shop, "--user", "u7", "--json").json


def test_json_holds_the_page_of_recommend(shop, user):
    told = succeeds("explain", shop, "--user", "u7", "--json").json
    assert [item["item_id"] for item in told["items"]] == [item["item_id"] for item in user["items"]]
    assert told["num_history"] == user["num_history"]
    assert told["near_by"] == "vectors of two-tower"
    for item in told["items"]:
        assert {found["system"] for found in item["found"]} <= {"popularity", "counts", "two-tower"}
        assert [step["stage"] for step in item["steps"]] == ["retrieval", "ranking", "re-ranking"]
        assert set(item["steps"][1]["by_system"]) == {"dnn"}
        seen = [event for event in user["history"] if event["item_id"] == item["item_id"]]
        assert item["own"]["times"] >= len(seen)
        assert bool(item["own"]["pair"].get("pair_seen")) == (item["own"]["times"] > 0)


def test_text_names_finders_stages_past_and_runners_up(shop, user):
    out = succeeds("explain", shop, "--user", "u7", "--k", 3).out
    assert out.startswith(f"user u7, {user['num_history']} past events; a page of 3 by the chain ")
    assert len(re.findall(r"^ {2}\d  i\d+ thing number \d+$", out, re.MULTILINE)) == 3
    assert len(re.findall(r"^ {5}found by  .+ at \d+ of \d+ \(", out, re.MULTILINE)) == 3
    assert (
        len(re.findall(r"^ {5}stages    retrieval \d+ of .* > ranking \d+ of 8 .* > re-ranking", out, re.MULTILINE))
        == 3
    )
    assert "\nnext, and not on the page\n" in out
    assert "dropped by re-ranking" in out
    assert re.search(r"own past  \d+ times on \d+ occasions, the last [\d.,]+ days ago", out)


def test_a_history_on_the_command_line(shop):
    told = succeeds("explain", shop, "--history", "i1, i2", "--json").json
    assert (told["user"], told["num_history"]) == (None, 2)
    assert {near["item_id"] for item in told["items"] for near in item["near"]} <= {"i1", "i2"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--k", 0), "k must be from 1 to 500, got 0"),
        (("--events", "none.db"), "none.db: no such file"),
    ],
)
def test_bad_input_is_one_sentence(shop, arguments, said):
    assert said in refused("explain", shop, *arguments)


def test_a_folder_that_is_no_run(tmp_path):
    assert "not a snapshot" in refused("explain", tmp_path)
