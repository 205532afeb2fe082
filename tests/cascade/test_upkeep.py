"""News over a run: titles, attributes and availability at once, kept over restarts and swaps, and users who are really forgotten."""

from __future__ import annotations

import time

import polars as pl
import pytest
import torch

from engine_support import after, prepared_cascade, shop_frames, shop_live
from shortlist.cascade.engine import Engine
from shortlist.cascade.live import Live
from shortlist.cascade.request_log import RequestLog
from shortlist.cascade.rules import Filter, Rules
from shortlist.cascade.upkeep import Upserted
from shortlist.data.dataset import build_dataset
from shortlist.data.log import read
from shortlist.store.catalogue import CatalogueStore, ItemUpdate
from shortlist.store.events import Event, EventStore
from shortlist.store.summaries import SummaryHead, SummaryStore, SummaryWriter

torch.set_num_threads(1)


def opened(folder, live=None, name="events.db"):
    return Engine(
        live or shop_live(),
        events=EventStore(folder / name),
        request_log=RequestLog(folder / "requests.db"),
        catalogue=CatalogueStore(folder / name),
    )


@pytest.fixture
def engine(tmp_path):
    with opened(tmp_path) as engine:
        yield engine


def ids(answer):
    return [item.item_id for item in answer.items]


def last_item(user):
    events, _ = shop_frames()
    return events.filter(events["user_id"] == user)["item_id"][-1]


def all_bytes(folder):
    return b"".join(path.read_bytes() for path in folder.iterdir() if path.is_file())


def test_titles_and_attributes_count_at_once_and_after_a_restart(engine, tmp_path):
    first = str(after(last_item("user-3")))
    told = engine.upkeep.upsert_items(
        engine.live,
        [
            ItemUpdate(item=first, title="A new name", attributes={"shelf": "shelf-0", "price": 6, "colour": "red"}),
            ItemUpdate(item="brand new", title="Not in the run"),
        ],
    )
    assert told == Upserted(num_kept=2, num_unknown=1, num_unknown_attributes=1)
    only = Rules(filters=(Filter(field="shelf", equals="shelf-0"), Filter(field="price", equals=6)), seen="keep")

    def check(asked):
        answer = asked.recommend("user-3", 40, rules=only)
        assert int(first) in ids(answer)
        assert next(item.title for item in answer.items if item.item_id == int(first)) == "A new name"

    check(engine)
    by_words = Rules(filters=(Filter(field="title_words", equals="number"),), allow=[first], seen="keep")
    assert ids(engine.recommend("user-3", rules=by_words)) == []
    engine.upkeep.upsert_items(engine.live, [ItemUpdate(item="110", attributes={"title": "Told as a column"})])
    assert engine.live.title(int(engine.live.items(["110"])[0])) == "Told as a column"
    with opened(tmp_path) as again:
        check(again)
        assert again.upkeep.store.items()[1].title == "Not in the run"


def test_an_item_that_is_gone_is_never_shown_until_it_is_told_of_again(engine):
    first = after(last_item("user-3"))
    assert first in ids(engine.recommend("user-3"))
    engine.upkeep.remove_items(engine.live, [str(first), "nobody's"])
    for answer in (
        engine.recommend("user-3", 43, rules=Rules(seen="keep")),
        engine.recommend("user-3", candidates=[str(first), "110"]),
        engine.recommend_many(["user-3"], 43)[0],
    ):
        assert first not in ids(answer)
        assert answer.removed["unavailable"] == 1
    engine.upkeep.upsert_items(engine.live, [ItemUpdate(item=str(first))])
    answer = engine.recommend("user-3")
    assert first in ids(answer)
    assert "unavailable" not in answer.removed


def test_another_server_over_the_same_file_follows_within_about_a_second(engine, tmp_path):
    first = after(last_item("user-3"))
    with opened(tmp_path) as other:
        other.upkeep.remove_items(other.live, [str(first)])
        other.upkeep.forget_user(other.live, "user-5", None, None)
        deadline = time.monotonic() + 3
        while first in ids(engine.recommend("user-3")) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert first not in ids(engine.recommend("user-3"))
        assert engine.recommend("user-5").num_history == 0


def test_a_run_that_is_swapped_in_is_told_everything(engine):
    engine.upkeep.remove_items(engine.live, ["110"])
    engine.upkeep.forget_user(engine.live, "user-5", None, None)
    live = shop_live(version="two")
    engine.upkeep.apply(live)
    with_two = Engine(live)
    assert 110 not in ids(with_two.recommend("user-3", 43, rules=Rules(seen="keep")))
    assert with_two.recommend("user-5").num_history == 0


