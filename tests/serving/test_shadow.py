"""Shadow mode: another run's answers are compared by hand-checked measures, never served, and never waited for."""

import json
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from fastapi.testclient import TestClient

from engine_support import break_system, raising
from shortlist.cascade.answers import Item
from shortlist.cascade.engine import Engine
from shortlist.cascade.questions import Question
from shortlist.errors import ConfigError, SnapshotError
from shortlist.serving.app import create_app
from shortlist.serving.settings import ServerConfig
from shortlist.serving.shadow import Shadow, ShadowConfig, compare
from shortlist.store.catalogue import ItemUpdate

ALL = ShadowConfig(share=1.0, max_waiting=1_000)


@pytest.fixture
def shadow(engine, other_run, tmp_path):
    shadow = Shadow(engine, other_run, ALL, summary=tmp_path / "shadow.json")
    yield shadow
    shadow.close()


@pytest.fixture
def client(engine, shadow):
    with TestClient(create_app(engine, ServerConfig(admin=True), shadow=shadow)) as client:
        yield client


def page(answer, scores):
    """The answer with these items and scores in place of its own."""
    items = tuple(Item(item_id=name, score=score, title=None, scores={}) for name, score in scores.items())
    return replace(answer, items=items)


def test_two_pages_are_compared_as_by_hand(engine):
    answer = engine.recommend("user-3")
    one = page(answer, {"a": 4.0, "b": 3.0, "c": 1.0, "d": 0.5})
    other = page(answer, {"c": 2.0, "a": 9.0, "b": 5.0})
    found = compare(one, other)
    assert found.overlap == 3 / 4
    assert found.correlation == pytest.approx(np.corrcoef([4, 3, 1], [9, 5, 2])[0, 1])
    assert not found.same
    turned = compare(one, page(answer, {"a": -4.0, "b": -3.0, "c": -1.0, "d": -0.5}))
    assert turned.correlation == pytest.approx(-1)
    assert turned.overlap == 1
    assert turned.same


