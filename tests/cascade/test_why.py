"""Why a page looked as it did: what was logged stands, and what moved a score is what leaving it out changes."""

import time

import polars as pl
import pytest
import torch

from engine_support import RUN, after, prepared_cascade, shop_frames, shop_live
from shortlist.cascade.cascade import Chain
from shortlist.cascade.engine import Engine
from shortlist.cascade.live import Live
from shortlist.cascade.request_log import RequestLog
from shortlist.cascade.rules import Filter, Pin, Quota, Rules
from shortlist.cascade.why import _variants, why
from shortlist.data.batches import request_batch
from shortlist.data.dataset import build_dataset
from shortlist.data.jagged import Jagged
from shortlist.data.log import read
from shortlist.errors import ConfigError
from shortlist.store.events import Event, EventStore

torch.set_num_threads(1)
FOLLOWED = RUN.replace('systems = ["counts"]\nkeep = 15', 'systems = ["counts", "popularity"]\nkeep = 15')


@pytest.fixture
def engine(tmp_path):
    with Engine(
        shop_live(), events=EventStore(tmp_path / "events.db"), request_log=RequestLog(tmp_path / "requests.db")
    ) as engine:
        yield engine


def ids(answer):
    return [item.item_id for item in answer.items]


def last_item(user):
    events, _ = shop_frames()
    return events.filter(events["user_id"] == user)["item_id"][-1]


def test_a_page_is_told_as_it_was_logged(engine):
    rules = Rules(deny=["101"], pins=(Pin(item="142", position=2),), quotas=(Quota(field="shelf", most=2),))
    answer = engine.recommend("user-3", rules=rules)
    told = why(engine, answer.request_id)
    assert [item.item_id for item in told.items] == ids(answer)
    assert [item.title for item in told.items] == [item.title for item in answer.items]
    assert (told.user, told.chain, told.snapshot_version) == ("user-3", answer.chain, answer.snapshot_version)
    assert (dict(told.removed), dict(told.arranged)) == (dict(answer.removed), dict(answer.arranged))
    assert told.rules["deny"] == ["101"]
    assert [item.pinned for item in told.items] == [False, True, False, False, False, False]
    assert told.notes == ()
    assert told.degraded is None
    for item, shown in zip(told.items, answer.items):
        assert {kept.stage: kept.score for kept in item.stages} == pytest.approx(dict(shown.scores))
    first = told.items[0]
    assert {found.system for found in first.found} == {"counts", "popularity"}
    assert next(found.place for found in first.found if found.system == "counts") == 1
    assert [kept.place for kept in first.stages][-1] == 1


def test_what_moved_a_score_is_what_leaving_it_out_changes(engine):
    """The next item on the ring is there for the last item: without that event its score falls the most."""
    answer = engine.recommend("user-3", rules=Rules(seen="drop"))
    told = why(engine, answer.request_id)
    assert told.scored_by == "ranking"
    first = told.items[0]
    assert first.item_id == after(last_item("user-3"))
    strongest = first.events[0]
    assert strongest.item_id == last_item("user-3")
    assert strongest.times == 1
    assert strongest.by > 0
    assert first.near[0].item_id == last_item("user-3")
    # the same by hand: the ranking's score of that item with and without the event
    live = engine.live
    history = [(event.item_id, event.timestamp) for event in reversed(engine.history("user-3", 100))]
    scores = [
        engine.recommend("visitor", 1, history=past, candidates=[str(first.item_id)], at=told.at_ms / 1e3)
        .items[0]
        .scores["ranking"]
        for past in (history, history[:-1])
    ]
    assert strongest.by == pytest.approx(scores[0] - scores[1], rel=1e-4)
    assert live.cascade.config.stages[1].name == "ranking"


def test_events_that_came_later_change_nothing(engine):
    answer = engine.recommend("user-3")
    before = why(engine, answer.request_id)
    time.sleep(1.1)
    engine.record([Event(user="user-3", item="110", timestamp=time.time())])
    after_it = why(engine, answer.request_id)
    assert [item.events for item in after_it.items] == [item.events for item in before.items]
    assert not any(event.item_id == 110 for item in after_it.items for event in item.events)


def test_a_request_s_own_history_and_candidates_are_asked_again(engine):
    answer = engine.recommend("visitor", 2, history=["120", "130"], candidates=["121", "131", "105"])
    told = why(engine, answer.request_id)
    assert [item.item_id for item in told.items] == ids(answer)
    by_item = {item.item_id: item for item in told.items}
    assert by_item[131].events[0].item_id == 130
    assert by_item[121].events[0].item_id == 120


