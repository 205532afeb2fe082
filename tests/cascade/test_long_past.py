"""A request of somebody with a long past reads the newest of it alone, and answers as if all had been read."""

import time
from contextlib import contextmanager

import numpy as np
import polars as pl
import pytest

from engine_support import DAY, NUM_ITEMS, START, prepared_cascade, shop_frames
from shortlist.cascade import knowing as knowing_module
from shortlist.cascade import recording as recording_module
from shortlist.cascade.cascade import PAIR_HISTORY
from shortlist.cascade.engine import Engine
from shortlist.cascade.live import Live
from shortlist.cascade.rules import Rules
from shortlist.data.dataset import build_dataset
from shortlist.data.log import read
from shortlist.data.splits import DataConfig
from shortlist.store.events import Event, EventStore

NUM_EVENTS = 3 * PAIR_HISTORY
LONG = "somebody"
RUN = """
[surface]
k = 6
repeats = "yes"
[stages.retrieval]
systems = ["counts", "popularity"]
keep = 25
[stages.ranking]
systems = ["vista"]
[systems.vista]
dim = 8
num_seeds = 2
max_history = 40
num_recent = 4
"""


@pytest.fixture(scope="module")
def live():
    """The shop, and a person who bought one thing every two hours until the shop's last day."""
    events, items = shop_frames()
    rng = np.random.default_rng(0)
    start = int(START.timestamp()) + 24 * DAY - 7_200 * NUM_EVENTS
    theirs = pl.DataFrame(
        {
            "user_id": [LONG] * NUM_EVENTS,
            "item_id": 100 + rng.integers(0, NUM_ITEMS, NUM_EVENTS),
            "timestamp": pl.Series(start + 7_200 * np.arange(NUM_EVENTS)).cast(pl.Int64) * 1_000_000,
            "action": ["buy"] * NUM_EVENTS,
            "value": [1.0] * NUM_EVENTS,
        }
    ).with_columns(pl.col("timestamp").cast(events.schema["timestamp"]))
    dataset = build_dataset(read(pl.concat([events, theirs]), items=items), DataConfig(repeats="yes"))
    return Live(dataset, prepared_cascade(dataset, RUN), "one")


@pytest.fixture
def engine(live, tmp_path):
    with Engine(live, events=EventStore(tmp_path / "events.db")) as engine:
        yield engine


@contextmanager
def watched(*, read_all=False):
    """Note how many events each request reads; `read_all` makes it read the whole past."""
    sizes, plain = [], knowing_module.pasts

    def pasts(log, rows, newer, *, has_clock, newest=None):
        past = plain(log, rows, newer, has_clock=has_clock, newest=None if read_all else newest)
        sizes.append(past.num_events)
        return past

    with pytest.MonkeyPatch.context() as patch:
        for module in (knowing_module, recording_module):
            patch.setattr(module, "pasts", pasts)
        yield sizes


@pytest.mark.parametrize("num_recorded", [0, 3])
def test_the_answer_is_that_of_the_whole_past(engine, monkeypatch, num_recorded):
    now = engine.live.log_end + 5.0 * DAY
    monkeypatch.setattr(time, "time", lambda: now)
    engine.record([Event(user=LONG, item=str(100 + n), timestamp=now - 60 * n) for n in range(num_recorded)])
    with watched(read_all=True) as all_events:
        of_all = engine.recommend(LONG)
    engine.live.cascade.memories.forget(LONG)
    with watched() as few_events:
        of_newest = engine.recommend(LONG)
    for told in ("items", "at", "degraded", "removed"):
        assert getattr(of_newest, told) == getattr(of_all, told)
    assert of_newest.num_history == NUM_EVENTS + num_recorded
    assert of_newest.degraded is None
    if num_recorded:
        assert all_events == [NUM_EVENTS + num_recorded]
        assert few_events == [PAIR_HISTORY + num_recorded]
    else:  # read where it stands, without a copy
        assert all_events == few_events == []
        batch = engine.traced(LONG).batch
        assert batch is not None
        assert batch.history.items.lengths.tolist() == [PAIR_HISTORY]


@pytest.mark.parametrize("rules", [None, Rules(seen="drop"), Rules(seen_days=30.0)])
@pytest.mark.parametrize("at", [None, "earlier"])
def test_a_past_read_where_it_stands_is_the_past_that_is_copied(engine, monkeypatch, rules, at):
    """Events of items that the catalogue lacks change nothing, but with them the past is put together anew."""
    now = engine.live.log_end + 5.0 * DAY
    monkeypatch.setattr(time, "time", lambda: now)
    moment = None if at is None else engine.live.log_end - 3 * DAY
    users = (LONG, "user-3")
    standing = [engine.recommend(user, rules=rules, at=moment) for user in users]
    engine.record([Event(user=user, item="no such thing", timestamp=now - 60) for user in users])
    engine.live.cascade.memories.forget(LONG)
    with watched() as sizes:
        copied = [engine.recommend(user, rules=rules, at=moment) for user in users]
    assert len(sizes) == 2
    for one, other in zip(standing, copied, strict=True):
        for told in ("items", "at", "degraded", "removed", "num_history"):
            assert getattr(one, told) == getattr(other, told)


def test_the_newest_events_are_shown_without_reading_the_others(engine):
    with watched() as sizes:
        shown = engine.history(LONG, 7)
    log, row = engine.live.dataset.histories, int(engine.live.users([LONG])[0])
    newest = log.item[log.offsets[row] : log.offsets[row + 1]][::-1][:7]
    assert [seen.item_id for seen in shown] == engine.live.dataset.item_ids.decode(newest)
    assert sizes == [7]
    assert engine.history(LONG, 0) == []


def test_what_was_seen_is_left_out_however_long_ago(live):
    """Where nothing is shown twice, the whole past counts; three things on sale were never bought."""
    with Engine(live) as engine:
        log, row = live.dataset.histories, int(live.users([LONG])[0])
        seen = set(live.dataset.item_ids.decode(np.unique(log.item[log.offsets[row] : log.offsets[row + 1]])))
        answer = engine.recommend(LONG, rules=Rules(seen="drop"))
        assert answer.items
        assert not seen & {item.item_id for item in answer.items}
