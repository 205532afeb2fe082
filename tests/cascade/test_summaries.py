"""Refresh: whole histories of run and event store, chunks, resumption, and what the engine makes of the files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine_support import FIRST_ITEM, NUM_USERS, prepared_cascade, shop_dataset, shop_live
from shortlist.cascade import summaries
from shortlist.cascade.engine import Engine, EngineConfig
from shortlist.cascade.live import Live
from shortlist.cascade.summaries import ALL_EVENTS, refresh, summary_path, told, whole_histories
from shortlist.errors import ConfigError
from shortlist.store import summaries as files
from shortlist.store.catalogue import CatalogueStore
from shortlist.store.events import Event, EventStore
from shortlist.store.summaries import SummaryStore

RUN = """
[surface]
k = 6
[stages.retrieval]
systems = ["counts", "popularity"]
keep = 25
[stages.ranking]
systems = ["vista"]
[systems.vista]
dim = 8
num_seeds = 3
max_history = 8
num_recent = 2
max_stale_events = 3
id_dropout = 0.0
"""


@pytest.fixture
def live(tmp_path):
    """The shop with a ranker that has not learnt anything, as if read from tmp_path/run."""
    dataset = shop_dataset()
    torch.manual_seed(0)
    return Live(dataset, prepared_cascade(dataset, RUN), "version-1", tmp_path / "run")


@pytest.fixture
def store(tmp_path):
    with_all = EventStore(tmp_path / "events.db", max_per_user=ALL_EVENTS)
    yield with_all
    with_all.close()


def vista(live):
    return live.cascade.systems["vista"]


def opened(live):
    return SummaryStore.open(summary_path(live.folder, "vista"), version=live.version)


def happened(user, items, at=1_900_000_000):
    return [
        Event(user=user, item=str(FIRST_ITEM + i), timestamp=float(at + 60 * n), action="view")
        for n, i in enumerate(items)
    ]


def test_every_user_s_whole_history_is_summarised(live):
    (done,) = refresh(live, live.folder)
    assert (done.num_users, done.num_resumed, done.num_events) == (NUM_USERS, 0, live.dataset.histories.num_events)
    assert done.bytes_per_user == opened(live).head.bytes_per_user
    found = opened(live).get([f"user-{i}" for i in range(NUM_USERS)])
    rows = live.users([f"user-{i}" for i in range(NUM_USERS)])
    lengths = np.diff(live.dataset.histories.offsets)[rows]
    assert [int(memory["num_events"]) for memory in found] == lengths.tolist()
    assert max(lengths) > vista(live).max_history
    batch = whole_histories(live, ["user-7"], live.users(["user-7"]), None)
    alone = vista(live).summaries(batch)
    torch.testing.assert_close(found[7]["code"].int(), alone.code[0].int(), rtol=0, atol=1)
    assert int(found[7]["time"]) == int(batch.history.time[-1])


def test_events_of_the_store_are_part_of_it_also_of_strangers(live, store):
    store.append(happened("user-7", [1, 2, 3]) + happened("stranger", [4] * 1_200))
    (done,) = refresh(live, live.folder, events=store)
    assert done.num_users == NUM_USERS + 1
    seven, stranger = opened(live).get(["user-7", "stranger"])
    own = np.diff(live.dataset.histories.offsets)[live.users(["user-7"])][0]
    assert int(seven["num_events"]) == own + 3
    assert int(seven["time"]) == 1_900_000_120
    assert int(stranger["num_events"]) == 1_200


@pytest.mark.parametrize("at_once", [1, 40, 10**6])
def test_chunks_do_not_matter(live, monkeypatch, at_once):
    refresh(live, live.folder)
    one = opened(live).get(["user-3", "user-30"])
    monkeypatch.setattr(summaries, "EVENTS_AT_ONCE", at_once)
    chunks = []
    refresh(live, live.folder, fresh=True, tell=chunks.append)
    assert len(chunks) == {1: NUM_USERS, 10**6: 1}.get(at_once, len(chunks))
    assert chunks[-1].num_users == NUM_USERS
    for a, b in zip(one, opened(live).get(["user-3", "user-30"])):
        torch.testing.assert_close(a["code"].int(), b["code"].int(), rtol=0, atol=1)
        torch.testing.assert_close(a["scale"], b["scale"], rtol=1e-4, atol=1e-6)


def test_a_stopped_refresh_goes_on_also_when_events_came_in_meanwhile(live, store, monkeypatch):
    monkeypatch.setattr(summaries, "EVENTS_AT_ONCE", 60)
    told_of = []

    def stop(done):
        told_of.append(done)
        if len(told_of) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refresh(live, live.folder, events=store, tell=stop)
    assert not summary_path(live.folder, "vista").exists()
    store.append(happened("stranger", [1]))
    (done,) = refresh(live, live.folder, events=store)
    assert done.num_resumed == told_of[-1].num_users
    assert done.num_users == NUM_USERS + 1 == len(opened(live))
    assert f"{done.num_resumed} were there already" in told([done])[0]


def test_a_run_without_such_a_system_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no system of .* reads summaries"):
        refresh(shop_live(), tmp_path / "run")


def test_the_engine_reads_summaries_and_does_not_encode(live):
    refresh(live, live.folder)
    vista(live).encoder.stream = None  # whoever encodes fails, and the answer would say so
    for bound in (0, 256):
        with Engine(live, config=EngineConfig(memory_mib=bound)) as engine:
            answer = engine.recommend("user-7")
            assert answer.degraded is None
            assert live.cascade.memories.status().num_read == 1
            assert "vista failed" in engine.recommend("stranger").degraded


def test_what_a_request_is_said_to_cost_counts_the_encoder_only_where_it_worked(live):
    def mflop(engine):
        (stage,) = [stage for stage in engine.recommend("user-7").stages if stage.stage == "ranking"]
        return stage.spent_mflop

    with Engine(live, config=EngineConfig(memory_mib=0)) as engine:
        encoded = mflop(engine)
    refresh(live, live.folder)
    with Engine(live, config=EngineConfig(memory_mib=0)) as engine:
        kept = mflop(engine)
    assert (encoded - kept) * 1e6 == pytest.approx(vista(live).encoder.flops(8) + 8 * item_flops(live), rel=1e-6)


def item_flops(live):
    """Of one item's vector: the linear maps of its fields."""
    return sum(2 * m.weight.numel() for m in vista(live).items.modules() if isinstance(m, torch.nn.Linear))


