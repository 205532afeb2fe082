"""The engine: answers for the known and the unknown, events that count at once, rules, and a page whatever breaks."""

import datetime
import json
import sqlite3
import threading
import time

import numpy as np
import pytest
import torch

from engine_support import (
    DAY,
    FIRST_ITEM,
    NUM_ITEMS,
    NUM_NEW,
    after,
    break_system,
    raising,
    shop_dataset,
    shop_frames,
    shop_live,
)
from shortlist.cascade import engine as engine_module
from shortlist.cascade import knowing as knowing_module
from shortlist.cascade.engine import LAST_RESORT, Engine, EngineConfig
from shortlist.cascade.pasts import PastEvent
from shortlist.cascade.request_log import RequestLog
from shortlist.cascade.rules import Rules
from shortlist.data.batches import request_batch
from shortlist.errors import ConfigError, DataError, SnapshotError
from shortlist.store.events import Event, EventStore

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def live():
    return shop_live()


@pytest.fixture
def engine(live, tmp_path):
    with Engine(
        live, events=EventStore(tmp_path / "events.db"), request_log=RequestLog(tmp_path / "requests.db")
    ) as engine:
        yield engine


def ids(answer):
    return [item.item_id for item in answer.items]


def last_item(user: str) -> int:
    events, _ = shop_frames()
    return events.filter(events["user_id"] == user)["item_id"][-1]


# -- answers ---------------------------------------------------------------------------------------------------------


def test_a_known_user_gets_what_follows_on_the_ring(engine):
    for user in ("user-0", "user-7", "user-33"):
        answer = engine.recommend(user)
        assert ids(answer)[0] == after(last_item(user))
        assert len(set(ids(answer))) == len(ids(answer)) == 6
        assert answer.degraded is None
        assert answer.user == user
        assert answer.snapshot_version == "one"
        assert answer.chain == "a0-b0-c0"


def test_an_answer_agrees_with_the_cascade_asked_directly(engine, live):
    """The engine adds nothing to and takes nothing from what evaluation sees."""
    test = live.dataset.split.test
    users = live.dataset.user_ids.decode(test.user)
    batch = request_batch(
        live.dataset.histories,
        live.dataset.users,
        test,
        max_history=live.cascade.max_history,
        exclude_history=not live.repeats,
    )
    page = live.cascade.run(batch, k=6)
    for place in range(0, len(test), 7):
        # `at` reads events up to a moment; a held-out request sees those before its own group, one second earlier.
        answer = engine.recommend(users[place], 6, at=int(test.time[place]) - 1)
        assert answer.num_history == test.end[place] - test.start[place]
        direct = live.dataset.item_ids.decode([row for row in page.rows[place].tolist() if row])
        assert ids(answer) == direct


def test_items_carry_titles_and_scores_per_stage(engine, live):
    answer = engine.recommend("user-3", 4)
    retrieval, ranking, reranking = (stage.stage for stage in answer.stages)
    assert (retrieval, ranking, reranking) == ("retrieval", "ranking", "re-ranking")
    assert [stage.num_kept for stage in answer.stages] == [25, 15, 4]
    assert answer.stages[0].num_received == NUM_ITEMS + NUM_NEW
    for item in answer.items:
        assert item.title == f"Item number {item.item_id - FIRST_ITEM}"
        assert set(item.scores) == {"retrieval", "ranking", "re-ranking"}
        assert item.score == item.scores["re-ranking"]
    # The scores are the stage's own: ask the system that ranks for the first item alone.
    row = live.dataset.item_ids.encode([answer.items[0].item_id])
    history, one = live.dataset.requests_for(["user-3"], at=live.log_end)
    batch = request_batch(history, live.dataset.users, one, max_history=200)
    alone = live.cascade.systems["counts"].score_all(batch)[0, row[0]]
    assert answer.items[0].scores["ranking"] == pytest.approx(float(alone), rel=1e-6)


def test_an_answer_is_plain_json(engine):
    plain = json.loads(json.dumps(engine.recommend("user-5", 3).to_dict(), allow_nan=False))
    assert set(plain) >= {"request_id", "items", "stages", "chain", "snapshot_version", "degraded", "removed"}
    assert set(plain["stages"][0]) >= {"stage", "spent_ms", "spent_mflop", "num_received", "num_kept", "degraded"}


def test_many_users_at_once_get_what_each_gets_alone(live, tmp_path):
    store = EventStore(tmp_path / "events.db")
    store.append([Event(user="user-2", item="120", timestamp=time.time())])
    engine = Engine(live, events=store, config=EngineConfig(batch_size=4))
    users = ["user-1", "user-2", "nobody", None, "user-3", "user-1", "user-9"]
    for user, answer in zip(users, engine.recommend_many(users, 5)):
        alone = engine.recommend(user, 5)
        assert answer.user == user
        assert ids(answer) == ids(alone)
        assert answer.removed == alone.removed
        assert answer.at == pytest.approx(alone.at, abs=2)
    assert engine.recommend_many([]) == []
    engine.close()


