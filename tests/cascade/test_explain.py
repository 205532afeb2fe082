"""Explanations against what can be told in advance: the shop on a ring, the systems asked directly, pages of another length."""

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from engine_support import FIRST_ITEM, RUN, after, break_system, raising, shop_live
from shortlist.cascade.engine import Engine
from shortlist.cascade.explain import _likeness, explain
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Categorical, FieldTable, Numeric, Sequence, Vector

DAY = 86_400
NOW = 1_705_000_000
PLAIN = RUN.split("[stages.re-ranking]")[0]


@pytest.fixture(scope="module")
def engine():
    return Engine(shop_live())


def told(engine, user="user-3", k=4, **more):
    return explain(engine.traced(user, k, **more))


@pytest.mark.parametrize("user", ["user-3", "nobody", None])
def test_it_explains_the_very_page_that_is_served(engine, user):
    answer = engine.recommend(user, 6)
    explained = told(engine, user, 6)
    assert [item.item_id for item in explained.items] == [item.item_id for item in answer.items]
    for item, served in zip(explained.items, answer.items):
        assert {step.stage: step.score for step in item.steps} == pytest.approx(dict(served.scores))
    assert explained.num_history == answer.num_history
    json.dumps(explained.as_dict())


def test_found_by_is_the_place_on_the_systems_own_lists(engine):
    traced = engine.traced("user-3", 6)
    explained = explain(traced)
    live = traced.live
    for name in ("counts", "popularity"):
        alone = live.cascade.systems[name].retrieve(traced.batch, 25)
        listed = [live.id(row) for row in alone.rows[0].tolist()]
        for item in explained.items:
            (found,) = [f for f in item.found if f.system == name] or [None]
            assert (found is not None) == (item.item_id in listed)
            if found:
                assert (found.place, found.length) == (listed.index(item.item_id) + 1, 25)
                assert found.score == pytest.approx(float(alone.scores[0, found.place - 1]))
    first = explained.items[0]
    assert first.item_id == 115
    assert (first.found[0].system, first.found[0].place) == ("counts", 1)


def test_places_in_every_stage_are_by_its_scores(engine):
    traced = engine.traced("user-3", 6)
    for item in explain(traced).items:
        for step, trace in zip(item.steps, traced.page.traces, strict=True):
            better = int((trace.scores > step.score).sum())
            assert better < step.place <= step.kept == len(trace.rows.values)
        by_counts = item.steps[1].by_system["counts"]
        assert by_counts == item.steps[1].score == item.steps[0].by_system["counts"]


def test_the_nearest_event_is_the_one_before_on_the_ring(engine):
    explained = told(engine)
    assert explained.near_by == "counts, event by event"
    first = explained.items[0]
    assert [near.item_id for near in first.near] == [114, 113, 112]
    strengths = [near.strength for near in first.near]
    assert strengths == sorted(strengths, reverse=True)
    assert first.near[0].timestamp == 1_705_017_780  # 12 January 2024, 00:03, as in the log
    # Strength is what the cascade itself gives to a person who did this one thing.
    alone = engine.traced(None, 4, history=[(114, NOW)]).page.traces[0]
    row = int(engine.live.items([115])[0])
    assert strengths[0] == pytest.approx(float(alone.system_scores["counts"][alone.rows.values == row][0]))


def test_own_past_counts_events_occasions_and_days():
    engine = Engine(shop_live(text=RUN.replace("k = 6", 'k = 6\nrepeats = "yes"')))
    moments = [NOW - 5 * DAY, NOW - 5 * DAY, NOW - 3 * DAY, NOW - 2 * DAY]
    traced = engine.traced(None, 40, history=list(zip([120, 121, 120, 122], moments)))
    own = {item.item_id: item.own for item in explain(traced).items}
    age = (int(traced.batch.time[0]) - moments[2]) / DAY
    assert (own[120].times, own[120].groups) == (2, 2)
    assert own[120].since_last == pytest.approx(age)
    assert own[120].pair["pair_seen"] == 1
    assert own[120].pair["pair_gap"] == pytest.approx(np.log1p(2.0) / 6)
    assert (own[121].times, own[121].groups) == (1, 1)
    assert own[130].since_last is None
    assert own[130].pair == {}


def test_below_is_what_a_longer_page_would_have_shown():
    engine = Engine(shop_live(text=PLAIN))
    explained = told(engine, "user-3", 4)
    longer = [item.item_id for item in engine.recommend("user-3", 9).items]
    assert [item.item_id for item in explained.items] == longer[:4]
    assert [item.item_id for item in explained.below] == longer[4:]
    first = explained.below[0]
    assert (first.reached.stage, first.reached.place, first.dropped_by) == ("ranking", 5, "the end of the page")
    assert first.lowest_shown == explained.items[-1].steps[-1].score >= first.reached.score


