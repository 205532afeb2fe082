"""Logged requests asked again: bit for bit where nothing changed, told why where something did, and counted by hand."""

import json
import math
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest

from engine_support import trained_shop
from shortlist.cascade.allocation.base import Budget
from shortlist.cascade.allocation.calibration import allocation_path, calibrate, save_allocation
from shortlist.cascade.engine import Engine
from shortlist.cascade.meter import StageReport
from shortlist.cascade.questions import Question
from shortlist.cascade.request_log import LoggedRequest, LoggedStage, RequestLog
from shortlist.cascade.rules import Rules
from shortlist.cascade.run import load_run
from shortlist.errors import ConfigError, DataError, SnapshotError
from shortlist.evaluation.aftermath import CAVEAT, aftermath
from shortlist.evaluation.replay import calibrated_ms, open_replay, replay
from shortlist.evaluation.replay_page import render, write_replay
from shortlist.evaluation.replayed import WHY, Change
from shortlist.metrics.overlap import rank_biased_overlap
from shortlist.store.events import Event, EventStore

SETTINGS = """
[surface]
k = 5
[data]
valid_share = 0.2
[trainer]
epochs = 1
[stages.retrieval]
systems = ["counts", "popularity"]
keep = 18
offers = [{systems = ["popularity"], keep = 9}]
[stages.ranking]
systems = ["dnn"]
keep = 8
offers = [{systems = ["counts"], keep = 8}]
[systems.dnn]
dim = 4
widths = [8]
[allocation]
system = "dcaf"
max_requests = 60
"""
HOUR = 3600


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained_shop(tmp_path_factory.mktemp("runs") / "shop", SETTINGS)


@pytest.fixture(scope="module")
def other_run(tmp_path_factory):
    return trained_shop(tmp_path_factory.mktemp("runs") / "other", SETTINGS, seed=1)


@pytest.fixture(scope="module")
def calibration(run):
    return calibrate(load_run(run))


@pytest.fixture
def files(tmp_path):
    return tmp_path / "events.db", tmp_path / "requests.db"


@pytest.fixture
def served(run, files):
    """Twelve requests of all sorts, and events before and after them."""
    now = time.time()
    before = [Event(user=f"user-{n}", item=str(103 + n), timestamp=now - HOUR + n, action="view") for n in range(4)]
    with Engine.load(run, events=files[0], request_log=files[1]) as engine:
        engine.record(before)
        engine.recommend("user-0")
        engine.recommend("user-1", 3, rules=Rules(deny=(104, 105)))
        engine.recommend("user-2", history=[110, 111, 112])
        engine.recommend("user-2", candidates=[101, 102, 103, 104, 105, 106, 107])
        engine.recommend("user-3", chain="a1-b1")
        engine.recommend("a stranger")
        engine.recommend(None)
        engine.answer([Question(user=f"user-{n}") for n in range(10, 15)])
        # A day later, so that no clock of a test is in doubt: nothing that follows was known to any request.
        after = [Event(user=f"user-{n}", item=str(120 + n), timestamp=now + 24 * HOUR, action="buy") for n in range(20)]
        engine.record(after)
    return run


def again(run, files, change=None, *, answers=None, **more):
    change = change or Change()
    log = RequestLog(files[1])
    try:
        with open_replay(answers or run, change, events=files[0]) as engine:
            return replay(engine, log, change, run=run, **more)
    finally:
        log.close()


def copied(record, request_id):
    """A record of the log, to be logged once more; its item ids are numbers and stand for rows."""
    same = ("at_ms", "user", "k", "chain", "snapshot_version", "page", "moment", "num_history", "asked")
    return LoggedRequest(
        request_id=request_id,
        stages=[
            LoggedStage(name=s["name"], rows=np.array(s["items"]), scores=np.float32(s["scores"]))
            for s in record["stages"]
        ],
        reports=[StageReport(**report) for report in record["reports"]],
        **{name: record[name] for name in same},
    )


