"""News of items and users: kept, merged, found again by another process, and really gone when deleted."""

from __future__ import annotations

import sqlite3
import threading

import pytest

from shortlist.errors import DataError
from shortlist.store.catalogue import CatalogueStore, ItemNow, ItemUpdate, digest
from shortlist.store.erasing import erase
from shortlist.store.events import EVENTS, Event, EventStore


@pytest.fixture
def store(tmp_path):
    store = CatalogueStore(tmp_path / "now.db")
    yield store
    store.close()


def test_what_is_left_out_stays_as_it_was(store):
    store.upsert_items([ItemUpdate(item="a", title="Mug", attributes={"price": 3, "tags": ["x", "y"]})])
    store.upsert_items([ItemUpdate(item="a", attributes={"price": None, "colour": "red"}), ItemUpdate(item="b")])
    kept = {item.item: item for item in store.items()}
    assert kept["a"] == ItemNow(
        item="a", title="Mug", attributes={"price": None, "tags": ["x", "y"], "colour": "red"}, available=True
    )
    assert kept["b"].title is None


def test_one_body_may_name_an_item_twice(store):
    store.upsert_items(
        [ItemUpdate(item="a", attributes={"x": 1}), ItemUpdate(item="a", title="T", attributes={"y": 2})]
    )
    assert store.items() == [ItemNow(item="a", title="T", attributes={"x": 1, "y": 2}, available=True)]


def test_removed_items_keep_what_is_known_and_come_back(store):
    store.upsert_items([ItemUpdate(item="a", title="Mug")])
    store.remove_items(["a", "never seen", "a"])
    assert {item.item: item.available for item in store.items()} == {"a": False, "never seen": False}
    store.upsert_items([ItemUpdate(item="a")])
    assert {item.item: (item.available, item.title) for item in store.items()}["a"] == (True, "Mug")


def test_another_process_finds_what_is_new(store, tmp_path):
    other = CatalogueStore(tmp_path / "now.db")
    store.upsert_items([ItemUpdate(item="a"), ItemUpdate(item="b")])
    first = other.changes()
    assert [item.item for item in first.items] == ["a", "b"]
    assert other.changes(first.mark).items == []
    store.upsert_items([ItemUpdate(item="a", title="New")])
    store.forget_user("u1")
    store.forget_user("u1")
    second = other.changes(first.mark)
    assert [item.title for item in second.items] == ["New"]
    assert second.gone == [digest("u1")]
    other.close()
    again = CatalogueStore(tmp_path / "now.db")
    assert len(again.items()) == 2
    again.close()


def test_users_have_attributes_until_they_are_forgotten(store):
    assert not store.changes().any_users
    store.upsert_users({"u1": {"age": 3}, "u2": {"age": 4}})
    store.upsert_users({"u1": {"city": "Rome"}})
    assert store.users(["u1", "u3"]) == {"u1": {"age": 3, "city": "Rome"}}
    assert store.changes().any_users
    assert store.forget_user("u1")
    assert store.users(["u1", "u2"]) == {"u2": {"age": 4}}


def test_bad_input_changes_nothing(store):
    for bad in (
        ItemUpdate(item=""),
        ItemUpdate(item="x" * 513),
        ItemUpdate(item="a", attributes={"x": float("nan")}),
        ItemUpdate(item="a", attributes={str(i): i for i in range(201)}),
        ItemUpdate(item="a", attributes={"x": "y" * 70_000}),
        ItemUpdate(item="a", attributes={"x": object()}),
        ItemUpdate(item="a", attributes={"x": "half a character: \ud800"}),
        ItemUpdate(item="a", title="\ud800"),
        ItemUpdate(item="\ud800"),
    ):
        with pytest.raises(DataError, match="item"):
            store.upsert_items([ItemUpdate(item="fine"), bad])
    assert store.items() == []


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("no database")
    with pytest.raises(DataError, match=r"notes\.txt"):
        CatalogueStore(path)
    assert path.read_text() == "no database"
    with pytest.raises(DataError, match="not a folder"):
        CatalogueStore(tmp_path / "missing" / "x.db")


def test_many_threads_write_at_once(store):
    def write(number):
        for i in range(20):
            store.upsert_items([ItemUpdate(item=f"{number}-{i}", attributes={"n": i})])

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.items()) == 80


# -- gone for good ----------------------------------------------------------------------------------------------------


def all_bytes(path):
    """Of a database file and the logs beside it."""
    return b"".join(part.read_bytes() for part in path.parent.glob(f"{path.name}*"))


def test_no_byte_of_a_forgotten_user_is_left(tmp_path):
    """Enough events that pages split, written in an order that mixes users; ids are found as bytes before and not after."""
    path = tmp_path / "events.db"
    events, catalogue = EventStore(path), CatalogueStore(path)
    for part in range(10):
        events.append(
            [
                Event(
                    user=f"person-{i % 7}-secret",
                    item=f"item-{i}",
                    timestamp=1e9 + 100 * part + i,
                    event_id=f"n-{i % 7}-{part}-{i}",
                )
                for i in range(100)
            ]
        )
    catalogue.upsert_users({"person-3-secret": {"city": "hidden-place"}})
    assert b"person-3-secret" in all_bytes(path)
    assert b"hidden-place" in all_bytes(path)
    num_events, anew = events.forget("person-3-secret")
    assert (num_events, anew) == (140, True)
    assert catalogue.forget_user("person-3-secret")
    left = all_bytes(path)
    for gone in (b"person-3-secret", b"hidden-place", b"n-3-"):
        assert gone not in left
    assert b"person-4-secret" in left
    assert len(events) == 860
    assert events.forget("person-3-secret") == (0, True)
    events.append([Event(user="person-3-secret", item="item-1", timestamp=2e9)])
    assert len(events.history(["person-3-secret"])) == 1
    events.close()
    catalogue.close()


def test_a_large_file_is_not_written_anew_but_its_rows_are_gone(tmp_path, monkeypatch):
    monkeypatch.setattr("shortlist.store.erasing.MAX_VACUUM_BYTES", 0)
    store = EventStore(tmp_path / "events.db")
    store.append([Event(user="gone-soon", item="a", timestamp=1.0), Event(user="stays", item="a", timestamp=1.0)])
    assert store.forget("gone-soon") == (1, False)
    assert b"gone-soon" not in all_bytes(tmp_path / "events.db")
    assert len(store) == 1
    store.close()


def test_a_failed_deletion_deletes_nothing(tmp_path):
    from sqlalchemy import delete, text

    store = EventStore(tmp_path / "events.db")
    store.append([Event(user="u", item="a", timestamp=1.0)])
    wrong = delete(EVENTS).where(text("no_such_column = 1"))
    with pytest.raises(Exception, match="no_such_column"):
        erase(store._database.engine, store.path, [delete(EVENTS), wrong])
    assert len(store) == 1
    store.close()
    with sqlite3.connect(tmp_path / "events.db") as connection:
        assert connection.execute("SELECT count(*) FROM events").fetchone() == (1,)
