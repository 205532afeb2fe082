"""One contract for events, run on SQLite and on a real PostgreSQL: whichever keeps them, nothing else may notice."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from sqlalchemy import text

import shortlist.extras
from shortlist.errors import ConfigError, DataError
from shortlist.store.databases import LOCK_SPACE
from shortlist.store.events import Event, EventStore, StoreUnavailable

NOON = 1_700_000_000.0


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request, tmp_path):
    """Path or URL of an event store that does not exist yet."""
    if request.param == "sqlite":
        return str(tmp_path / "events.db")
    return request.getfixturevalue("postgres").schema()


@pytest.fixture
def opened(where):
    """Opens stores on the same database and closes them all."""
    stores = []

    def another(**settings):
        stores.append(EventStore(where, **settings))
        return stores[-1]

    yield another
    for store in stores:
        store.close()


def event(item, user="u", after=0.0, **more):
    return Event(user=user, item=item, timestamp=NOON + after, **more)


def test_order_values_and_ties(opened):
    store = opened()
    assert store.append([event("late", after=5), event("other", user="v")]) == 2
    store.append([event("early", after=1.25, action="view", value=2.5), event("tie", after=5), event("tie 2", after=5)])
    mine = store.history(["u"])
    assert mine.item == ["early", "late", "tie", "tie 2"]  # of one moment: in the order in which they came
    assert mine.time_ms.tolist() == [1_700_000_001_250, *[1_700_000_005_000] * 3]
    assert mine.action == ["view", None, None, None]
    assert mine.value.tolist() == [2.5, 1.0, 1.0, 1.0]
    assert mine.value.dtype == np.float32
    assert mine.time_ms.dtype == np.int64
    assert len(store.history(["nobody"])) == 0


def test_many_users_in_the_order_of_the_question(opened):
    store = opened(max_per_user=3)
    store.append([event(f"i{n}", user=f"u{n % 601}", after=n) for n in range(2_404)])
    asked = ["u3", "nobody", "u600", "u3", *(f"u{n}" for n in range(601))]
    found = store.history(asked)
    items = [[item for item, place in zip(found.item, found.user) if place == wanted] for wanted in range(5)]
    third = ["i604", "i1205", "i1806"]
    assert items == [third, [], ["i1201", "i1802", "i2403"], third, ["i601", "i1202", "i1803"]]
    assert len(found) == 3 * 604
    assert store.history(["u3"]).item == third
    assert len(store) == 2_404


def test_users_stand_in_the_order_of_their_first_event(opened):
    store = opened()
    assert store.users() == []
    store.append([event("i", user=user, after=-n) for n, user in enumerate(["v", "u", "v", "B", "u"])])
    store.append([event("i", user="a", after=-99)])
    assert store.users() == ["v", "u", "B", "a"]


def test_an_event_id_is_kept_once(opened):
    store = opened()
    sent = [event("a", event_id="1"), event("b")]
    assert store.append(sent) == 2
    assert store.append(sent) == 1  # only the one without a number is new
    assert store.append([event("a", event_id="2"), event("again", event_id="2")]) == 1
    assert store.append([]) == 0
    assert store.history(["u"]).item == ["a", "b", "b", "a"]


@pytest.mark.parametrize(
    "bad",
    [
        {"user": ""},
        {"item": "x" * 513},
        {"user": "nul\0"},
        {"item": "half \ud800"},
        {"action": "\0"},
        {"event_id": "y" * 2_000},
        {"timestamp": float("nan")},
        {"timestamp": NOON * 1000},
        {"value": float("inf")},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_what_no_database_would_take_is_refused_with_its_place(opened, bad):
    store = opened()
    good = event("a")
    with pytest.raises(DataError, match="event 1: "):
        store.append([good, replace(good, **bad), good])
    assert len(store) == 0


def test_ids_of_every_script_and_the_longest_ones_come_back(opened):
    store = opened()
    names = ["Ünï", "用户", "🙂" * 512, "a'b\"; DROP TABLE events; --", "%s :user {} \\", " "]
    store.append([event(name, user=name, event_id=name, action=name) for name in names])
    for name in names:
        mine = store.history([name])
        assert (mine.item, mine.action) == ([name], [name])


def test_what_one_server_acknowledged_the_other_reads_at_once(opened):
    first, second = opened(), opened()
    for n in range(20):
        first.append([event(f"a{n}", after=2 * n)])
        began = time.perf_counter()
        assert second.history(["u"]).item[-1] == f"a{n}"
        assert time.perf_counter() - began < 1.0
        second.append([event(f"b{n}", after=2 * n + 1)])
        assert first.history(["u", "v"]).item[-1] == f"b{n}"


def test_servers_that_start_together_make_one_table(where):
    stores, errors = [], []

    def start():
        try:
            stores.append(EventStore(where))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for n, store in enumerate(stores):
        store.append([event(f"i{n}")])
    assert len(stores[0]) == 6
    for store in stores:
        store.close()


def test_numbers_grow_in_the_order_in_which_events_can_be_read(opened):
    """Whoever reads "all after number n" must not miss an append that took its number earlier and was committed later."""
    stores = [opened() for _ in range(3)]
    done = threading.Event()

    def write(store, name):
        for n in range(30):
            store.append([event(f"{n}", user=name) for _ in range(5)])

    writers = [threading.Thread(target=write, args=(store, str(n))) for n, store in enumerate(stores)]
    reader, mark, seen = opened(), 0, 0

    def newer(connection):
        wanted = text("SELECT max(id), count(*) FROM events WHERE id > :mark")
        return connection.execute(wanted, {"mark": mark}).one()

    for writer in writers:
        writer.start()
    while not done.is_set():
        if not any(writer.is_alive() for writer in writers):
            done.set()
        highest, count = reader._database.read(newer)
        mark, seen = highest or mark, seen + count
    assert seen == len(reader) == 3 * 30 * 5


def test_an_append_takes_its_numbers_when_it_has_its_turn(postgres):
    """While another append is not committed, the next one has no numbers yet; else its events could be read before lower numbers."""
    store, other = EventStore(postgres.schema()), EventStore(postgres.url())
    last = text("SELECT last_value FROM events_id_seq")
    store.append([event("a")])
    with other._database.engine.connect() as holding:
        holding.execute(text(f"SELECT pg_advisory_xact_lock({LOCK_SPACE}, 1)"))
        waiting = threading.Thread(target=store.append, args=([event("b"), event("c")],))
        waiting.start()
        time.sleep(0.3)
        assert waiting.is_alive()
        assert store._database.read(lambda connection: connection.scalar(last)) == 1
        holding.rollback()
        waiting.join(5)
    assert store._database.read(lambda connection: connection.scalar(last)) == 3
    assert store.history(["u"]).item == ["a", "b", "c"]
    store.close()
    other.close()


def test_a_user_is_forgotten(opened):
    store = opened()
    store.append([event("a"), event("b", user="v"), event("c")])
    assert store.forget("u")[0] == 2
    assert store.forget("u")[0] == 0
    assert (store.users(), len(store)) == (["v"], 1)


def test_another_table_of_that_name_is_refused(where, tmp_path):
    from shortlist.store.databases import Database

    database = Database(where, sync="full", what="a test")
    database.write(lambda connection: connection.execute(text("CREATE TABLE events (id INTEGER, name VARCHAR(20))")))
    database.close()
    with pytest.raises(DataError, match=r"can not be used as an event store: .*user_id"):
        EventStore(where)


WRITER = """
import sys, time
from shortlist.store.events import Event, EventStore, StoreUnavailable
store = EventStore(sys.argv[1])
number = 0
while True:
    batch = [Event(user="u%d" % (number % 5), item="%d-%d" % (number, i), timestamp=1.7e9 + number, event_id="%d-%d" % (number, i))
             for i in range(10)]
    try:
        store.append(batch)
    except StoreUnavailable:
        print("gone", flush=True)
        time.sleep(0.05)
        continue  # sent again under the same numbers
    print(number, flush=True)
    number += 1