def test_a_forgotten_user_is_wiped_and_unknown(engine, tmp_path):
    engine.record([Event(user=u, item="110", timestamp=time.time()) for u in ("user-5", "user-6", "user-5")])
    told = {u: engine.recommend(u) for u in ("user-5", "user-6")}
    engine.upkeep.upsert_users(engine.live, {"user-5": {"city": "hidden-place"}})
    engine.live.cascade.memories.put("counts", ["user-5"], [{"x": torch.zeros(1)}])
    engine.request_log.flush()
    done = engine.forget("user-5")
    assert (done.in_snapshot, done.num_events, done.num_requests, done.written_anew) == (True, 2, 1, True)
    assert engine.live.cascade.memories.get("counts", ["user-5"]) == [None]
    assert engine.request_log.find(told["user-5"].request_id) is None
    assert engine.request_log.find(told["user-6"].request_id) is not None
    left = all_bytes(tmp_path)
    assert b"user-5" not in left
    assert b"hidden-place" not in left
    assert b"user-6" in left
    nobody = engine.recommend("nobody at all")
    answer = engine.recommend("user-5")
    assert answer.num_history == 0
    assert ids(answer) == ids(nobody)
    assert engine.history("user-5") == []
    assert engine.recommend("user-6").num_history > 1
    # who comes back is a new person
    engine.record([Event(user="user-5", item="120", timestamp=time.time())])
    back = engine.recommend("user-5")
    assert back.num_history == 1
    assert ids(back)[0] == 121
    with opened(tmp_path) as again:
        assert again.recommend("user-5").num_history == 1


def test_forgetting_again_or_somebody_unknown_is_no_error(engine):
    for user in ("user-5", "user-5", "nobody"):
        done = engine.upkeep.forget_user(engine.live, user, engine.events, engine.request_log)
        assert done.num_events == 0
    assert not done.in_snapshot


def test_a_forgotten_user_is_remembered_under_another_key(engine):
    before = engine.live.key("user-5")
    engine.upkeep.forget_user(engine.live, "user-5", None, None)
    assert engine.live.key("user-5") != before
    assert engine.live.key("user-6") == "user-6"


def test_a_summary_is_wiped_in_its_file(tmp_path):
    import numpy as np

    head = SummaryHead(version="v", system="s", num_tokens=2, width=3)
    keys = [f"user-{i}" for i in range(9)]
    columns = {
        "code": np.full((9, 2, 3), 77, dtype=np.int8),
        "scale": np.ones((9, 2), dtype=np.float32),
        "time": np.full(9, 1234567),
        "num_events": np.arange(9),
    }
    with SummaryWriter(tmp_path / "s", head, keys) as writer:
        writer.append(columns)
        writer.finish()
    store = SummaryStore.open(tmp_path / "s", version="v")
    assert store.forget("user-4")
    assert not store.forget("user-4")
    assert not store.forget("nobody")
    assert not store.renewed()
    again = SummaryStore.open(tmp_path / "s", version="v")  # the digest is that of the new content
    for opened_store in (store, again):
        found = opened_store.get(keys)
        assert [memory is None for memory in found] == [i == 4 for i in range(9)]
        assert int(found[5]["num_events"]) == 5
    assert (tmp_path / "s").read_bytes().count(bytes([77]) * 6) == 8


def test_user_attributes_are_read_from_the_next_answer_on(tmp_path):
    events, items = shop_frames()
    people = sorted(events["user_id"].unique())
    users = pl.DataFrame({"user_id": people, "city": [["Rome", "Oslo"][i % 2] for i in range(len(people))]})
    dataset = build_dataset(read(events, items=items, users=users))
    with opened(tmp_path, Live(dataset, prepared_cascade(dataset), "one")) as engine:
        city = next(f for f in dataset.schema.of("user") if f.column == "city")

        def seen(*names):
            from shortlist.cascade.questions import Asked

            known = engine._known(engine.live, Asked(users=names, k=3), [])
            return known.batch.user_fields[city.name].tolist()

        rome, oslo = city.vocabulary.encode(["Rome", "Oslo"]).tolist()
        assert seen(people[0], "stranger", people[1]) == [rome, 0, oslo]
        told = engine.upkeep.upsert_users(
            engine.live, {"stranger": {"city": "Oslo", "mood": "good"}, people[0]: {"city": "Oslo"}}
        )
        assert told == Upserted(num_kept=2, num_unknown=1, num_unknown_attributes=1)
        assert seen(people[0], "stranger", people[1]) == [oslo, oslo, oslo]
        assert len(ids(engine.recommend("stranger"))) == 6


def test_a_store_that_can_not_be_read_degrades_and_does_not_fail(engine, monkeypatch):
    from shortlist.store.events import StoreUnavailable

    def gone(*_):
        raise StoreUnavailable("disk is gone")

    monkeypatch.setattr(engine.upkeep.store, "changes", gone)
    engine.upkeep._looked = 0.0
    answer = engine.recommend("user-3")
    assert len(ids(answer)) == 6
    assert "changes of items are missing" in answer.degraded