class TestNothingChanged:
    def test_every_page_comes_back_bit_for_bit(self, served, files):
        found = again(served, files)
        assert len(found.differences) == 12
        assert not found.skipped
        assert found.same_share == 1.0
        assert all(d.same_page and d.same_scores for d in found.differences[:7])
        assert [d.why for d in found.differences[:7]] == [()] * 7
        assert found.overlap.mean == pytest.approx(1.0)
        for d in found.differences:
            assert (d.jaccard, d.displacement, d.came, d.went, d.moved) == (1.0, 0.0, [], [], [])
        # Of a batch, every request is told the mean.
        assert [d.mflop_now for d in found.differences[:7]] == pytest.approx(
            [d.mflop_then for d in found.differences[:7]]
        )
        then, now = found.cost("mflop")
        assert now == pytest.approx(then)
        assert [d.chain_now for d in found.differences[:5]] == ["a0-b0"] * 4 + ["a1-b1"]

    def test_nothing_is_written(self, served, files):
        def sizes():
            log, store = RequestLog(files[1]), EventStore(files[0])
            found = len(log), len(store)
            log.close()
            store.close()
            return found

        before = sizes()
        again(served, files)
        assert sizes() == before

    def test_the_scores_are_compared_to_the_last_bit(self, served, files):
        log = RequestLog(files[1])
        copy = copied(next(log.read()), "nudged")
        *stages, last = copy.stages
        nudged = replace(last, scores=np.nextafter(last.scores, np.float32(np.inf)))
        copy = replace(copy, stages=[*stages, nudged])
        log.add(copy, lambda rows: rows.tolist())
        log.close()
        d = again(served, files, limit=1).differences[0]
        assert d.request_id == "nudged"
        assert d.same_page
        assert not d.same_scores
        assert 0 < d.score_change < 1e-6
        assert d.why == ("other",)


class TestWhy:
    def test_another_snapshot(self, served, files, other_run):
        found = again(other_run, files)
        assert all("snapshot" in d.why for d in found.differences)
        assert found.why["snapshot"] == 12
        wanted = again(served, files, Change(run="other"), answers=other_run)
        assert not any("snapshot" in d.why for d in wanted.differences)
        assert wanted.same_share < 1

    def test_events_that_came_in_late_or_are_gone(self, served, files):
        store = EventStore(files[0])
        store.append([Event(user="user-1", item="130", timestamp=time.time() - 2 * HOUR)])
        store.close()
        assert [d.why for d in again(served, files).differences[:3]] == [(), ("past",), ()]
        nothing = replay_without_events(served, files)
        assert [d.why for d in nothing.differences[:3]] == [("past",), ("past",), ()]
        assert nothing.after is None
        assert any("No event store was given" in note for note in nothing.notes)

    def test_a_user_of_whom_nothing_is_left(self, run, files):
        with Engine.load(run, events=files[0], request_log=files[1]) as engine:
            engine.record([Event(user="visitor", item="104", timestamp=time.time() - HOUR)])
            engine.recommend("visitor")
        files[0].unlink()
        (d,) = again(run, files).differences
        assert d.why == ("gone",)
        assert "deleted" in WHY["gone"]

    def test_a_page_that_was_degraded(self, served, files):
        log = RequestLog(files[1])
        copy = replace(copied(next(log.read()), "late"), degraded="ranking: late")
        for number, chain in enumerate(("a0-b0", "popular", "z9")):
            log.add(replace(copy, request_id=f"late {number}", chain=chain), lambda rows: rows.tolist())
        log.close()
        assert [d.why for d in again(served, files, limit=3).differences] == [
            ("degraded",),
            ("fallback",),
            ("chain", "degraded"),
        ]

    def test_records_that_can_not_be_asked_are_counted_by_reason(self, served, files):
        with Engine.load(served, request_log=files[1]) as engine:
            engine.recommend("user-1", history=[101] * 1_001)
        found = again(served, files)
        assert len(found.differences) == 12
        assert list(found.skipped.values()) == [1]
        assert any("1 requests could not be asked again: its history had more" in note for note in found.notes)
        with pytest.raises(DataError, match="none of the 1 requests can be asked again"):
            again(served, files, limit=1)

    def test_a_log_that_rolled_over_says_so(self, run, files):
        log = RequestLog(files[1], max_rows=3)
        with Engine.load(run) as engine:
            engine.request_log = log
            for _ in range(8):
                engine.recommend("user-1")
                log.flush()
        found = again(run, files)
        assert len(found.differences) == 3
        assert any(note.startswith("5 requests are not in the log any more") for note in found.notes)
        oldest = found.span.oldest_ms
        assert not any("any more" in note for note in again(run, files, since_ms=oldest).notes)
        with pytest.raises(DataError, match="and 5 older ones have made room"):
            again(run, files, until_ms=oldest)


