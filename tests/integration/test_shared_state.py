"""Servers over one state: what one keeps the other goes on from, and pages go on when the place of it is gone."""

from __future__ import annotations

import time

import pytest
import torch
from fastapi.testclient import TestClient

from engine_support import shop_live
from shortlist.cascade import upkeep
from shortlist.cascade.engine import Engine, EngineConfig
from shortlist.cli import main
from shortlist.serving.app import create_app
from shortlist.store import databases, redis_memories
from shortlist.store.catalogue import CatalogueStore
from shortlist.store.events import Event, EventStore, StoreUnavailable
from shortlist.store.shelf import ShelfConfig, open_shelf

RUN = """
[surface]
k = 6
[stages.retrieval]
systems = ["counts", "popularity"]
keep = 25
[stages.ranking]
systems = ["hstu-ranker"]
keep = 12
[systems.hstu-ranker]
dim = 8
max_history = 20
[systems.hstu-ranker.layers]
num_blocks = 1
num_heads = 1
"""


class Site:
    """A place of events and one of memories, and servers over them."""

    def __init__(self, events, memories):
        self.events, self.memories = events, memories
        self.engines = []

    def server(self, version="one", **settings):
        torch.manual_seed(0)
        shelf = open_shelf(self.memories, ShelfConfig(max_mib=2))
        events, catalogue = EventStore(self.events), CatalogueStore(self.events)
        live = shop_live(text=RUN, version=version)
        made = Engine(live, events=events, catalogue=catalogue, shelf=shelf, config=EngineConfig(**settings))
        self.engines.append(made)
        return made

    def close(self):
        for engine in self.engines:
            engine.close()
        self.engines.clear()


@pytest.fixture
def shared(postgres, redis_server):
    redis_server.empty()
    site = Site(postgres.schema(), redis_server.url())
    yield site
    site.close()


@pytest.fixture
def single(tmp_path):
    site = Site(tmp_path / "events.db", tmp_path / "memories.bin")
    yield site
    site.close()


def event(item, user="user-3"):
    return Event(user=user, item=str(item), timestamp=time.time(), action="view")


def page(answer):
    return [item.item_id for item in answer.items], torch.tensor([item.score for item in answer.items])


def assert_same_page(one, other):
    assert page(one)[0] == page(other)[0]
    torch.testing.assert_close(page(one)[1], page(other)[1], rtol=1e-4, atol=1e-5)


def without_memories():
    torch.manual_seed(0)
    return Engine(shop_live(text=RUN), config=EngineConfig(memory_mib=0))


def test_a_restarted_server_goes_on_from_the_file(single):
    first = single.server().recommend("user-3")
    assert first.degraded is None
    single.close()
    again = single.server()
    assert_same_page(again.recommend("user-3"), first)
    status = again.live.cascade.memories.status()
    assert (status.num_shelved, status.num_misses) == (1, 0)
    single.close()
    other = single.server(version="two")  # other weights: nothing of the old ones is read
    other.recommend("user-3")
    assert other.live.cascade.memories.status().num_shelved == 0


def test_two_servers_read_what_either_was_told_and_go_on_from_each_other(shared):
    first, second = shared.server(), shared.server()
    assert_same_page(first.recommend("user-3"), without_memories().recommend("user-3"))
    for number, (told, asked) in enumerate([(first, second), (second, first), (first, second)]):
        before = asked.recommend("user-3").num_history
        assert told.record([event(100 + number)]).num_new == 1
        began = time.perf_counter()
        after = asked.recommend("user-3")
        assert time.perf_counter() - began < 1.0
        assert after.num_history == before + 1
        assert after.degraded is None
        assert_same_page(after, told.recommend("user-3"))
    status = second.live.cascade.memories.status()
    assert status.num_misses == 0
    assert status.num_entries == 0  # nothing of its own that could be older
    assert status.shelf.num_entries == 1


