"""`shortlist search`: what a query finds, as text and as JSON, and the index made ready."""

import json
from functools import partial

import pytest

from cli_support import outcome
from engine_support import trained_shop
from shortlist.cascade import search
from text_support import KnownEncoder

pytest.importorskip("bm25s", reason="pip install 'shortlist[search]'")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained_shop(tmp_path_factory.mktemp("runs") / "shop")


output = partial(outcome, "search")


def test_a_page_of_what_matches(run):
    code, out, _ = output(run, "numbr 14", "--user", "user-3", "--k", 3)
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == "user user-3, 12 past events"
    assert lines[2].split() == ["page", "search", "retrieval", "ranking", "re-ranking", "blend"]
    assert lines[3].split()[:6] == ["1", "114", "Item", "number", "14", "1.0000"]
    assert lines[-1] == "note: 'numbr' was read as 'number'"


def test_json_and_nothing_found(run):
    code, out, _ = output(run, "xylophone", "--json")
    assert code == 0
    assert json.loads(out)["items"] == []
    assert "nothing matches" in json.loads(out)["note"]


def test_without_words_the_index_is_made_ready(run, monkeypatch):
    monkeypatch.setattr(search, "MiniLM", lambda max_tokens: KnownEncoder())
    search.MiniLM.is_installed = lambda: True
    code, out, _ = output(run)
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines()[:2]] == ["words", "vectors"]
    assert (run.with_name("shop.search") / "vectors.npy").exists()
    code, out, _ = output(run, "--json")
    assert json.loads(out)["encoder"] == "known"


def test_an_empty_query_and_no_run_are_one_sentence(run, tmp_path):
    code, _, err = output(run, " ")
    assert (code, err) == (2, "shortlist: the query is empty; give at least one word\n")
    code, _, err = output(tmp_path / "none", "mug")
    assert code == 2
    assert err.startswith("shortlist: ")
    assert err.count("\n") == 1
