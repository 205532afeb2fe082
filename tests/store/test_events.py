"""The event store: order, bounds, retries, threads, damage, and kill -9 with a real process."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from shortlist.errors import DataError
from shortlist.store.catalogue import CatalogueStore
from shortlist.store.events import Event, EventStore, StoreUnavailable

NOON = 1_700_000_000.0


@pytest.fixture
def store(tmp_path):
    store = EventStore(tmp_path / "events.db")
    yield store
    store.close()


def test_events_come_back_by_user_in_time_order(store):
    store.append([Event(user="u", item="late", timestamp=NOON + 5), Event(user="v", item="other", timestamp=NOON)])
    store.append([Event(user="u", item="early", timestamp=NOON + 1.25, action="view", value=2.5)])
    store.append([Event(user="u", item="tie", timestamp=NOON + 5)])
    mine = store.history(["u"])
    assert mine.item == ["early", "late", "tie"]
    assert mine.time_ms.tolist() == [1_700_000_001_250, 1_700_000_005_000, 1_700_000_005_000]
    assert mine.action == ["view", None, None]
    assert mine.value.tolist() == [2.5, 1.0, 1.0]
    assert len(store.history(["nobody"])) == 0


def test_many_users_are_answered_in_the_order_of_the_question(store):
    store.append([Event(user=f"u{i % 7}", item=f"i{i}", timestamp=NOON + i) for i in range(70)])
    asked = ["u3", "nobody", "u0", "u3"]
    many = store.history(asked)
    for place, user in enumerate(asked):
        alone = store.history([user])
        here = many.user == place
        assert [item for item, mine in zip(many.item, here) if mine] == alone.item
        np.testing.assert_array_equal(many.time_ms[here], alone.time_ms)
    assert (np.diff(many.user) >= 0).all()


def test_users_stand_in_the_order_of_their_first_event(store):
    assert store.users() == []
    store.append([Event(user=user, item="i", timestamp=NOON - n) for n, user in enumerate(["v", "u", "v", "w", "u"])])
    assert store.users() == ["v", "u", "w"]
    store.append([Event(user="a", item="i", timestamp=NOON - 99)])
    assert store.users() == ["v", "u", "w", "a"]


def test_more_users_than_one_query_holds(store):
    users = [f"u{i}" for i in range(1_203)]
    store.append([Event(user=user, item=f"of-{user}", timestamp=NOON) for user in users])
    assert store.history(users[::-1]).item == [f"of-{user}" for user in users[::-1]]


def test_history_is_bounded_by_the_newest_events(tmp_path):
    store = EventStore(tmp_path / "events.db", max_per_user=3)
    store.append([Event(user=user, item=f"i{i}", timestamp=NOON + i) for i in range(10) for user in "uv"])
    assert store.history(["u"]).item == ["i7", "i8", "i9"]
    assert store.history(["v", "u"]).item == ["i7", "i8", "i9"] * 2
    assert len(store) == 20
    store.close()


def test_an_event_sent_again_is_kept_once(store):
    sent = [Event(user="u", item="a", timestamp=NOON, event_id="1"), Event(user="u", item="b", timestamp=NOON)]
    assert store.append(sent) == 2
    assert store.append(sent) == 1  # only the one without a number is new
    assert store.append([replace(sent[0], event_id="2"), replace(sent[0], event_id="2")]) == 1
    assert len(store) == 4
    assert store.append([]) == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"user": ""},
        {"item": ""},
        {"user": "x" * 600},
        {"timestamp": float("nan")},
        {"timestamp": float("inf")},
        {"timestamp": -1.0},
        {"timestamp": NOON * 1000},
        {"value": float("inf")},
    ],
    ids=str,
)
def test_a_bad_event_is_named_and_nothing_is_kept(store, bad):
    good = Event(user="u", item="a", timestamp=NOON)
    with pytest.raises(DataError, match="event 1: "):
        store.append([good, replace(good, **bad), good])
    assert len(store) == 0


def test_events_survive_closing_and_are_shared_between_stores(tmp_path):
    first, second = EventStore(tmp_path / "events.db"), EventStore(tmp_path / "events.db", sync="normal")
    first.append([Event(user="u", item="a", timestamp=NOON)])
    assert second.history(["u"]).item == ["a"]
    second.append([Event(user="u", item="b", timestamp=NOON + 1)])
    assert first.history(["u"]).item == ["a", "b"]
    first.close()
    second.close()
    again = EventStore(tmp_path / "events.db")
    assert len(again) == 2
    again.close()


def test_the_file_is_in_wal_mode_and_waits_for_the_disk(tmp_path):
    for sync, number in (("full", 2), ("normal", 1)):
        store = EventStore(tmp_path / f"{sync}.db", sync=sync)
        with store._database.engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == number
        store.close()


def test_threads_write_and_read_at_once(store):
    def work(number: int) -> None:
        for i in range(20):
            store.append([Event(user=f"u{number}", item=f"i{i}", timestamp=NOON + i) for _ in range(3)])
            if len(store.history([f"u{number}"])) != 3 * (i + 1):
                wrong.append((number, i))

    wrong: list[tuple[int, int]] = []
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(store) == 8 * 20 * 3


def test_what_is_no_store_is_refused_by_name(tmp_path):
    (tmp_path / "events.db").write_bytes(b"this is a shopping list, not a database" * 100)
    with pytest.raises(DataError, match=r"events\.db can not be used as an event store: file is not a database"):
        EventStore(tmp_path / "events.db")
    with pytest.raises(DataError, match="is not a folder"):
        EventStore(tmp_path / "nowhere" / "events.db")


def test_what_is_too_short_to_be_a_store_is_left_as_it_is(tmp_path):
    (tmp_path / "events.db").write_text("milk, bread")
    with pytest.raises(DataError, match=r"events\.db can not be used as an event store: file is not a database"):
        EventStore(tmp_path / "events.db")
    assert (tmp_path / "events.db").read_text() == "milk, bread"
    assert [path.name for path in tmp_path.iterdir()] == ["events.db"]


def test_a_process_that_reads_the_file_and_leaves_takes_no_event_along(store):
    """As a backup does, or `shortlist update`: the last one to close a file removes its log, so nobody may be taken for the last one."""
    code = "import sqlite3, sys; f = sqlite3.connect(sys.argv[1]); print(*f.execute('SELECT count(*) FROM events').fetchone()); f.close()"

    def kept() -> int:
        return int(subprocess.run([sys.executable, "-c", code, store.path], check=True, capture_output=True).stdout)

    catalogue = CatalogueStore(store.path)  # as in a server: the file is opened a second time
    for number in range(3):
        store.append([Event(user="u", item=f"i{number}", timestamp=NOON)])
        assert kept() == number + 1
    catalogue.close()
    assert len(store) == 3


def test_a_file_that_goes_away_takes_no_event_and_is_used_again_when_it_is_back(store):
    event = Event(user="u", item="a", timestamp=NOON)
    store.append([event])
    away = store.path.with_name("away.db")
    store.path.rename(away)
    for work in (lambda: store.append([event]), lambda: store.history(["u"]), lambda: store.forget("u")):
        with pytest.raises(
            StoreUnavailable, match=r"events\.db can not be used: the file was removed or replaced .* put it back"
        ):
            work()
    assert not store.path.exists()
    away.rename(store.path)
    store.append([event])
    assert store.history(["u"]).item == ["a", "a"]
    shutil.copy(store.path, away)
    away.replace(store.path)  # a backup in its place: what was kept since is not in it
    with pytest.raises(StoreUnavailable, match="start again with what is there"):
        store.append([event])


def test_a_lost_table_is_reported_as_unavailable(store):
    with sqlite3.connect(store.path) as other:
        other.execute("DROP TABLE events")
    with pytest.raises(StoreUnavailable, match=r"events\.db can not be used: no such table"):
        store.history(["u"])
    with pytest.raises(StoreUnavailable, match="no such table"):
        store.append([Event(user="u", item="a", timestamp=NOON)])


WRITER = """
import sys
from shortlist.store.catalogue import CatalogueStore
from shortlist.store.events import Event, EventStore
store = EventStore(sys.argv[1])
for number in range(10**9):
    store.append([Event(user="u%d" % (number % 5), item="%d-%d" % (number, i), timestamp=1.7e9 + number) for i in range(10)])
    sys.stdout.write("%d\\n" % number)
    sys.stdout.flush()
