"""Whatever breaks, a page comes: every stage, the event store, the index, one after the other, through HTTP.

Each fault is put into one part of a run of four stages with a system each, so that what the answer says can be told in advance.
"""

import asyncio
import functools
import shutil
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fastapi.testclient import TestClient

from engine_support import break_system, prepared_cascade, raising, shop_dataset, shop_frames, trained_shop
from shortlist.cascade import indexing
from shortlist.cascade.engine import Engine
from shortlist.cascade.last_resort import LAST_RESORT
from shortlist.cascade.live import Live
from shortlist.cascade.questions import Question
from shortlist.cascade.watch import MOST_LEFT
from shortlist.errors import SnapshotError
from shortlist.models.base import Retrieved
from shortlist.serving import batching
from shortlist.serving.app import create_app
from shortlist.serving.batching import Batcher, Late
from shortlist.serving.settings import ServerConfig
from shortlist.store.events import EventStore

torch.set_num_threads(1)
RUN = """
[surface]
k = 6
[stages.retrieval]
systems = ["popularity"]
keep = 25
[stages.pre-ranking]
systems = ["personal-frequency"]
keep = 15
[stages.ranking]
systems = ["counts"]
keep = 10
[stages.re-ranking]
systems = ["mmr"]
"""
STAGES = {
    "retrieval": "popularity",
    "pre-ranking": "personal-frequency",
    "ranking": "counts",
    "re-ranking": "mmr",
}
LIMIT_MS = 200.0
"""Where something hangs, so that the test does not take long."""
PATIENT_MS = 5_000.0
"""Where nothing does, so that a busy machine makes nothing late."""
SLACK_S = 1.0
"""What a busy machine may add to a limit before the test calls it missed."""


class Hang:
    """Work that does not come back until it is let go."""

    def __init__(self):
        self.let_go, self.calls = threading.Event(), 0

    def __call__(self, *_, **__):
        self.calls += 1
        self.let_go.wait(20)
        raise RuntimeError("let go")


def not_a_number(live, name, value=torch.nan):
    """The system answers in time and in shape, with scores that are no numbers."""
    system = live.cascade.systems[name]

    def spoil(work):
        @functools.wraps(work)
        def spoiled(*given, **named):
            found = work(*given, **named)
            if isinstance(found, Retrieved):
                return Retrieved(found.rows, torch.full_like(found.scores, value))
            if isinstance(found, dict):
                return {task: torch.full_like(scores, value) for task, scores in found.items()}
            return torch.full_like(found, value)

        return spoiled

    for method in ("score", "score_all", "retrieve", "rerank"):
        if hasattr(system, method):
            object.__setattr__(system, method, spoil(getattr(system, method)))


@pytest.fixture(scope="module")
def dataset():
    return shop_dataset()


@pytest.fixture
def live(dataset):
    """A run of its own for every test, since tests break it."""
    return Live(dataset, prepared_cascade(dataset, RUN), "one")


@pytest.fixture
def served(tmp_path):
    """A live run, its engine with an event store, and clients that are closed in the end."""
    opened = []

    def open_(live, **settings):
        engine = Engine(live, events=EventStore(tmp_path / "events.db"))
        client = TestClient(create_app(engine, ServerConfig(**settings)))
        client.__enter__()
        opened.append((client, engine))
        return client, engine

    yield open_
    for client, engine in opened:
        client.__exit__(None, None, None)
        engine.close()


def page(client, user="user-3", limit_ms=LIMIT_MS):
    """A page that must come, whole, and within the limit."""
    began = time.perf_counter()
    response = client.get(f"/v1/recommend/{user}")
    took_s = time.perf_counter() - began
    assert response.status_code == 200, response.text
    answer = response.json()
    assert len({item["item_id"] for item in answer["items"]}) == 6
    assert took_s < limit_ms / 1e3 + SLACK_S
    return answer


def well(client):
    """A page of a server that is, or soon becomes, well again."""
    for _ in range(20):
        answer = page(client)
        if answer["degraded"] is None:
            return answer
        time.sleep(0.05)
    raise AssertionError(answer["degraded"])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("value", ["exception", torch.nan, torch.inf])
