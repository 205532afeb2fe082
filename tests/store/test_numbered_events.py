"""Events by their numbers: each once, in order, in parts; what comes in after the mark is for the next time."""

import pytest

from shortlist.store.events import Event, EventStore


@pytest.fixture
def store(tmp_path):
    store = EventStore(tmp_path / "events.db", sync="normal")
    yield store
    store.close()


def event(n):
    return Event(user=f"u{n % 3}", item=f"i{n}", timestamp=1000.0 - n, action=None if n % 2 else "buy", value=float(n))


def test_an_empty_store_has_no_numbers(store):
    assert store.last_number() == 0
    assert list(store.numbered(0, 10)) == []


def test_every_event_comes_once_in_the_order_in_which_it_was_kept(store):
    store.append([event(n) for n in range(10)])
    mark = store.last_number()
    store.append([event(n) for n in range(10, 15)])
    parts = list(store.numbered(0, mark, chunk=4))
    assert [len(part) for part in parts] == [4, 4, 2]
    rows = [tuple(row) for part in parts for row in part]
    assert rows == [(f"u{n % 3}", f"i{n}", (1000 - n) * 1000, None if n % 2 else "buy", float(n)) for n in range(10)]
    rest = [row[1] for part in store.numbered(mark, store.last_number()) for row in part]
    assert rest == [f"i{n}" for n in range(10, 15)]


def test_a_forgotten_user_leaves_gaps_and_no_number_is_used_again(store):
    store.append([event(n) for n in range(6)])
    mark = store.last_number()
    store.forget("u2")
    assert {row[0] for part in store.numbered(0, mark, chunk=2) for row in part} == {"u0", "u1"}
    store.append([event(7)])
    assert store.last_number() > mark