# -- the unknown -----------------------------------------------------------------------------------------------------


def test_an_unknown_user_gets_the_popular_items(engine):
    stranger = engine.recommend("nobody-knows", 6)
    assert stranger.degraded is None
    assert stranger.num_history == 0
    assert ids(stranger) == ids(engine.recommend(None, 6)) == ids(engine.recommend(4711, 6))
    assert len(stranger.items) == 6


def test_a_history_in_the_request_stands_in_place_of_what_is_known(engine):
    for user in (None, "nobody-knows", "user-3"):
        answer = engine.recommend(user, history=["110", "111", 112])
        assert ids(answer)[0] == after(112)
        assert answer.num_history == 3
        assert not {110, 111, 112} & set(ids(answer))
    assert engine.recommend("user-3", history=[]).num_history == 0


def test_times_of_a_sent_history_decide_its_order(engine):
    now = time.time()
    answer = engine.recommend(None, history=[("130", now - 5), ("110", now - 500)])
    assert ids(answer)[0] == after(130)
    told = [PastEvent(item="130", timestamp=now - 5, action="buy", value=2.0), PastEvent(item="x", timestamp=now)]
    assert ids(engine.recommend(None, history=told))[0] == after(130)


def test_a_cold_item_can_be_a_candidate(engine):
    new = [FIRST_ITEM + NUM_ITEMS + n for n in range(NUM_NEW)]
    answer = engine.recommend("user-3", 5, candidates=[*new, "no such item"])
    assert set(ids(answer)) == set(new)
    assert answer.ignored == {"candidates": 1}


# -- events ----------------------------------------------------------------------------------------------------------


def test_an_event_changes_the_next_answer(engine):
    before = engine.recommend("user-3")
    told = engine.record([Event(user="user-3", item="130", timestamp=time.time(), action="buy")])
    assert (told.num_new, told.num_repeated, told.num_unknown_users, told.num_unknown_items) == (1, 0, 0, 0)
    after_it = engine.recommend("user-3")
    assert ids(after_it)[0] == after(130) != ids(before)[0]
    assert after_it.num_history == before.num_history + 1
    assert engine.history("user-3", 2)[0].item_id == 130
    assert engine.history("user-3", 2)[1].item_id == last_item("user-3")
    assert ids(engine.recommend("user-4")) == ids(engine.recommend("user-4", at=time.time()))


def test_a_new_user_becomes_known_by_events(engine):
    told = engine.record(
        [
            Event(user="fresh", item="105", timestamp=time.time() - 60),
            Event(user="fresh", item="106", timestamp=time.time()),
            Event(user="fresh", item="not in the catalogue", timestamp=time.time()),
        ]
    )
    assert (told.num_new, told.num_unknown_users, told.num_unknown_items, told.num_unknown_actions) == (3, 3, 1, 0)
    answer = engine.recommend("fresh")
    assert ids(answer)[0] == after(106)
    assert answer.num_history == 2


def test_events_sent_again_and_of_unknown_actions_are_counted(engine):
    event = Event(user="user-1", item="101", timestamp=1.7e9, action="stared-at", event_id="e1")
    told = engine.record([event, event])
    assert (told.num_new, told.num_repeated, told.num_unknown_actions) == (1, 1, 2)


def test_an_event_of_the_log_that_is_sent_again_is_not_counted_twice(engine):
    seen = engine.history("user-3", 1)[0]
    engine.record([Event(user="user-3", item=str(seen.item_id), timestamp=float(seen.timestamp))])
    assert len(engine.history("user-3", 1000)) == engine.recommend("user-3").num_history
    assert [past.timestamp for past in engine.history("user-3", 2)] != [seen.timestamp] * 2


def test_an_engine_without_a_store_refuses_events(live):
    with pytest.raises(ConfigError, match="--events PATH"):
        Engine(live).record([Event(user="u", item="100", timestamp=1.0)])


def test_at_reads_nothing_later(engine, live):
    events, _ = shop_frames()
    mine = events.filter(events["user_id"] == "user-8")
    moment = mine["timestamp"][4].timestamp()
    engine.record([Event(user="user-8", item="139", timestamp=time.time())])
    answer = engine.recommend("user-8", at=moment + 1)
    assert answer.num_history == 5
    assert ids(answer)[0] == after(mine["item_id"][4])
    assert answer.at == int(moment + 1)


