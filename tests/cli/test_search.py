"""`shortlist search`: what a query finds, as text and as JSON, and the index made ready."""

import json

import pytest
import torch

from engine_support import RUN, shop_dataset
from shortlist.cascade import search
from shortlist.cascade.build import train_cascade
from shortlist.cascade.config import RunConfig
from shortlist.cli import main
from text_support import KnownEncoder

pytest.importorskip("bm25s", reason="pip install 'shortlist[search]'")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "shop"
    train_cascade(shop_dataset(), RunConfig.from_toml(RUN), folder, progress=False)
    return folder


def output(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["search", *map(str, arguments)])
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


def test_a_page_of_what_matches(run, capsys):
    code, out, _ = output(capsys, run, "numbr 14", "--user", "user-3", "--k", 3)
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == "user user-3, 12 past events"
    assert lines[2].split() == ["page", "search", "retrieval", "ranking", "re-ranking", "blend"]
    assert lines[3].split()[:6] == ["1", "114", "Item", "number", "14", "1.0000"]
    assert lines[-1] == "note: 'numbr' was read as 'number'"


def test_json_and_nothing_found(run, capsys):
    code, out, _ = output(capsys, run, "xylophone", "--json")
    assert code == 0
    assert json.loads(out)["items"] == []
    assert "nothing matches" in json.loads(out)["note"]


def test_without_words_the_index_is_made_ready(run, capsys, monkeypatch):
    monkeypatch.setattr(search, "MiniLM", lambda max_tokens: KnownEncoder())
    search.MiniLM.is_installed = lambda: True
    code, out, _ = output(capsys, run)
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines()[:2]] == ["words", "vectors"]
    assert (run.with_name("shop.search") / "vectors.npy").exists()
    code, out, _ = output(capsys, run, "--json")
    assert json.loads(out)["encoder"] == "known"


def test_an_empty_query_and_no_run_are_one_sentence(run, capsys, tmp_path):
    code, _, err = output(capsys, run, " ")
    assert (code, err) == (2, "shortlist: the query is empty; give at least one word\n")
    code, _, err = output(capsys, tmp_path / "none", "mug")
    assert code == 2
    assert err.startswith("shortlist: ")
    assert err.count("\n") == 1