@pytest.mark.parametrize(
    "scores", [{"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 1.0, "b": None, "c": 2.0}, {}]
)
def test_where_scores_say_nothing_there_is_no_correlation(engine, scores):
    answer = engine.recommend("user-3")
    found = compare(page(answer, scores), page(answer, scores))
    assert found.correlation is None
    assert found.overlap == 1


def test_the_shadow_never_changes_an_answer(run, other_run, tmp_path):
    """The same questions with and without a shadow, over HTTP: the same pages, from the same snapshot."""

    def pages(share):
        with Engine.load(run, events=tmp_path / f"events-{share}.db") as engine:
            shadow = Shadow(engine, other_run, ShadowConfig(share=share)) if share else None
            with TestClient(create_app(engine, ServerConfig(), shadow=shadow)) as client:
                told = []
                for turn in range(3):
                    for user in range(8):
                        answer = client.get(f"/v1/recommend/user-{user}?k=5").json()
                        told.append((answer["snapshot_version"], answer["items"], answer["degraded"]))
                    client.post("/v1/events", json={"user": "user-1", "item": 110 + turn, "timestamp": 2e9 + turn})
            if shadow is not None:
                shadow.close()
                assert shadow.num_compared == 24
            return told

    assert pages(0) == pages(1.0)


def test_what_is_seen_of_the_comparisons(client, shadow, engine, tmp_path):
    for user in range(10):
        client.get(f"/v1/recommend/user-{user}")
    shadow.wait()
    expected = []
    for user in range(10):
        mine, theirs = (
            {item.item_id for item in one.recommend(f"user-{user}").items} for one in (engine, shadow.other)
        )
        expected.append(len(mine & theirs) / 6)
    told = client.get("/v1/admin/shadow").json()
    assert told["num_offered"] == told["num_compared"] == 10
    assert told["overlap"] == pytest.approx(np.mean(expected))
    assert told["served_version"] == engine.snapshot_version != told["shadow_version"]
    assert told["served_degraded"] == told["shadow_degraded"] == 0
    assert 0 < told["shadow_ms"][0] <= told["shadow_ms"][1]
    metrics = client.get("/metrics").text
    assert 'shortlist_shadow_total{outcome="compared"} 10.0' in metrics
    assert 'shortlist_shadow_newest{what="overlap"}' in metrics
    shadow.close()
    assert json.loads((tmp_path / "shadow.json").read_text()) == told


def test_a_run_beside_itself_agrees_with_itself(engine, run):
    shadow = Shadow(engine, run, ALL)
    for user in range(6):
        question = Question(user=f"user-{user}", at=1.8e9)
        shadow.offer(question, engine.answer([question])[0])
    shadow.close()
    found = shadow.summary()
    assert found.overlap == found.same == 1
    assert found.correlation == pytest.approx(1)
    assert engine.events.history(["user-1"]) is not None  # its store is still open


def test_only_a_share_is_drawn_and_the_same_one_every_time(engine, other_run):
    answer = engine.recommend("user-3")
    counts = []
    for _ in range(2):
        shadow = Shadow(engine, other_run, ShadowConfig(share=0.1, max_waiting=10_000))
        shadow.other.answer = lambda _: [answer]
        for _ in range(2_000):
            shadow.offer(Question(user="user-3"), answer)
        counts.append(shadow.num_offered)
        shadow.close()
    assert counts[0] == counts[1]
    assert 150 < counts[0] < 250  # a binomial draw's three standard deviations are 40


def test_nobody_waits_for_a_shadow_that_hangs(engine, other_run):
    """What does not fit the queue is dropped and counted; the request path takes no time."""
    shadow = Shadow(engine, other_run, ShadowConfig(share=1.0, max_waiting=3))
    go = threading.Event()
    answer = engine.recommend("user-3")

    def hang(_):
        go.wait(10)
        return [answer]

    shadow.other.answer = hang
    shadow.offer(Question(user="user-3"), answer)
    while not shadow._waiting.empty():
        time.sleep(0.001)
    began = time.perf_counter()
    for _ in range(50):
        shadow.offer(Question(user="user-3"), answer)
    assert time.perf_counter() - began < 0.5
    assert shadow.num_dropped == 47
    go.set()
    shadow.close()
    assert shadow.summary().num_compared == 4
    shadow.offer(Question(user="user-3"), answer)  # after its end nothing is taken
    assert shadow.num_offered == 51


def test_a_shadow_that_breaks_is_counted_and_nothing_else(client, shadow, engine):
    def fail(_):
        raise RuntimeError("out of order")

    shadow.other.answer = fail
    assert client.get("/v1/recommend/user-3").json()["degraded"] is None
    shadow.wait()
    assert shadow.summary().num_failed == 1
    del shadow.other.answer
    for name in shadow.other.live.cascade.systems:
        break_system(shadow.other.live, name, raising)
    assert client.get("/v1/recommend/user-3").json()["degraded"] is None
    shadow.wait()
    assert shadow.summary().shadow_degraded == 1
    assert client.post("/v1/recommend", json={"user": "user-3", "chain": "a0-b0-c0"}).status_code == 200
    assert shadow.summary().served_degraded == 0


def test_what_is_told_of_items_counts_in_the_shadow_too(engine, run):
    """An item that is off the shelves is on neither page, and the stores stay open when the shadow ends."""
    question = Question(user="user-3", k=5, at=1.8e9)
    first = engine.answer([question])[0].items[0].item_id
    shadow = Shadow(engine, run, ALL)
    engine.upkeep.store.upsert_items([ItemUpdate(item=str(first), available=False)])
    with Engine.load(run, events=engine.events.path) as fresh:
        served = fresh.answer([question])[0]
    assert first not in [item.item_id for item in served.items]
    shadow.close()
    again = Shadow(engine, run, ALL)
    again.offer(question, served)
    again.close()
    assert again.summary().same == 1
    assert [item.item for item in engine.upkeep.store.items()] == [str(first)]


def test_what_can_not_be_a_shadow_is_refused(engine, tmp_path):
    with pytest.raises(SnapshotError, match="nothing is not a snapshot"):
        Shadow(engine, tmp_path / "nothing")
    for wrong in ({"share": 0.0}, {"share": 1.5}, {"max_waiting": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ShadowConfig(**wrong)
