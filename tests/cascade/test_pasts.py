"""What is known of users: log and newer events together, against building the whole log at once."""

import numpy as np
import pytest

from shortlist.cascade.pasts import Newer, Numbers, PastEvent, newer_of, pasts, sent_history
from shortlist.data.encode import sort_events
from shortlist.data.vocabulary import Vocabulary
from shortlist.errors import DataError

NUM_USERS = 6


def random_events(rng, count, first_second=1_000, last_second=1_060):
    """user 1.., item, time_ms, action, value; many ties in time."""
    return (
        rng.integers(1, NUM_USERS + 1, count),
        rng.integers(1, 9, count),
        rng.integers(first_second * 2, last_second * 2, count) * 500,
        rng.integers(0, 3, count),
        rng.random(count).astype(np.float32),
    )


def log_of(events, **settings):
    user, item, time_ms, action, value = events
    histories, _ = sort_events(
        user, item, time_ms, action=action, value=value, num_users=NUM_USERS, time_unit=1000, **settings
    )
    return histories


def groups_of(histories, row):
    """The groups of a user as (time, sorted items with action and value)."""
    index = np.arange(histories.offsets[row], histories.offsets[row + 1])
    out = {}
    for i in index:
        out.setdefault((int(histories.group[i]), int(histories.time[i])), []).append(
            (int(histories.item[i]), int(histories.action[i]), round(float(histories.value[i]), 6))
        )
    assert list(out) == sorted(out)
    return [(time, sorted(items)) for (_, time), items in out.items()]


def newer(events, users):
    """The events of `users` (rows) as Newer, numbered by their place among the users."""
    user, item, time_ms, action, value = events
    place = {row: i for i, row in enumerate(users)}
    mine = np.isin(user, users)
    return Newer(
        user=np.array([place[row] for row in user[mine].tolist()], dtype=np.int64),
        item=item[mine],
        time_ms=time_ms[mine],
        action=action[mine],
        value=value[mine],
    )


def test_log_then_newer_equals_the_log_of_all():
    rng = np.random.default_rng(0)
    for _ in range(30):
        old, new = random_events(rng, 25), random_events(rng, 15, 1_060, 1_090)
        users = rng.permutation(np.arange(1, NUM_USERS + 1))[:4]
        merged = pasts(log_of(old), users, newer(new, users), has_clock=True)
        whole = log_of([np.concatenate(pair) for pair in zip(old, new)])
        assert merged.num_users == 4
        for place, row in enumerate(users):
            assert groups_of(merged, place + 1) == groups_of(whole, row)


def test_without_newer_events_the_log_stands_as_it_is():
    log = log_of(random_events(np.random.default_rng(1), 30))
    users = np.array([3, 0, 5, 3])
    for nothing in (None, newer(random_events(np.random.default_rng(2), 0), users)):
        past = pasts(log, users, nothing, has_clock=True)
        assert past.num_users == 4
        for place, row in enumerate(users):
            assert groups_of(past, place + 1) == groups_of(log, row)