def test_a_stage_that_fails_or_gives_no_numbers(served, stage, value, live):
    client, _ = served(live, time_limit_ms=PATIENT_MS)
    assert page(client)["degraded"] is None
    if value == "exception":
        break_system(live, STAGES[stage], raising)
    else:
        not_a_number(live, STAGES[stage], value)
    for _ in range(3):
        answer = page(client)
        assert STAGES[stage] in answer["degraded"]
        by_stage = {report["stage"]: report["degraded"] for report in answer["stages"]}
        assert {name for name, said in by_stage.items() if said} == {stage}
        assert ("failed" if value == "exception" else "no numbers") in by_stage[stage]
    assert f'shortlist_degraded_total{{part="{stage}"}} 3.0' in client.get("/metrics").text


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_hangs_and_comes_back(served, stage, live):
    """The stages before it make the page, in time; once late calls pile up the stage is not started at all; then it is well again."""
    client, _ = served(live, time_limit_ms=LIMIT_MS)
    page(client)
    system, hang = live.cascade.systems[STAGES[stage]], Hang()
    before = threading.active_count()
    break_system(live, STAGES[stage], hang)
    first = page(client)
    assert "late" in first["degraded"] or "no answer within" in first["degraded"]
    reports = {report["stage"]: report["degraded"] for report in first["stages"]}
    if first["chain"] != LAST_RESORT:
        assert "late" in reports[stage]
    for _ in range(3 * MOST_LEFT):
        answer = page(client)
        assert answer["degraded"]
        if f"{MOST_LEFT} late calls of it still run" in answer["degraded"]:
            break
    else:
        raise AssertionError("it was started again and again")
    assert hang.calls <= MOST_LEFT + 2
    assert threading.active_count() - before <= MOST_LEFT + 8
    hang.let_go.set()
    for method in ("score", "score_all", "retrieve", "rerank"):
        if method in vars(system):
            object.__delattr__(system, method)
    well(client)


def test_pages_asked_at_once_while_a_stage_hangs(served, live):
    client, _ = served(live, time_limit_ms=LIMIT_MS)
    page(client)
    hang = Hang()
    break_system(live, "counts", hang)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: page(client, f"user-{n}"), range(8)))
    assert all(answer["degraded"] for answer in answers)
    hang.let_go.set()


def test_what_hangs_outside_the_stages_is_answered_and_its_worker_replaced(served, monkeypatch, live):
    """Reading the user's past knows no deadline: the answer comes at the limit all the same, and the server gets its worker back."""
    client, engine = served(live, time_limit_ms=LIMIT_MS, num_workers=1)
    page(client)
    hang, honest = Hang(), engine.events.history
    monkeypatch.setattr(engine.events, "history", hang)
    stuck = page(client)
    assert stuck["chain"] == LAST_RESORT
    assert f"no answer within {LIMIT_MS:g} ms" in stuck["degraded"]
    monkeypatch.setattr(engine.events, "history", honest)
    time.sleep(LIMIT_MS / 1e3 + 0.05)  # it hangs for twice the limit by now
    well(client)
    assert "shortlist_workers_replaced_total 1.0" in client.get("/metrics").text
    hang.let_go.set()


def test_workers_that_hang_for_good_are_replaced_up_to_a_bound(monkeypatch):
    monkeypatch.setattr(batching, "MOST_GIVEN_UP", 3)
    hang = Hang()
    batcher = Batcher(lambda questions, left_ms: hang(), ServerConfig(num_workers=1, time_limit_ms=10.0))

    def ask():
        with pytest.raises(Late):
            asyncio.run(batcher.ask(Question(user="u")))
        time.sleep(0.02)

    for _ in range(8):
        ask()
    assert batcher.num_replaced == 3
    hang.let_go.set()
    time.sleep(0.05)
    hang.let_go.clear()  # those that came back have ended, so there is room for more
    for _ in range(8):
        ask()
    assert batcher.num_replaced == 6
    hang.let_go.set()
    batcher.close()


class OutOfOrder:
    """Fails whatever is asked of it."""

    def __getattr__(self, name):
        raising()