def test_fields_of_user_and_request_are_left_out_one_by_one(engine):
    events, items = shop_frames()
    users = pl.DataFrame({"user_id": sorted(events["user_id"].unique())}).with_columns(
        city=pl.Series(["Rome", "Oslo"] * 25)
    )
    dataset = build_dataset(read(events, items=items, users=users))
    live = Live(dataset, prepared_cascade(dataset), "one")
    histories, requests = dataset.requests_for(["user-3"], at=live.log_end)
    batch = request_batch(histories, live.user_fields, requests, max_history=50)
    name = next(iter(batch.user_fields))
    past = torch.tensor(dataset.item_ids.encode([str(last_item("user-3"))]))
    many = _variants(batch, past, [("user", name), ("request", "hour")])
    assert many.size == 4
    assert many.key == ()
    number = len(batch.history.items.values)
    assert many.history.items.lengths.tolist() == [number, number - 1, number, number]
    assert past[0] not in many.history.items.select(torch.tensor([1])).values
    assert len(many.history.time) == len(many.history.items.values)
    value = int(batch.user_fields[name][0])
    assert value > 0
    assert many.user_fields[name].tolist() == [value, value, 0, value]
    hour = int(batch.context["hour"][0])
    assert many.context["hour"].tolist() == [hour, hour, hour, 0]
    part = Chain("part", live.cascade.config.default_chain.actions[:2])
    candidates = Jagged.from_rows([[1, 2, 3]] * 4)
    assert len(live.cascade.run(many, k=3, candidates=candidates, chain=part).traces) == 2


def test_what_became_of_an_item(engine):
    """By the rule that kept it away, or the stage that lost it."""
    seen = last_item("user-3")
    rules = Rules(deny=["101"], filters=(Filter(field="price", at_most=5),), seen="drop")
    answer = engine.recommend("user-3", rules=rules)

    def became(item):
        told = why(engine, answer.request_id, item)
        assert told.asked.item_id == item
        return told.asked

    first = ids(answer)[0]
    assert (became(first).place, became(first).lost_by, became(first).rules) == (1, None, ())
    assert became(first).title == answer.items[0].title
    assert became("nowhere").lost_by == "catalogue"
    assert became(101).lost_by == "deny"
    assert became(106).lost_by == "filters.price"  # its price is 6
    assert seen - 100 < 40
    assert "seen" in became(seen).rules
    stages = engine.request_log.find(answer.request_id)["stages"]
    by_name = {stage["name"]: stage["items"] for stage in stages}
    lost = next(item for item in by_name["retrieval"] if item not in by_name["ranking"])
    assert (became(lost).last_stage, became(lost).lost_by) == ("retrieval", "ranking")
    late = next(item for item in by_name["ranking"] if item not in by_name["re-ranking"])
    assert became(late).lost_by == "re-ranking"
    assert why(engine, answer.request_id).asked is None
    own = engine.recommend("user-3", 2, candidates=["120", "121"])
    assert why(engine, own.request_id, 130).asked.lost_by == "candidates"


def test_another_snapshot_tells_what_it_can(engine):
    answer = engine.recommend("user-3", rules=Rules(filters=(Filter(field="shelf", equals="shelf-1"),)))
    engine._live = shop_live(seed=1, version="two")
    told = why(engine, answer.request_id)
    assert [item.item_id for item in told.items] == ids(answer)
    assert "answered by snapshot one" in told.notes[0]
    assert told.items[0].stages


def test_the_last_resort_is_told_from_the_log_alone(engine):
    def broken(*_, **__):
        raise RuntimeError("out of order")

    run, engine.live.cascade.run = engine.live.cascade.run, broken
    answer = engine.recommend("user-3")
    engine.live.cascade.run = run
    told = why(engine, answer.request_id)
    assert told.chain == "popular"
    assert [item.item_id for item in told.items] == ids(answer)
    assert "could not be asked again" in told.notes[0]
    assert told.items[0].events == ()
    assert told.to_dict()["items"][0]["item_id"] == ids(answer)[0]


def test_what_is_not_in_the_log_is_none_and_without_a_log_it_is_refused(engine):
    assert why(engine, "no such request") is None
    with Engine(shop_live(text=FOLLOWED)) as bare, pytest.raises(ConfigError, match="no request log"):
        why(bare, "x")