"""


@pytest.mark.parametrize("after_ms", [60, 130, 250])
def test_kill_9_loses_no_acknowledged_event(tmp_path, after_ms):
    path = tmp_path / "events.db"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    acknowledged = [writer.stdout.readline()]
    reader = threading.Thread(target=lambda: acknowledged.extend(writer.stdout))
    reader.start()
    time.sleep(after_ms / 1000)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    reader.join()
    batches = [int(line) for line in acknowledged if line.endswith("\n")]
    assert batches == list(range(len(batches)))
    store = EventStore(path, max_per_user=10**6)
    kept = set(store.history([f"u{i}" for i in range(5)]).item)
    assert kept >= {f"{number}-{i}" for number in batches for i in range(10)}
    assert len(kept) % 10 == 0  # a batch is there whole or not at all
    store.append([Event(user="u", item="after", timestamp=NOON)])
    store.close()


@pytest.mark.parametrize("sync", ["full", "normal"])
def test_speed_of_batches_of_100(tmp_path, sync):
    """Not a bar for this machine's disk, which others share; prints the rate (pytest -s) and holds a floor far below it."""
    store = EventStore(tmp_path / "events.db", sync=sync)
    batch = [Event(user=f"u{i % 50}", item=f"i{i}", timestamp=NOON + i, event_id=None) for i in range(100)]
    start = time.perf_counter()
    for _ in range(50):
        store.append(batch)
    rate = 5_000 / (time.perf_counter() - start)
    print(f"\nevents per second, batches of 100, sync={sync}: {rate:,.0f}")
    assert rate > 1_000
    store.close()