def test_without_a_file_histories_are_encoded_and_remembered(live):
    with Engine(live) as engine:
        assert engine.recommend("user-7").degraded is None
        vista(live).encoder.stream = None
        assert engine.recommend("user-7").degraded is None
        assert live.cascade.memories.status().num_read == 0


def test_answers_say_that_their_summary_is_stale(live, tmp_path):
    refresh(live, live.folder)
    with Engine(live, events=EventStore(tmp_path / "live.db")) as engine:
        engine.record(happened("user-7", [1, 2, 3]))
        assert engine.recommend("user-7").degraded is None
        engine.record(happened("user-7", [4, 5], at=1_900_001_000))
        assert "ranking: vista read a summary that lacks more than 3 events" in engine.recommend("user-7").degraded
        assert engine.recommend("user-8").degraded is None
        many = engine.recommend_many(["user-8", "user-7"])
        assert [answer.degraded is None for answer in many] == [True, False]


def test_a_refresh_is_taken_up_by_a_running_engine(live, tmp_path, monkeypatch, store):
    monkeypatch.setattr(files, "LOOK_S", 0.0)
    refresh(live, live.folder, events=store)
    with Engine(live, events=EventStore(tmp_path / "events.db")) as engine:
        engine.record(happened("user-7", [1, 2, 3, 4, 5]))
        assert "summary" in engine.recommend("user-7").degraded
        refresh(live, live.folder, events=store)
        assert engine.recommend("user-7").degraded is None


def test_summaries_of_another_snapshot_are_passed_over_and_said(live):
    refresh(live, live.folder)
    other = Live(live.dataset, live.cascade, "version-2", live.folder)
    with Engine(other) as engine:
        answer = engine.recommend("user-7")
        assert "vista has no summaries" in answer.degraded
        assert "snapshot version-1, this is version-2" in answer.degraded
        assert len(answer.items) == 6
        assert other.cascade.memories.backings == {}


def test_a_damaged_file_is_said_and_does_not_stop_the_engine(live):
    refresh(live, live.folder)
    path = summary_path(live.folder, "vista")
    path.write_bytes(path.read_bytes()[:-5])
    with Engine(live) as engine:
        assert "vista has no summaries" in engine.recommend("user-7").degraded


def test_a_request_s_own_history_is_never_answered_from_a_summary(live):
    refresh(live, live.folder)
    with Engine(live) as engine:
        engine.recommend("user-7", history=[FIRST_ITEM + 1, FIRST_ITEM + 2])
        status = live.cascade.memories.status()
        assert (status.num_hits, status.num_misses) == (0, 0)


def test_summaries_of_long_and_short_users_do_not_depend_on_their_company(live):
    users = [f"user-{i}" for i in range(10)]
    together = vista(live).summaries(whole_histories(live, users, live.users(users), None))
    for place in (0, 9):
        alone = vista(live).summaries(
            whole_histories(live, users[place : place + 1], live.users(users)[place : place + 1], None)
        )
        torch.testing.assert_close(alone.code[0].int(), together.code[place].int(), rtol=0, atol=1)


def test_who_is_forgotten_has_no_summary_any_more(live, store, tmp_path):
    """Wiped from the file at once, left out of the next one, and a new person when they come back."""
    news = CatalogueStore(tmp_path / "events.db")
    refresh(live, live.folder, events=store)
    with Engine(live, catalogue=news) as engine:
        assert live.cascade.memories.get("vista", ["user-3"])[0] is not None
        done = engine.upkeep.forget_user(live, "user-3", None, None)
        assert done.num_summaries == 1
        assert live.cascade.memories.get("vista", ["user-3"]) == [None]
        assert opened(live).get(["user-3", "user-4"])[0] is None
    (again,) = refresh(live, live.folder, events=store)
    assert again.num_users == NUM_USERS - 1
    store.append(happened("user-3", [1, 2]))
    (back,) = refresh(live, live.folder, events=store)
    assert back.num_users == NUM_USERS
    assert opened(live).get(["user-3"]) == [None]
    assert int(opened(live).get([live.key("user-3")])[0]["num_events"]) == 2