def test_pages_go_on_without_redis_and_say_so(shared, redis_server):
    engine = shared.server()
    before = engine.recommend("user-3")
    redis_server.kill()
    try:
        began = time.perf_counter()
        for _ in range(20):
            without = engine.recommend("user-3")
            assert f"hstu-ranker went without memories: redis://127.0.0.1:{redis_server.port}" in without.degraded
        assert (time.perf_counter() - began) / 20 < 0.1
        assert_same_page(without, before)
    finally:
        redis_server.start()
    time.sleep(redis_memories.REST_S)
    engine.recommend("user-3")
    back = engine.recommend("user-3")
    assert back.degraded is None
    assert_same_page(back, before)


def test_pages_go_on_without_postgres_and_no_acknowledged_event_is_lost(shared, postgres):
    engine = shared.server()
    engine.record([event(100), event(101)])
    known = engine.recommend("user-3").num_history
    postgres.kill()
    try:
        began = time.perf_counter()
        for _ in range(20):
            without = engine.recommend("user-3")
            assert "recent events are missing" in without.degraded
            assert len(without.items) == 6
        assert (time.perf_counter() - began) / 20 < 0.1
        with pytest.raises(StoreUnavailable):
            engine.record([event(102)])
    finally:
        postgres.start()
    time.sleep(databases.REST_S)
    deadline = time.monotonic() + 5
    while (back := engine.recommend("user-3")).degraded is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert back.degraded is None
    assert back.num_history == known
    assert engine.record([event(102)]).num_new == 1


@pytest.mark.parametrize("name", ["single", "shared"])
def test_a_deleted_user_is_deleted_from_the_shelf(name, request):
    site = request.getfixturevalue(name)
    engine = site.server()
    engine.recommend("user-3")
    engine.recommend("user-4")
    engine.record([event(100)])
    assert engine.live.cascade.memories.status().shelf.num_entries == 2
    gone = engine.upkeep.forget_user(engine.live, "user-3", engine.events, None)
    assert gone.num_events == 1
    assert engine.live.cascade.memories.status().shelf.num_entries == 1
    assert engine.recommend("user-4").degraded is None


def test_what_one_process_forgets_the_others_forget(tmp_path, monkeypatch):
    """Processes that share a file of events, each with what it remembers by itself."""
    monkeypatch.setattr(upkeep, "LOOK_S", 0.0)
    engines = []
    for _ in range(2):
        torch.manual_seed(0)
        events, catalogue = EventStore(tmp_path / "e.db"), CatalogueStore(tmp_path / "e.db")
        engines.append(Engine(shop_live(text=RUN), events=events, catalogue=catalogue))
        engines[-1].recommend("user-3")
        engines[-1].recommend("user-4")
    first, second = engines
    first.upkeep.forget_user(first.live, "user-3", first.events, None)
    assert second.live.cascade.memories.status().num_entries == 2
    second.recommend("user-4")
    for engine in engines:
        assert engine.live.cascade.memories.get("hstu-ranker", ["user-3"]) == [None]
        assert engine.live.cascade.memories.get("hstu-ranker", ["user-4"]) != [None]
        engine.close()


@pytest.mark.parametrize(("name", "kind"), [("single", "file"), ("shared", "redis")])
def test_bounds_and_use_of_memory_are_in_the_metrics(name, kind, request):
    engine = request.getfixturevalue(name).server(memory_mib=3)
    with TestClient(create_app(engine)) as client:
        for _ in range(3):
            client.get("/v1/recommend/user-3")
        lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    number = {name: float(value) for name, value in lines.items()}
    assert number['shortlist_memory_limit_bytes{place="process"}'] == 3 << 20
    assert 0.99 * (2 << 20) <= number[f'shortlist_memory_limit_bytes{{place="{kind}"}}'] <= 2 << 20
    assert 1_000 < number[f'shortlist_memory_bytes{{place="{kind}"}}'] < 100_000
    assert number[f'shortlist_memory_entries{{place="{kind}"}}'] == 1
    assert number["shortlist_memories_away"] == 0
    own = {"file": "process", "redis": "redis"}[kind]
    assert number[f'shortlist_memory_lookups_total{{place="{own}"}}'] == 2
    assert number['shortlist_memory_lookups_total{place="nowhere"}'] == 1


def test_a_file_of_memories_is_for_one_process(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["serve", str(tmp_path), "--port", "0", "--workers", "2", "--memories", str(tmp_path / "m")])
    assert "a file of memories belongs to one process; with --workers give" in capsys.readouterr().err
