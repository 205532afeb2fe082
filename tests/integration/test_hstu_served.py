"""The cascade of examples/hstu.toml, small, over planted data: trained, saved, served over HTTP, with what it remembers of users."""

from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient

from engine_support import after, shop_frames
from shortlist.cascade.build import train_cascade
from shortlist.cascade.config import RunConfig
from shortlist.cascade.engine import Engine, EngineConfig
from shortlist.data.dataset import build_dataset
from shortlist.data.log import read
from shortlist.serving.app import create_app

EXAMPLE = Path(__file__).parents[2] / "examples" / "hstu.toml"
SMALLER = (
    "surface.k=6",
    "re-ranking.keep=6",
    "ranking.keep=12",
    "pre-ranking.keep=20",
    "retrieval.keep=25",
    "trainer.epochs=6",
    "trainer.batch_size=16",
    "trainer.lr=0.01",
    "hstu.dim=16",
    "hstu-ranker.dim=16",
    "hstu-ranker.learning=both",
    "hstu-ranker.generative_epochs=8",
    "hstu-ranker.micro_batch=7",
    "hstu-ranker.layers.num_blocks=2",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of the trained run."""
    torch.set_num_threads(1)
    config = RunConfig.from_toml(EXAMPLE)
    for setting in SMALLER:
        config = config.override(setting)
    events, items = shop_frames()
    folder = tmp_path_factory.mktemp("runs") / "hstu"
    train_cascade(build_dataset(read(events, items=items), config.data_settings), config, folder, progress=False)
    return folder


@pytest.fixture
def engine(run, tmp_path):
    with Engine.load(run, events=tmp_path / "events.db") as engine:
        yield engine


@pytest.fixture
def client(engine):
    with TestClient(create_app(engine)) as client:
        yield client


def page(client, user):
    response = client.get(f"/v1/recommend/{user}")
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["degraded"] is None
    return answer


def buy(client, user, item):
    response = client.post("/v1/events", json={"user": user, "item": str(item), "action": "buy"})
    assert response.status_code == 200, response.text


def ids(answer):
    return [item["item_id"] for item in answer["items"]]


def watched(engine):
    """How many tokens the ranker's layers were given, call by call."""
    seen = []
    engine.live.cascade.systems["hstu-ranker"].stack.register_forward_pre_hook(
        lambda module, given: seen.append(len(given[0]))
    )
    return seen


def test_the_ranker_puts_what_comes_next_on_the_page(client, engine):
    """People walk along a ring of items: the next one is known."""
    events, _ = shop_frames()
    right = 0
    for user in [f"user-{n}" for n in range(20)]:
        last = events.filter(events["user_id"] == user)["item_id"][-1]
        answer = page(client, user)
        assert [stage["stage"] for stage in answer["stages"]] == ["retrieval", "pre-ranking", "ranking", "re-ranking"]
        right += after(last) in ids(answer)[:3]
    assert right >= 14


def test_a_second_request_goes_on_from_the_first(client, engine, run):
    """A new event between two requests costs its own tokens; the answers are those of an engine that remembers nothing."""
    memories, seen = engine.live.cascade.memories, watched(engine)
    first = page(client, "user-3")
    num_events = first["num_history"]
    ranker = engine.live.cascade.systems["hstu-ranker"]
    assert seen[0] == num_events
    assert memories.get("hstu-ranker", ["user-3"])[0]["item"].tolist() != []
    before = memories.status()
    buy(client, "user-3", ids(first)[0])
    seen.clear()
    second = page(client, "user-3")
    assert second["num_history"] == num_events + 1
    assert seen[0] == 2  # the newest event, and the one before it, which now looks ahead to it
    assert len(seen) == 1 + 3  # 20 candidates, 7 at a time
    status = memories.status()
    assert status.num_hits > before.num_hits
    seen.clear()
    third = page(client, "user-3")
    assert seen[0] == 1

    with Engine.load(run, events=engine.events.path, config=EngineConfig(memory_mib=0)) as fresh:
        assert fresh.live.cascade.memories is None
        anew = fresh.recommend("user-3")
    assert [item.item_id for item in anew.items] == ids(third)
    assert [item.score for item in anew.items] == pytest.approx([item["score"] for item in third["items"]], abs=1e-4)
    assert ids(second) == ids(third)
    assert ranker.remembers


def test_users_do_not_share_memories_and_strangers_have_none(client, engine):
    memories, seen = engine.live.cascade.memories, watched(engine)
    page(client, "user-4")
    held = memories.status()
    answer = page(client, "nobody-knows-me")
    assert len(ids(answer)) == 6
    assert memories.get("hstu-ranker", ["nobody-knows-me"]) == [None]
    buy(client, "nobody-knows-me", 100)
    buy(client, "nobody-knows-me", 101)
    page(client, "nobody-knows-me")
    assert memories.get("hstu-ranker", ["nobody-knows-me"]) != [None]
    assert memories.status().num_entries > held.num_entries
    seen.clear()
    page(client, "user-4")
    assert seen[0] == 1  # still there


def test_a_history_that_is_sent_is_not_remembered(client, engine):
    memories = engine.live.cascade.memories
    body = {"user": "user-5", "k": 3, "history": [{"item": "100"}, {"item": "101"}]}
    response = client.post("/v1/recommend", json=body)
    assert response.status_code == 200, response.text
    assert memories.get("hstu-ranker", ["user-5"]) == [None]