def test_events_the_log_holds_already_count_once_and_late_ones_find_their_place():
    events = random_events(np.random.default_rng(3), 40)
    late = tuple(column[::3] for column in events)
    early = tuple(np.delete(column, np.arange(0, 40, 3)) for column in events)
    users = np.arange(1, NUM_USERS + 1)
    whole = log_of(events)
    again = pasts(whole, users, newer(late, users), has_clock=True)
    for row in users:
        assert groups_of(again, row) == groups_of(whole, row)
    # The log's groups carry whole seconds, so late events only share a group when they came in the same one.
    merged = pasts(log_of(early), users, newer(late, users), has_clock=True)
    for row in users:
        items = [(time, item) for time, group in groups_of(merged, row) for item in group]
        kept = {(time, item[0]) for time, group in groups_of(log_of(early), row) for item in group}
        missing = {(t // 1000, i) for u, i, t in zip(*late[:3]) if u == row} - kept
        assert {(time, item[0]) for time, item in items} == kept | missing
        assert [time for time, _ in items] == sorted(time for time, _ in items)


def test_unknown_items_are_left_out():
    log = log_of(random_events(np.random.default_rng(4), 10))
    more = Newer(
        user=np.array([0, 0]),
        item=np.array([0, 7]),
        time_ms=np.array([2_000_000, 2_000_000]),
        action=np.array([1, 1]),
        value=np.ones(2, dtype=np.float32),
    )
    past = pasts(log, np.array([2]), more, has_clock=True)
    assert groups_of(past, 1) == [*groups_of(log, 2), (2_000, [(7, 1, 1.0)])]


def test_without_a_clock_newer_events_stand_behind_the_log():
    user, item, place = np.array([1, 1, 2]), np.array([4, 5, 6]), np.array([0, 1, 0])
    log, _ = sort_events(user, item, place, num_users=2, time_unit=None)
    more = Newer(
        user=np.array([0, 0, 0]),
        item=np.array([8, 7, 4]),
        time_ms=np.array([9_000, 5_000, 9_000]),
        action=np.ones(3, dtype=np.int64),
        value=np.ones(3, dtype=np.float32),
    )
    past = pasts(log, np.array([1]), more, has_clock=False)
    assert past.item.tolist() == [4, 5, 7, 8, 4]
    assert past.time.tolist() == [0, 1, 2, 3, 3]


def test_numbers_agree_with_the_vocabulary_and_stay_bounded():
    import polars as pl

    vocabulary = Vocabulary(pl.Series("id", [f"i{n}" for n in range(100)]))
    numbers = Numbers(vocabulary, max_remembered=10)
    rng = np.random.default_rng(0)
    for _ in range(40):
        ids = [f"i{n}" if n < 110 else None for n in rng.integers(0, 120, 6)]
        assert numbers(ids).tolist() == vocabulary.encode(ids).tolist()
        assert len(numbers._row_of) <= 16
    assert numbers([]).tolist() == []


def test_a_sent_history_may_have_all_times_or_none():
    assert sent_history(["a", "b"]) == [PastEvent(item="a"), PastEvent(item="b")]
    assert sent_history([("a", 5.0)]) == [PastEvent(item="a", timestamp=5.0)]
    with pytest.raises(DataError, match="1 of 2 events have a timestamp"):
        sent_history(["a", ("b", 5.0)])


def test_a_sent_history_without_times_ends_at_the_request():
    events = sent_history(["a", "b", "c"])
    row_of = {"a": 1, "b": 2, "c": 3}
    made = newer_of(events, lambda ids: np.array([row_of[i] for i in ids]), np.ones(3, dtype=np.int64), at=1_000.0)
    assert made.time_ms.tolist() == [880_000, 940_000, 1_000_000]
    assert made.item.tolist() == [1, 2, 3]


@pytest.mark.parametrize("newest", [1, 7, 30, 1_000])
@pytest.mark.parametrize("has_clock", [True, False])
def test_reading_the_newest_of_the_log_ends_like_reading_all_of_it(newest, has_clock):
    """Late events and repeats of what the log holds, also of what is not read, change nothing among the newest."""
    rng = np.random.default_rng(newest)
    old = list(random_events(rng, 200))
    old[2] = rng.permutation(200) * 2_000 + 1_000_000  # one event a moment, every other second
    late = list(random_events(rng, 30))
    late[2] = rng.permutation(30) * 26_000 + 1_001_000  # between them
    both = [np.concatenate([a, b]) for a, b in zip(late, [column[::5] for column in old])]
    users = [2, 5, 3, 2]
    log, fresh = log_of(old), newer(late if not has_clock else both, users[:3])
    rows = np.array(users)
    all_of_it = pasts(log, rows, fresh, has_clock=has_clock)
    cut = pasts(log, rows, fresh, has_clock=has_clock, newest=newest)
    for place in range(1, 5):
        whole, part = (slice(h.offsets[place + 1] - n, h.offsets[place + 1])
                       for h in (all_of_it, cut)
                       for n in [min(newest, int(all_of_it.offsets[place + 1] - all_of_it.offsets[place]))])  # fmt: skip
        for name in ("item", "time", "action", "value"):
            assert getattr(all_of_it, name)[whole].tolist() == getattr(cut, name)[part].tolist()
    assert (cut.num_events < all_of_it.num_events) is (has_clock and newest < 1_000)