"""


def writing(where):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, where], stdout=subprocess.PIPE, text=True, env=environment, bufsize=1
    )


def assert_whole(where, acknowledged):
    """Every acknowledged batch is there once, and no batch in part."""
    store = EventStore(where, max_per_user=10**6)
    kept = store.history([f"u{n}" for n in range(5)]).item
    assert len(kept) == len(set(kept))
    assert set(kept) >= {f"{number}-{n}" for number in acknowledged for n in range(10)}
    assert len(kept) % 10 == 0
    store.close()


def test_kill_9_of_the_writer_loses_nothing_acknowledged(where):
    writer = writing(where)
    lines = [writer.stdout.readline() for _ in range(40)]
    writer.kill()
    lines += writer.stdout.readlines()
    writer.wait()
    assert_whole(where, [int(line) for line in lines if line.endswith("\n") and line != "gone\n"])


def test_kill_9_of_the_database_loses_nothing_acknowledged_and_is_recovered_from(postgres):
    where = postgres.schema()
    writer, lines = writing(where), []
    reading = threading.Thread(target=lambda: lines.extend(writer.stdout))
    reading.start()
    try:
        for _ in range(3):
            before = len(lines)
            _wait_for(lambda before=before: len(lines) > before + 15)
            postgres.kill()
            _wait_for(lambda: "gone\n" in lines[-3:])
            postgres.start()
            back = len(lines)
            _wait_for(lambda back=back: any(line != "gone\n" for line in lines[back:]))
    finally:
        writer.kill()
        writer.wait()
        reading.join()
        if not postgres.answers():
            postgres.start()
    acknowledged = [int(line) for line in lines if line.endswith("\n") and line != "gone\n"]
    assert acknowledged == list(range(len(acknowledged)))
    assert_whole(where, acknowledged)


def test_a_store_without_its_server_says_so_at_once_and_works_again_by_itself(postgres):
    store = EventStore(postgres.schema())
    store.append([event("a")])
    postgres.kill()
    try:
        with pytest.raises(StoreUnavailable, match=r"postgresql://127\.0\.0\.1:\d+/postgres can not be used: "):
            store.append([event("lost")])
        began = time.perf_counter()
        for _ in range(20):
            with pytest.raises(StoreUnavailable):
                store.history(["u"])
        assert time.perf_counter() - began < 1.0
    finally:
        postgres.start()
    _wait_for(lambda: _works(store))
    assert store.append([event("b", after=1)]) == 1
    assert store.history(["u"]).item == ["a", "b"]
    store.close()


def test_a_hanging_database_holds_up_one_request_at_a_time(postgres):
    store = EventStore(postgres.schema(), patience_s=0.5)
    store.append([event("a")])
    postgres.pause(True)
    try:
        times = []
        for _ in range(10):
            began = time.perf_counter()
            with pytest.raises(StoreUnavailable):
                store.history(["u"])
            times.append(time.perf_counter() - began)
        assert max(times) < 6.0
        assert sorted(times)[5] < 0.01
    finally:
        postgres.pause(False)
    _wait_for(lambda: _works(store))
    assert store.append([event("b", after=1)]) == 1
    assert store.history(["u"]).item == ["a", "b"]
    slow = text("SELECT pg_sleep(3)")
    with pytest.raises(StoreUnavailable, match="statement timeout"):
        store._database.read(lambda connection: connection.execute(slow))
    store.close()


def test_a_restart_between_two_requests_is_not_noticed(postgres):
    store = EventStore(postgres.schema())
    store.append([event("a")])
    postgres.kill()
    postgres.start()
    assert store.append([event("b", after=1)]) == 1
    assert store.history(["u"]).item == ["a", "b"]
    store.close()


def test_connections_cut_in_the_middle_of_work_are_replaced(postgres):
    """The server ends the connection while a statement runs on it: the work is done again on another one."""
    store, killer = EventStore(postgres.schema()), EventStore(postgres.url())
    attempts = []

    def work(connection):
        attempts.append(connection.scalar(text("SELECT pg_backend_pid()")))
        if len(attempts) == 1:
            killer._database.read(lambda c: c.scalar(text(f"SELECT pg_terminate_backend({attempts[0]}, 5000)")))
        return connection.scalar(text("SELECT 17"))

    assert store._database.write(work) == 17
    assert len(set(attempts)) == 2
    store.close()
    killer.close()


def test_postgres_waits_for_its_disk_whatever_its_default_is(postgres):
    store = EventStore(f"{postgres.schema()}%20-c%20synchronous_commit%3Doff%20-c%20work_mem%3D5MB", sync="normal")
    settings = store._database.read(
        lambda c: [c.scalar(text(f"SHOW {name}")) for name in ("synchronous_commit", "work_mem")]
    )
    assert settings == ["on", "5MB"]
    store.close()


def test_urls_that_can_not_be_used_are_refused_without_their_password(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"SQLite file .* or on PostgreSQL .* not on 'mysql'") as refused:
        EventStore("mysql://me:secret@host/db")
    assert "secret" not in str(refused.value)
    with pytest.raises(ConfigError, match="can not be read; write postgresql://") as refused:
        EventStore("postgresql://me:secret@host:port/db")
    assert "secret" not in str(refused.value)
    with pytest.raises(
        DataError, match=r"postgresql://127\.0\.0\.1:1/db can not be used as an event store: "
    ) as refused:
        EventStore("postgresql://me:secret@127.0.0.1:1/db")
    assert "secret" not in str(refused.value)

    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(shortlist.extras, "import_module", missing)
    with pytest.raises(ConfigError, match=r"an event store on PostgreSQL needs .*pip install 'shortlist\[postgres\]'"):
        EventStore("postgresql://host/db")


def _wait_for(what, limit_s=20.0):
    deadline = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def _works(store):
    try:
        store.history(["u"])
    except StoreUnavailable:
        return False
    return True
