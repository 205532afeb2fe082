"""The request log: what goes in comes out, old rows go, a full queue drops and counts, nothing is lost at closing."""

import datetime
import sqlite3
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from shortlist.cascade.meter import StageReport
from shortlist.cascade.request_log import LoggedRequest, LoggedStage, RequestLog, Span
from shortlist.errors import ConfigError, DataError


def ids_of(rows):
    return [f"i{row}" for row in rows.tolist()]


REPORT = StageReport(
    stage="retrieval", systems=("pop",), num_received=9, num_kept=3, spent_ms=0.25, spent_mflop=1.5, degraded=None
)
REQUEST = LoggedRequest(
    request_id="r1",
    at_ms=1_700_000_000_123,
    user="u",
    k=2,
    chain="a0-b0",
    snapshot_version="abc",
    page=["i3", "i1"],
    stages=[
        LoggedStage(
            name="retrieval",
            rows=np.array([3, 1, 2]),
            scores=np.array([0.1, 1 / 3, -np.inf], dtype=np.float32),
        )
    ],
    reports=[REPORT],
    removed={"deny": 4},
    arranged={"pins": 1},
    degraded="ranking: late",
    reason="price",
    moment=1_700_000_000,
    num_history=3,
    asked={"query": "mug"},
    candidates=np.array([2, 5]),
)


@pytest.fixture
def log(tmp_path):
    log = RequestLog(tmp_path / "requests.db", max_rows=20)
    yield log
    log.close()


def test_a_request_is_found_with_all_its_parts(log):
    assert log.add(REQUEST, ids_of)
    found = log.find("r1")
    assert found.pop("stages") == [
        {"name": "retrieval", "items": ["i3", "i1", "i2"], "scores": [pytest.approx(0.1), pytest.approx(1 / 3), None]}
    ]
    assert found.pop("reports") == [
        {
            "stage": "retrieval",
            "systems": ["pop"],
            "num_received": 9,
            "num_kept": 3,
            "spent_ms": 0.25,
            "spent_mflop": 1.5,
            "degraded": None,
        }
    ]
    assert found == {
        "request_id": "r1",
        "at_ms": 1_700_000_000_123,
        "user": "u",
        "chain": "a0-b0",
        "snapshot_version": "abc",
        "propensity": 1.0,
        "degraded": "ranking: late",
        "k": 2,
        "page": ["i3", "i1"],
        "removed": {"deny": 4},
        "arranged": {"pins": 1},
        "reason": "price",
        "moment": 1_700_000_000,
        "num_history": 3,
        "asked": {"query": "mug", "candidates": ["i2", "i5"]},
    }
    assert log.find("r2") is None


def test_scores_keep_the_digits_of_a_float32(log):
    scores = np.random.default_rng(0).normal(size=500).astype(np.float32) * np.float32(1e-3)
    stage = LoggedStage(name="s", rows=np.arange(500), scores=scores)
    log.add(replace(REQUEST, stages=[stage]), ids_of)
    np.testing.assert_array_equal(np.float32(log.find("r1")["stages"][0]["scores"]), scores)


def test_only_the_newest_rows_are_kept(log):
    for number in range(57):
        log.add(replace(REQUEST, request_id=f"r{number}"), ids_of)
        if number % 10 == 0:
            log.flush()
    assert len(log) == 20
    assert log.find("r36") is None
    assert log.find("r37")["request_id"] == "r37"
    assert log.find("r56")["request_id"] == "r56"


def test_a_full_queue_drops_and_counts_and_never_waits(tmp_path):
    log = RequestLog(tmp_path / "requests.db", max_waiting=5)
    stuck, free = threading.Event(), threading.Event()

    def slow_ids(rows):
        stuck.set()
        free.wait(10)
        return ids_of(rows)

    log.add(replace(REQUEST, request_id="slow"), slow_ids)
    assert stuck.wait(5)
    started = time.perf_counter()
    taken = [log.add(replace(REQUEST, request_id=f"r{n}"), ids_of) for n in range(12)]
    assert time.perf_counter() - started < 0.5
    assert taken == [True] * 5 + [False] * 7
    assert log.dropped == 7
    free.set()
    assert len(log) == 6
    log.close()


def test_closing_writes_what_waits(tmp_path):
    log = RequestLog(tmp_path / "requests.db")
    for number in range(700):
        log.add(replace(REQUEST, request_id=f"r{number}"), ids_of)
    log.close()
    with sqlite3.connect(tmp_path / "requests.db") as file:
        assert file.execute("SELECT count(DISTINCT request_id) FROM requests").fetchone() == (700,)
    again = RequestLog(tmp_path / "requests.db")
    assert again.find("r699")["user"] == "u"
    again.close()
    again.close()


def test_a_record_that_can_not_be_written_is_counted_and_the_next_one_is_written(log):
    def broken(rows):
        raise RuntimeError("no such snapshot any more")

    log.add(REQUEST, broken)
    log.flush()
    log.add(replace(REQUEST, request_id="r2"), ids_of)
    assert log.find("r2") is not None
    assert log.find("r1") is None
    assert log.dropped == 1


def test_a_window_is_read_in_order_and_the_newest_of_it_are_kept(log):
    for number in range(12):
        log.add(replace(REQUEST, request_id=f"r{number}", at_ms=1_000 + 10 * number), ids_of)
    assert [r["request_id"] for r in log.read()] == [f"r{n}" for n in range(12)]
    assert [r["request_id"] for r in log.read(since_ms=1_030, until_ms=1_060)] == ["r3", "r4", "r5"]
    assert [r["request_id"] for r in log.read(until_ms=1_060, newest=2)] == ["r4", "r5"]
    assert next(log.read(since_ms=1_110)) == log.find("r11")
    assert list(log.read(since_ms=1_111)) == []


def test_more_than_one_piece_is_read(tmp_path):
    log = RequestLog(tmp_path / "requests.db")
    for number in range(600):
        log.add(replace(REQUEST, request_id=f"r{number}"), ids_of)
    assert [r["request_id"] for r in log.read(newest=300)] == [f"r{n}" for n in range(300, 600)]
    log.close()


def test_what_is_gone_is_counted(log):
    assert log.span() == Span(num_kept=0, num_gone=0, oldest_ms=None, newest_ms=None)
    for number in range(57):
        log.add(replace(REQUEST, request_id=f"r{number}", at_ms=number), ids_of)
        log.flush()
    assert log.span() == Span(num_kept=20, num_gone=37, oldest_ms=37, newest_ms=56)


def test_values_that_json_does_not_know_are_kept_as_numbers_or_text(log):
    when = datetime.date(2024, 5, 1)
    log.add(replace(REQUEST, asked={"context": {"n": np.int64(4), "x": np.float32(0.5), "day": when}}), ids_of)
    assert log.find("r1")["asked"]["context"] == {"n": 4, "x": 0.5, "day": "2024-05-01"}


def test_bad_files_and_bounds_are_refused(tmp_path):
    (tmp_path / "requests.db").write_bytes(b"not a database at all, only words" * 100)
    with pytest.raises(DataError, match=r"requests\.db can not be used as a request log"):
        RequestLog(tmp_path / "requests.db")
    with pytest.raises(DataError, match="is not a folder"):
        RequestLog(tmp_path / "nowhere" / "requests.db")
    with pytest.raises(ConfigError, match="at least 1"):
        RequestLog(tmp_path / "other.db", max_rows=0)
