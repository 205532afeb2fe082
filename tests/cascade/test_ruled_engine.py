"""Rules through the engine: of a surface and of a request, alone and in batches, and a page whatever they ask."""

from __future__ import annotations

import pytest
import torch

from engine_support import DAY, FIRST_ITEM, RUN, after, raising, shop_frames, shop_live
from shortlist.cascade.engine import Engine
from shortlist.cascade.questions import Question
from shortlist.cascade.rules import Diversity, Filter, Mix, Pin, Quota, Rules
from shortlist.errors import ConfigError

torch.set_num_threads(1)
SURFACE = """
[rules]
deny = ["101"]
pins = [{ item = "142", position = 2 }]
quotas = [{ field = "shelf", most = 2 }]
"""


@pytest.fixture(scope="module")
def plain():
    with Engine(shop_live()) as engine:
        yield engine


@pytest.fixture(scope="module")
def surface():
    with Engine(shop_live(text=RUN + SURFACE)) as engine:
        yield engine


def ids(answer):
    return [item.item_id for item in answer.items]


def shelf(item):
    return (item - FIRST_ITEM) % 4


def events_of(user):
    events, _ = shop_frames()
    return events.filter(events["user_id"] == user).select("item_id", "timestamp").rows()


def test_a_surface_has_rules_and_a_request_puts_its_own_over_them(surface):
    answer = surface.recommend("user-3", 8)
    assert ids(answer)[1] == 142
    assert 101 not in ids(answer)
    assert max(map([shelf(i) for i in ids(answer)].count, range(4))) <= 2
    assert answer.removed["deny"] == 1
    assert answer.arranged["pins"] == 1
    assert answer.degraded is None
    own = surface.recommend("user-3", 8, rules=Rules(pins=(Pin(item="141"),), deny=["102"]))
    assert ids(own)[0] == 141
    assert 142 not in ids(own)[1:2]
    assert own.removed["deny"] == 2
    alone = surface.recommend("user-3", 8, rules=Rules(with_surface=False, quotas=()))
    assert alone.arranged == {}
    assert "deny" not in alone.removed


def test_filters_act_before_the_stages_so_the_page_is_full(plain):
    answer = plain.recommend("user-3", 8, rules=Rules(filters=(Filter(field="shelf", equals="shelf-2"),)))
    assert len(ids(answer)) == 8
    assert {shelf(i) for i in ids(answer)} == {2}
    assert answer.removed["filters.shelf"] == 43 - 11
    assert answer.stages[0].num_kept >= 8


def test_seen_within_some_days(plain):
    """One item a day: those of the last three days are left out, older ones may come again."""
    past = events_of("user-3")
    last = past[-1][1].timestamp()
    newest = {item for item, then in past if then.timestamp() >= last + 1 - 3 * DAY}
    older = {item for item, _ in past} - newest
    answer = plain.recommend("user-3", 43, rules=Rules(seen_days=3), at=last + 1)
    assert not newest & set(ids(answer))
    assert older <= set(ids(answer))
    assert answer.removed == {"seen_days": len(newest)}
    assert len(newest) == 3


def test_a_pin_passes_seen_but_not_deny(plain):
    seen = events_of("user-3")[-1][0]
    pin = (Pin(item=str(seen)),)
    assert ids(plain.recommend("user-3", rules=Rules(pins=pin, seen="drop")))[0] == seen
    denied = plain.recommend("user-3", rules=Rules(pins=pin, deny=[str(seen)]))
    assert seen not in ids(denied)
    assert denied.removed["pins"] == 1
    lost = plain.recommend("user-3", rules=Rules(pins=(Pin(item="nowhere"),)))
    assert lost.ignored["pins"] == 1
    assert len(ids(lost)) == 6


RULES = Rules(
    filters=(Filter(field="price", at_most=5),),
    pins=(Pin(item="110", position=3),),
    quotas=(Quota(field="shelf", most=3), Quota(field="shelf", value="shelf-1", least=2)),
    diversity=Diversity(relevance=0.6, fields=("shelf",)),
    mix=Mix(field="shelf", weight=0.3),
    seen_days=5,
)


def test_answers_in_a_batch_are_those_alone(plain):
    """The cascade's scores differ in the last digits with the batch, the page does not."""
    users = ["user-1", "user-9", "nobody", "user-20"]
    together = plain.answer([Question(user=user, k=7, rules=RULES) for user in users])
    for user, answer in zip(users, together):
        alone = plain.recommend(user, 7, rules=RULES)
        assert ids(answer) == ids(alone)
        assert (answer.removed, answer.arranged) == (alone.removed, alone.arranged)
        assert ids(answer)[2] == 110
        assert sum(shelf(i) == 1 for i in ids(answer)) >= 2
    many = plain.recommend_many(users, 7, rules=RULES)
    assert [ids(answer) for answer in many] == [ids(answer) for answer in together]


def test_candidates_of_the_request_are_all_there_is(plain):
    answer = plain.recommend(
        "user-3", 4, candidates=["101", "105", "109", "102"], rules=Rules(quotas=(Quota(field="shelf", most=1),))
    )
    assert len(ids(answer)) == 2
    assert 102 in ids(answer)


def test_a_broken_cascade_still_follows_the_rules(tmp_path):
    live = shop_live()
    live.cascade.run = raising
    with Engine(live) as engine:
        answer = engine.recommend("user-3", 6, rules=RULES)
        assert answer.chain == "popular"
        assert ids(answer)[2] == 110
        assert max(map([shelf(i) for i in ids(answer)].count, range(4))) <= 3


def test_a_fault_in_the_layout_leaves_the_order(monkeypatch, plain):
    live = shop_live(text=RUN + "[rules]\nmix = { field = 'shelf', weight = 1.0 }\n")
    monkeypatch.setattr(live.attributes, "sets", raising)
    with Engine(live) as engine:
        answer = engine.recommend("user-3", 5)
        assert ids(answer) == ids(plain.recommend("user-3", 5))
        assert "could not be laid out" in answer.degraded


def test_rules_that_can_not_be_followed_are_refused(plain):
    with pytest.raises(ConfigError, match="no field 'colour'"):
        plain.recommend("user-3", rules=Rules(filters=(Filter(field="colour", equals="red"),)))
    with pytest.raises(ConfigError, match="no field 'colour'"):
        shop_live(text=RUN + "[rules]\nfilters = [{ field = 'colour', equals = 'red' }]\n")
    assert ids(plain.recommend("user-3"))[0] == after(events_of("user-3")[-1][0])