def test_a_re_ranker_drops_what_ranking_let_through(engine):
    traced = engine.traced("user-3", 4)
    explained = explain(traced, num_below=20)
    shown = {item.item_id for item in explained.items}
    ranking = [traced.live.id(row) for row in traced.page.traces[1].rows.values.tolist()]
    assert [item.item_id for item in explained.below[:11]] == [item for item in ranking if item not in shown]
    assert {item.dropped_by for item in explained.below[:11]} == {"re-ranking"}
    assert {item.dropped_by for item in explained.below[11:]} == {"ranking"}
    assert len({item.item_id for item in explained.below} | shown) == 24
    assert explain(traced, num_below=0).below == ()


def test_vectors_are_compared_where_a_retriever_has_them():
    text = PLAIN.replace('["counts", "popularity"]', '["counts", "two-tower"]', 1)
    engine = Engine(shop_live(text=text))
    traced = engine.traced("user-3", 5)
    explained = explain(traced, num_near=100)
    assert explained.near_by == "vectors of two-tower"
    vectors = engine.live.cascade.systems["two-tower"].item_matrix()
    past = {engine.live.id(row): row for row in traced.batch.history.items.values.tolist()}
    for item in explained.items:
        own = vectors[int(engine.live.items([item.item_id])[0])]
        expected = {
            name: float(cosine_similarity(own, vectors[row], dim=0))
            for name, row in past.items()
            if name != item.item_id
        }
        expected = {name: value for name, value in expected.items() if value > 0}
        assert {near.item_id: near.strength for near in item.near} == pytest.approx(expected, abs=1e-5)


def test_shared_fields_stand_in_where_nothing_else_does():
    text = '[stages.retrieval]\nsystems = ["popularity"]\nkeep = 20\n'
    explained = told(Engine(shop_live(text=text)), k=8)
    assert explained.near_by == "shared fields"

    def shared(one, other):  # shelf and price, as the shop was made
        return ((one - other) % 4 == 0) + ((one - FIRST_ITEM) % 7 == (other - FIRST_ITEM) % 7)

    past = range(103, 115)  # what user-3 had, item by item
    for item in explained.items:
        others = [other for other in past if other != item.item_id]
        assert shared(item.item_id, item.near[0].item_id) == max(shared(item.item_id, other) for other in others)
        assert item.item_id not in [near.item_id for near in item.near]


def test_likeness_by_hand():
    fields = (Categorical(name="c", size=2), Sequence(name="w", size=5), Vector(name="v", dim=2), Numeric(name="n"))
    columns = {
        "c": torch.tensor([0, 1, 1, 0]),
        "w": Jagged.from_rows([[], [1, 2, 2], [2, 3], []]),
        "v": torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 4.0], [-1.0, 0.0]]),
        "n": torch.zeros(4),
    }
    likeness = _likeness(FieldTable(4, fields, columns), torch.tensor([1, 3]), torch.tensor([2, 1, 3]))
    expected = [[(1 + 1 / 3 + 0.6) / 3, 1.0, 0.0], [0.0, 0.0, 1 / 3]]  # item 3: unknown category, no words
    torch.testing.assert_close(likeness, torch.tensor(expected))
    assert _likeness(FieldTable(4, fields[3:], {"n": columns["n"]}), torch.tensor([1]), torch.tensor([2])) is None


def test_a_person_without_a_past_and_a_broken_cascade():
    engine = Engine(shop_live())
    nobody = told(engine, None)
    assert nobody.num_history == 0
    assert nobody.near_by is None
    assert all(item.found and not item.near and item.own.times == 0 for item in nobody.items)
    break_system(engine.live, "counts", raising)
    limping = told(engine, "user-3")
    assert any("counts" in reason for reason in limping.degraded)
    object.__setattr__(engine.live.cascade, "run", raising)
    broken = told(engine, "user-3")
    assert broken.chain == "popular"
    assert "the cascade failed" in broken.degraded[0]
    assert len(broken.items) == 4
    assert all(item.found == () for item in broken.items)


def test_a_long_past_is_told_whole_and_read_to_a_limit(engine, monkeypatch):
    monkeypatch.setattr(type(engine.live.cascade), "max_history", 5)
    explained = told(engine)
    assert (explained.num_history, explained.num_read) == (12, 5)


def test_a_known_next_item_heads_the_list(engine):
    assert told(engine, None, history=[130]).items[0].item_id == after(130)