@pytest.mark.parametrize("part", ["_known", "_page"])
def test_a_fault_around_the_cascade(served, part, live):
    """Faults in what reads the past, and in the cascade as a whole."""
    client, _ = served(live, time_limit_ms=PATIENT_MS)
    if part == "_known":
        object.__setattr__(live, "users", OutOfOrder())
    else:
        object.__setattr__(live.cascade, "run", raising)
    answer = page(client)
    assert answer["chain"] == LAST_RESORT
    assert "RuntimeError: out of order" in answer["degraded"]


def test_every_stage_at_once(served, live):
    client, _ = served(live, time_limit_ms=PATIENT_MS)
    for name in STAGES.values():
        break_system(live, name, raising)
    answer = page(client)
    assert all(report["degraded"] for report in answer["stages"])
    events, _ = shop_frames()
    popular = set(events["item_id"].value_counts(sort=True)["item_id"][:12])
    assert {item["item_id"] for item in answer["items"]} <= popular | {
        item["item_id"] for item in page(client)["items"]
    }


def test_an_event_store_that_goes_and_comes_back(served, live):
    client, engine = served(live, time_limit_ms=PATIENT_MS)
    event = {"user": "user-3", "item": 130}
    assert client.post("/v1/events", json=event).status_code == 200
    known = page(client)["num_history"]
    with sqlite3.connect(engine.events.path) as file:
        file.execute("ALTER TABLE events RENAME TO away")
    for _ in range(3):
        gone = page(client)
        assert "recent events are missing" in gone["degraded"]
        assert gone["num_history"] == known - 1
        refused = client.post("/v1/events", json=event)
        assert refused.status_code == 503
        assert "send them again later" in refused.json()["error"]
    assert client.get("/v1/health/ready").status_code == 503
    with sqlite3.connect(engine.events.path) as file:
        file.execute("ALTER TABLE away RENAME TO events")
    back = page(client)
    assert back["degraded"] is None
    assert back["num_history"] == known
    assert client.post("/v1/events", json=event).status_code == 200
    assert client.get("/v1/health/ready").status_code == 200


# -- the index -------------------------------------------------------------------------------------------------------

INDEXED = """
[surface]
k = 6
[trainer]
epochs = 1
[index]
kind = "flat"
when_short = "warn"
[stages.retrieval]
systems = ["two-tower"]
keep = 25
[stages.ranking]
systems = ["counts"]
keep = 15
[systems.two-tower]
dim = 8
widths = [16]
num_uniform = 8
"""


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """Folder of a run whose retriever searches by an index."""
    pytest.importorskip("faiss")
    return trained_shop(tmp_path_factory.mktemp("indexed") / "run", INDEXED)


def test_an_index_that_fails_while_it_is_asked(indexed, monkeypatch):
    monkeypatch.setattr(indexing, "EXACT_SHARE", 2)  # else so small a catalogue is searched exactly
    with (
        Engine.load(indexed) as engine,
        TestClient(create_app(engine, ServerConfig(time_limit_ms=PATIENT_MS))) as client,
    ):
        assert page(client)["degraded"] is None
        index = engine.live.cascade.indexes["two-tower"]
        honest = type(index).search
        monkeypatch.setattr(type(index), "search", raising)
        answer = page(client)
        assert "two-tower failed" in answer["stages"][0]["degraded"]
        monkeypatch.setattr(type(index), "search", honest)
        assert page(client)["degraded"] is None


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_a_missing_index_is_refused_and_the_run_that_is_served_goes_on(indexed, tmp_path, damage):
    copy = tmp_path / "next"
    shutil.copytree(indexed, copy)
    file = copy / "indexes" / "two-tower.faiss"
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[:-3] if damage == "cut" else bytes(len(content)))
    with Engine.load(indexed) as engine, TestClient(create_app(engine)) as client:
        before = engine.snapshot_version
        with pytest.raises(SnapshotError, match=r"two-tower\.faiss"):
            engine.swap(copy)
        assert engine.snapshot_version == before
        assert page(client)["degraded"] is None
    with pytest.raises(SnapshotError, match=r"two-tower\.faiss"):
        Engine.load(copy)