def replay_without_events(run, files):
    log = RequestLog(files[1])
    try:
        with open_replay(run, Change()) as engine:
            return replay(engine, log, Change(), run=run)
    finally:
        log.close()


class TestWindow:
    def test_the_newest_of_a_window(self, served, files):
        everything = again(served, files)
        moments = [d.at_ms for d in everything.differences]
        assert moments == sorted(moments)
        newest = again(served, files, limit=4)
        assert [d.request_id for d in newest.differences] == [d.request_id for d in everything.differences[-4:]]
        assert any("limit was reached" in note for note in newest.notes)
        early = again(served, files, until_ms=moments[6])
        assert all(d.at_ms < moments[6] for d in early.differences)

    def test_what_can_not_be_replayed_is_refused(self, served, files, tmp_path):
        with pytest.raises(DataError, match="holds no request from 1970"):
            again(served, files, since_ms=0, until_ms=5)
        with pytest.raises(DataError, match="holds no request; serve some"):
            again(served, (files[0], tmp_path / "empty.db"))
        with pytest.raises(ConfigError, match="limit must be at least 1"):
            again(served, files, limit=0)
        with pytest.raises(ConfigError, match="no chain 'z9'"):
            again(served, files, Change(chain="z9"))
        with pytest.raises(ConfigError, match="is not calibrated"):
            again(served, files, Change(budget=Budget(ms=1.0)))


class TestChange:
    def test_denied_items_leave_every_page_and_the_rest_is_as_it_was(self, served, files):
        before = again(served, files)
        shown = before.differences[0].page_then[0]
        found = again(served, files, Change(rules=Rules(deny=(shown,))))
        for d, old in zip(found.differences, before.differences):
            assert shown not in d.page_now
            assert d.page_then == old.page_then
            assert len(d.page_now) == len(d.page_then)
            assert d.overlap == rank_biased_overlap(d.page_then, d.page_now)
        # The request's own rules still hold.
        assert not {"104", "105"} & set(found.differences[1].page_now)
        count = sum(shown in d.page_then for d in found.differences)
        assert found.lost[0] == (shown, count)
        assert sum(n for _, n in found.gained) >= count

    def test_a_chain_for_all(self, served, files):
        found = again(served, files, Change(chain="a1-b1"))
        assert {d.chain_now for d in found.differences} == {"a1-b1"}
        assert found.chains == {("a0-b0", "a1-b1"): 11, ("a1-b1", "a1-b1"): 1}
        assert found.differences[4].same_scores
        then, now = found.cost("mflop")
        assert now < then
        assert found.cost("calibrated") is None
        assert (
            found.sentences[1]
            == f"A request cost {then:.3f} MFLOP then and {now:.3f} now ({1 - now / then:.0%} saved)."
        )
        assert not any("measured" in sentence for sentence in found.sentences)

    def test_moved_items_and_the_mean_of_their_moves(self, served, files):
        for d in again(served, files, Change(chain="a0-b1")).differences:
            places = {
                item: (d.page_then.index(item), d.page_now.index(item)) for item in d.page_now if item in d.page_then
            }
            assert {m.item: (m.then - 1, m.now - 1) for m in d.moved} == {
                i: p for i, p in places.items() if p[0] != p[1]
            }
            if places:
                assert d.displacement == pytest.approx(np.mean([abs(a - b) for a, b in places.values()]))
            assert set(d.came) == set(d.page_now) - set(d.page_then)
            assert set(d.went) == set(d.page_then) - set(d.page_now)

    def test_a_budget_aims_the_allocator_anew(self, served, files, calibration):
        save_allocation(allocation_path(served), calibration)
        try:
            costs = calibrated_ms(served, calibration.version)
            assert costs == {c["name"]: c["ms"] for c in calibration.as_dict()["chains"]}
            cheapest = calibration.allocation.chains.names[0]
            least = float(calibration.allocation.chains.costs_JC[0, 1])
            found = again(served, files, Change(budget=Budget(ms=least * 1.0001)))
            chains = {d.chain_now for d in found.differences[:4]}
            assert chains == {cheapest}
            assert found.differences[4].chain_now == "a1-b1"  # which that request asked for
            then, now = found.cost("calibrated")
            assert now < then
            assert found.differences[0].calibrated_then == costs["a0-b0"]
            rich = again(served, files, Change(budget=Budget(ms=1e6)))
            assert rich.cost("calibrated")[1] >= now
            assert calibrated_ms(served, "another version") == {}
        finally:
            shutil.rmtree(allocation_path(served))

    def test_the_words_of_a_change(self):
        assert Change().words == "nothing changed"
        change = Change(run="b", budget=Budget(ms=2.0, mflop=3.0), rules=Rules())
        assert change.words == "run b, a budget of 2 ms and 3 MFLOP a request, other rules"

    def test_a_calibration_of_another_run_is_refused(self, served, files, calibration):
        save_allocation(allocation_path(served), replace(calibration, version="other"))
        try:
            with pytest.raises(SnapshotError, match="calibrated on another run"):
                again(served, files, Change(budget=Budget(ms=1.0)))
            assert again(served, files, limit=1).cost("calibrated") is None
        finally:
            shutil.rmtree(allocation_path(served))