def test_a_log_that_ended_long_ago_is_asked_as_of_its_end(engine, live):
    assert engine.recommend("user-3").at == live.log_end
    engine.record([Event(user="user-3", item="101", timestamp=time.time())])
    assert engine.recommend("user-3").at == pytest.approx(time.time(), abs=5)


def test_a_fresh_log_is_asked_as_of_now():
    start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=30)
    engine = Engine(shop_live(start=start))
    assert engine.recommend("user-3").at == pytest.approx(time.time(), abs=5)
    later = Engine(shop_live(start=start + datetime.timedelta(days=400)))
    answer = later.recommend("user-3")  # a log from the future is read whole
    assert answer.at > time.time() + 300 * DAY
    assert answer.num_history > 10


# -- rules -----------------------------------------------------------------------------------------------------------


def test_allow_and_deny(engine):
    allow = [100 + n for n in range(0, 40, 2)]
    answer = engine.recommend("user-3", 10, allow=[*allow, "lost"], deny=["104", 106, "gone", "away"])
    assert set(ids(answer)) <= set(allow) - {104, 106}
    assert len(answer.items) == min(10, 18 - answer.removed["seen"])
    assert answer.removed["allow"] == NUM_ITEMS + NUM_NEW - 20
    assert answer.removed["deny"] == 2
    assert answer.ignored == {"allow": 1, "deny": 2}
    assert answer.degraded is None


def test_everything_may_be_forbidden(engine):
    answer = engine.recommend("user-3", allow=[])
    assert answer.items == ()
    assert answer.removed["allow"] == NUM_ITEMS + NUM_NEW


def test_seen_items_are_dropped_or_kept_as_asked(engine, live):
    history = {past.item_id for past in engine.history("user-3", 100)}
    assert not live.repeats
    kept = engine.recommend("user-3", 43, rules=Rules(seen="keep"))
    dropped = engine.recommend("user-3", 43, rules=Rules(seen="drop"))
    assert history <= set(ids(kept))
    assert not history & set(ids(dropped))
    assert kept.removed == {}
    assert dropped.removed == {"seen": len(history)}
    assert len(dropped.items) == NUM_ITEMS + NUM_NEW - len(history)


def test_candidates_are_all_there_is_to_choose_from(engine):
    follows = after(last_item("user-3"))
    answer = engine.recommend("user-3", 10, candidates=["120", follows, 121, "121", "unknown"], deny=[120, 122])
    assert set(ids(answer)) == {follows, 121}
    assert answer.removed["deny"] == 1
    assert answer.ignored == {"deny": 0, "candidates": 1}
    assert answer.stages[0].num_received == 3
    nothing = engine.recommend("user-3", candidates=["unknown"])
    assert nothing.items == ()
    assert nothing.degraded is None


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"k": 0}, "k must be from 1 to 500, got 0"),
        ({"k": 501}, "k must be from 1 to 500"),
        ({"candidates": []}, "candidates is an empty list"),
        ({"deny": ["x"] * 100_001}, "deny has 100,001 entries"),
        ({"history": ["x"] * 10_001}, "history has 10,001 entries"),
        ({"history": ["x", ("y", 3.0)]}, "1 of 2 events have a timestamp"),
        ({"context": {"weather": "rain"}}, "'weather' is no context field"),
        ({"at": 1.7e12}, "at must be seconds"),
        ({"rules": Rules(), "deny": ["100"]}, "not both"),
        ({"allow": "100"}, "allow must be a list"),
    ],
    ids=str,
)
def test_a_wrong_question_is_refused_with_a_sentence(engine, wrong, sentence):
    with pytest.raises((ConfigError, DataError), match=sentence):
        engine.recommend("user-3", **wrong)


# -- a page whatever breaks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["counts", "popularity", "mmr"])
def test_a_broken_system_is_passed_over(system):
    live = shop_live()
    break_system(live, system, raising)
    answer = Engine(live).recommend("user-3")
    assert len(answer.items) == 6
    assert f"{system} failed (RuntimeError: out of order)" in answer.degraded
    assert any(stage.degraded for stage in answer.stages)


def test_all_systems_broken_leaves_the_popular_items():
    live = shop_live()
    for system in live.cascade.systems:
        break_system(live, system, raising)
    answer = Engine(live).recommend("nobody", 6)
    popular = live.dataset.item_ids.decode(live.cascade.popular[:6].numpy())
    assert ids(answer) == popular


