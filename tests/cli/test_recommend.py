"""`shortlist recommend`: the page as text and as JSON."""

import json

import pytest
import torch

from engine_support import RUN, after, shop_dataset
from shortlist.cascade.build import train_cascade
from shortlist.cascade.config import RunConfig
from shortlist.cli import main
from shortlist.store.events import Event, EventStore


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "shop"
    train_cascade(shop_dataset(), RunConfig.from_toml(RUN), folder, progress=False)
    return folder


def output(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["recommend", *map(str, arguments)])
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


def test_the_page_with_titles_scores_and_past(run, capsys):
    code, out, _ = output(capsys, run, "--user", "user-3", "--k", 4)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "user user-3, 12 past events, the latest:"
    assert lines[1].split() == ["2024-01-12", "00:03", "114", "Item", "number", "14"]
    assert lines[12].split() == ["page", "retrieval", "ranking", "re-ranking"]
    assert lines[13].split()[:5] == ["1", "115", "Item", "number", "15"]
    assert [line.split()[0] for line in lines[13:17]] == ["1", "2", "3", "4"]
    assert any(line.startswith("retrieval    counts, popularity: 43 -> ") for line in lines)


def test_json_says_the_same(run, capsys):
    code, out, _ = output(capsys, run, "--user", "user-3", "--json")
    page = json.loads(out)
    assert code == 0
    assert len(page["items"]) == 6
    assert page["items"][0]["item_id"] == after(114)
    assert [past["item_id"] for past in page["history"]] == list(range(114, 104, -1))
    assert page["history"][0]["timestamp"] == 1_705_017_780


def test_a_history_on_the_command_line(run, capsys):
    code, out, _ = output(capsys, run, "--history", "110, 111,nowhere", "--json")
    page = json.loads(out)
    assert code == 0
    assert page["items"][0]["item_id"] == after(111)
    assert [past["item_id"] for past in page["history"]] == ["nowhere", "111", "110"]
    assert page["history"][1]["title"] == "Item number 11"
    _, out, _ = output(capsys, run, "--history", "110")
    assert out.startswith("a person without a name, 1 past events, the latest:\n    110  Item number 10\n")


def test_events_of_the_server_beside_the_run_are_read(run, capsys):
    beside = run.with_name("shop.events.db")
    store = EventStore(beside)
    store.append([Event(user="fresh", item="120", timestamp=1.75e9)])
    store.close()
    _, out, _ = output(capsys, run, "--user", "fresh", "--json")
    assert json.loads(out)["items"][0]["item_id"] == after(120)
    _, out, _ = output(capsys, run, "--user", "nobody")
    assert out.startswith("user nobody, 0 past events\n")


def test_bad_input_is_one_sentence(run, capsys):
    code, _, err = output(capsys, run, "--user", "u", "--k", 0)
    assert code == 2
    assert err == "shortlist: k must be from 1 to 500, got 0\n"