class Asked:
    """A request with both pages, as far as hits need it."""

    def __init__(self, user, at, then, now):
        self.user, self.at_ms, self.page_then, self.page_now = user, at * 1000, tuple(then), tuple(now)


class TestAftermath:
    @pytest.fixture
    def store(self, tmp_path):
        store = EventStore(tmp_path / "after.db")
        yield store
        store.close()

    def test_hits_by_hand(self, store):
        """Two people; an event belongs to the last request before it, within two hours."""
        requests = [
            Asked("a", 1_000, "xy", "xz"),
            Asked("a", 5_000, "pq", "qr"),
            Asked("b", 1_000, "xy", "uv"),
            Asked(None, 1_000, "xy", "xy"),
        ]
        store.append(
            [
                Event(user="a", item="x", timestamp=900, action="view"),  # before any request
                Event(user="a", item="x", timestamp=1_001, action="view"),  # on both pages
                Event(user="a", item="x", timestamp=1_002, action="buy"),  # the same item again
                Event(user="a", item="z", timestamp=4_999, action="view"),  # on the new page of the first
                Event(user="a", item="x", timestamp=5_001, action="view"),  # belongs to the second, on neither
                Event(user="a", item="r", timestamp=5_002),
                Event(user="b", item="y", timestamp=1_000 + 7_200, action="view"),  # just in time
                Event(user="b", item="x", timestamp=1_000 + 7_201, action="view"),  # too late
                Event(user="c", item="x", timestamp=1_001, action="view"),
            ]
        )
        found = aftermath(requests, store, hours=2, known_until=None, seed=0)
        assert (found.num_requests, found.num_nameless, found.num_learned) == (3, 1, 0)
        assert (found.hits_then, found.hits_now) == (2, 3)  # x and y; x, z and r
        assert found.test.difference == pytest.approx(1 / 3)
        assert found.test.low <= 1 / 3 <= found.test.high
        by_action = {name: (a.events, a.on_then, a.on_now) for name, a in found.actions.items()}
        assert by_action == {"view": (4, 2, 2), "buy": (1, 1, 1), "unnamed": (1, 0, 1)}
        assert CAVEAT in found.sentences
        assert "took 2 items of the 3 old pages, and 3 items of the new ones, +0.3333 a request" in found.sentences[0]

    def test_against_a_plain_count(self, store):
        rng = np.random.default_rng(3)
        requests = [
            Asked(f"u{rng.integers(6)}", int(at), *(rng.permutation(20)[:5].astype(str) for _ in range(2)))
            for at in rng.choice(100_000, 60, replace=False)
        ]
        events = [
            Event(user=f"u{rng.integers(7)}", item=str(rng.integers(20)), timestamp=float(rng.integers(100_000)) + 0.5)
            for _ in range(400)
        ]
        store.append(events)
        found = aftermath(requests, store, hours=1, known_until=None, seed=0)
        then = now = 0
        for request in requests:
            later = [r.at_ms for r in requests if r.user == request.user and r.at_ms > request.at_ms]
            end = min([request.at_ms + 3_600_000, *later])
            taken = {e.item for e in events if e.user == request.user and request.at_ms < e.timestamp * 1000 <= end}
            then += len(taken & set(request.page_then))
            now += len(taken & set(request.page_now))
        assert (found.hits_then, found.hits_now) == (then, now)
        assert then > 10

    def test_requests_that_the_run_has_learned_from_are_left_out(self, store):
        requests = [Asked("a", 1_000, "x", "x"), Asked("b", 9_000, "x", "x")]
        found = aftermath(requests, store, hours=1, known_until=5_000, seed=0)
        assert (found.num_requests, found.num_learned, found.test) == (1, 1, None)
        assert "1 requests are left out" in found.sentences[0]
        nothing = aftermath(requests, store, hours=1, known_until=50_000, seed=0)
        assert nothing.num_requests == 0
        assert nothing.sentences == [
            "What people did next can not be counted. 2 requests are left out, since the run was trained on what came after them."
        ]
        assert aftermath([], store, hours=1, known_until=None, seed=0).sentences == []

    def test_a_replay_counts_what_followed(self, served, files):
        found = again(served, files, hours=48)
        # user-0..3 and 10..14 bought one item each, a day later; those of user-2 belong to the second of two requests.
        bought = {f"user-{n}": str(120 + n) for n in range(20)}
        last = {d.user: d for d in found.differences if d.user}
        wanted = sum(bought[user] in d.page_then for user, d in last.items() if user in bought)
        assert found.after.hits_then == found.after.hits_now == wanted
        assert found.after.actions["buy"].events == 9
        assert again(served, files, hours=2).after.actions == {}