def test_a_cascade_that_raises_leaves_the_popular_items_under_the_rules(tmp_path):
    live = shop_live()
    object.__setattr__(live.cascade, "run", raising)
    engine = Engine(live, request_log=RequestLog(tmp_path / "requests.db"))
    answer = engine.recommend("user-3", 6, deny=[101])
    history = {past.item_id for past in engine.history("user-3", 100)}
    ranked = [i for i in live.dataset.item_ids.decode(live.cascade.popular.numpy()) if i not in history and i != 101]
    assert ids(answer) == ranked[:6]
    assert answer.chain == LAST_RESORT
    assert answer.degraded == "the cascade failed (RuntimeError: out of order)"
    assert all(item.score is None for item in answer.items)
    few = engine.recommend("user-3", 6, candidates=[105, 106, 107])
    assert set(ids(few)) == {105, 106, 107} - history
    assert [len(a.items) for a in engine.recommend_many(["user-1", "nobody"], 4)] == [4, 4]
    assert engine.request_log.find(answer.request_id)["degraded"] == answer.degraded
    engine.close()


def test_a_stage_that_hangs_is_not_waited_for():
    live = shop_live()
    let_go = threading.Event()
    break_system(live, "mmr", lambda *_: let_go.wait(20))
    engine = Engine(live, config=EngineConfig(deadline_ms=100))
    started = time.perf_counter()
    answer = engine.recommend("user-3")
    assert time.perf_counter() - started < 2
    assert len(answer.items) == 6
    assert "mmr was late" in answer.degraded
    let_go.set()


def test_a_broken_event_store_leaves_the_history_of_the_snapshot(engine):
    with sqlite3.connect(engine.events.path) as file:
        file.execute("DROP TABLE events")
    answer = engine.recommend("user-3")
    assert ids(answer)[0] == after(last_item("user-3"))
    assert "recent events are missing" in answer.degraded
    assert "no such table" in answer.degraded


def test_an_unreadable_past_leaves_the_popular_items(monkeypatch, live):
    monkeypatch.setattr(knowing_module, "request_batch", raising)
    answer = Engine(live).recommend("user-3", 6)
    assert len(answer.items) == 6
    assert answer.degraded.startswith("the user's past could not be read")


# -- request log, threads, swap --------------------------------------------------------------------------------------


def test_an_answer_can_be_looked_up(engine):
    answer = engine.recommend("user-3", 4)
    found = engine.request_log.find(answer.request_id)
    assert found["page"] == ids(answer)
    assert found["propensity"] == 1.0
    assert [stage["name"] for stage in found["stages"]] == ["retrieval", "ranking", "re-ranking"]
    assert [len(stage["items"]) for stage in found["stages"]] == [25, 15, 4]
    assert found["stages"][2]["items"] == ids(answer)
    ranked = dict(zip(found["stages"][1]["items"], found["stages"][1]["scores"]))
    assert ranked[ids(answer)[0]] == pytest.approx(answer.items[0].scores["ranking"], rel=1e-6)
    assert engine.meter.summary().num_requests == 1


def test_threads_get_what_one_caller_gets(engine):
    expected = {user: ids(engine.recommend(user)) for user in (f"user-{n}" for n in range(16))}
    wrong = []

    def work(number):
        for user in list(expected)[number:] + list(expected)[:number]:
            if ids(engine.recommend(user)) != expected[user]:
                wrong.append(user)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_swapping_under_load_fails_no_request(engine, monkeypatch):
    lives = {"two": shop_live(1, version="two"), "three": shop_live(2, version="three")}
    monkeypatch.setattr(engine_module, "load_live", lambda folder: lives[folder.name])
    answers, failed, done = [], [], threading.Event()

    def ask():
        while not done.is_set():
            try:
                answer = engine.recommend("user-3")
            except Exception as error:
                failed.append(error)
            else:
                answers.append(answer)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for name in ["two", "three"] * 4:
        assert engine.swap(name) == name
        time.sleep(0.02)
    done.set()
    for thread in threads:
        thread.join()
    assert not failed
    assert all(answer.degraded is None and len(answer.items) == 6 for answer in answers)
    assert {answer.snapshot_version for answer in answers} >= {"two", "three"}
    assert engine.snapshot_version == "three"
    # Each answer comes whole from one snapshot.
    first = {version: ids(Engine(live).recommend("user-3"))[0] for version, live in lives.items()}
    assert all(ids(a)[0] == first[a.snapshot_version] for a in answers if a.snapshot_version in first)


def test_a_swap_to_something_else_changes_nothing(engine, tmp_path):
    with pytest.raises(SnapshotError, match="not a snapshot"):
        engine.swap(tmp_path)
    assert engine.recommend("user-3").snapshot_version == "one"


def test_config_bounds():
    for wrong in ({"max_k": 0}, {"deadline_ms": 0}, {"batch_size": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            EngineConfig(**wrong)


def test_the_shop_is_what_the_tests_think_it_is():
    dataset = shop_dataset()
    assert dataset.num_items == NUM_ITEMS + NUM_NEW
    assert set(dataset.space.actions) == {"view", "buy"}
    assert np.all(np.diff(dataset.histories.offsets)[1:] >= 12)