class TestPage:
    def test_it_has_figures_numbers_and_caveats(self, served, files, tmp_path):
        found = again(served, files, Change(chain="a1-b1"), hours=48)
        page = write_replay(tmp_path / "shop", found)
        assert page == tmp_path / "shop-report" / "replay.html"
        html = page.read_text()
        assert html.count("<svg role") == 2
        assert "Requests by rank-biased overlap" in html
        assert "MFLOP of each request now against then: " in html
        assert CAVEAT in html
        assert "Item number" in html
        for sentence in found.sentences[:2]:
            assert sentence in html
        written = json.loads((page.parent / "replay.json").read_text())
        assert written == json.loads(json.dumps(found.as_dict()))
        assert len(written["requests"]) == 12
        first = written["requests"][0]
        assert set(first["in"]) == set(first["page_now"]) - set(first["page_then"])
        assert first["chain_then"] == "a0-b0"
        assert written["summary"]["cost"]["calibrated"] is None
        assert written["summary"]["after"]["caveat"] == CAVEAT
        assert sum(c["requests"] for c in written["summary"]["chains"]) == 12

    def test_what_comes_from_the_log_is_escaped(self, served, files):
        found = again(served, files, Change(chain="a1-b1"))
        changed = min(found.differences, key=lambda d: d.overlap)
        strange = replace(found, differences=(replace(changed, user="<b>&", page_now=("<i>",)), *found.differences))
        html = render(strange)
        assert "<b>&" not in html
        assert "&lt;b&gt;&amp;" in html
        assert "<i>" not in html

    def test_one_request_alone_has_no_interval(self, served, files):
        found = again(served, files, limit=1)
        assert math.isnan(found.overlap.low)
        assert found.as_dict()["summary"]["overlap"]["low"] is None
        assert "Every page is as it was" in render(found)
        json.dumps(found.as_dict(), allow_nan=False)
