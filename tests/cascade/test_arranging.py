"""Pages laid out by rules, against pages worked out by hand and against plain loops."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest
import torch

from shortlist.cascade.arranging import ADDED, ALPHA, Ground, arrange, list_length, shares_of_past
from shortlist.cascade.attributes import Attributes
from shortlist.cascade.candidates import Blocked
from shortlist.cascade.cascade import Page
from shortlist.cascade.rules import Diversity, Mix, Pin, Quota, Rules
from shortlist.data.dataset import build_dataset
from shortlist.data.jagged import Jagged
from shortlist.data.log import read

NUM = 24
KINDS = ["red", "blue", "green"]
TAGS = [["a"], ["a", "b"], ["b", "c"], ["c"]]


@pytest.fixture(scope="module")
def dataset():
    """24 items i0 .. i23; the kind goes round in threes, the tags in fours."""
    rng = np.random.default_rng(0)
    events = pl.DataFrame(
        {
            "user_id": [f"u{i % 8}" for i in range(400)],
            "item_id": [f"i{n}" for n in rng.integers(NUM, size=400)],
            "timestamp": 1_700_000_000 + np.arange(400) * 3_600,
        }
    )
    items = pl.DataFrame(
        {
            "item_id": [f"i{n}" for n in range(NUM)],
            "kind": [KINDS[n % 3] for n in range(NUM)],
            "tags": [TAGS[n % 4] for n in range(NUM)],
        }
    )
    return build_dataset(read(events, items=items))


@pytest.fixture(scope="module")
def attributes(dataset):
    return Attributes(dataset)


def rows(dataset, numbers):
    return torch.from_numpy(dataset.item_ids.encode([f"i{n}" for n in numbers]))


def numbers(dataset, page):
    return [[int(item[1:]) for item in dataset.item_ids.decode(row[row > 0].numpy())] for row in page.rows]


def page_of(dataset, lists, scores=None):
    rows_BL = torch.stack([rows(dataset, one) for one in lists])
    falling = torch.arange(rows_BL.shape[1], 0, -1).float().expand_as(rows_BL)
    return Page(rows=rows_BL, scores=falling if scores is None else torch.tensor(scores), traces=(), chain="a0")


def ground(dataset, attributes, *, past=None, popular=None, allowed=None, num=1):
    pasts = [[]] * num if past is None else past
    return Ground(
        attributes=attributes,
        popular=rows(dataset, popular or []),
        blocked=Blocked(dataset.num_items, None, allowed),
        past=Jagged.from_rows([rows(dataset, one).tolist() for one in pasts]),
    )


def lay(dataset, attributes, page, k, rules, pins=None, **others):
    """Numbers of the pages, and what was counted."""
    pins = {place: int(rows(dataset, [n])[0]) for place, n in (pins or {}).items()}
    made, moved = arrange(page, k, rules, pins, ground(dataset, attributes, num=len(page.rows), **others))
    return numbers(dataset, made), moved


# -- pins ------------------------------------------------------------------------------------------------------------


def test_pins_stand_at_their_places_and_the_others_move_down(dataset, attributes):
    rules = Rules(pins=(Pin(item="i9"), Pin(item="i3", position=3)))
    page = page_of(dataset, [[0, 1, 2, 3, 4], [3, 1, 2, 9, 4]])
    made, moved = lay(dataset, attributes, page, 5, rules, {0: 9, 2: 3})
    assert made == [[9, 0, 3, 1, 2], [9, 1, 3, 2, 4]]
    assert moved == [{"pins": 2}, {"pins": 2}]


def test_a_pin_that_stands_there_already_moves_nothing(dataset, attributes):
    rules = Rules(pins=(Pin(item="i1", position=2),))
    assert lay(dataset, attributes, page_of(dataset, [[0, 1, 2]]), 3, rules, {1: 1}) == ([[0, 1, 2]], [{"pins": 0}])


def test_a_pin_beyond_the_page_is_no_place(dataset, attributes):
    rules = Rules(pins=(Pin(item="i9", position=4),))
    assert lay(dataset, attributes, page_of(dataset, [[0, 1, 2]]), 3, rules, {3: 9})[0] == [[0, 1, 2]]


def test_scores_go_with_their_items(dataset, attributes):
    page = page_of(dataset, [[0, 1, 2]])
    made, _ = arrange(
        page, 3, Rules(pins=(Pin(item="i9"),)), {0: int(rows(dataset, [9])[0])}, ground(dataset, attributes)
    )
    assert made.scores.tolist() == [[-math.inf, 3.0, 2.0]]
    made, _ = arrange(
        page, 3, Rules(pins=(Pin(item="i2"),)), {0: int(rows(dataset, [2])[0])}, ground(dataset, attributes)
    )
    assert made.scores.tolist() == [[1.0, 3.0, 2.0]]


# -- quotas ----------------------------------------------------------------------------------------------------------


def test_at_most_so_many_of_each_value(dataset, attributes):
    page = page_of(dataset, [[0, 3, 6, 1, 9, 4, 2]])
    made, moved = lay(dataset, attributes, page, 5, Rules(quotas=(Quota(field="kind", most=2),)))
    assert made == [[0, 3, 1, 4, 2]]
    assert moved == [{"quotas": 3}]


def test_at_most_so_many_of_one_value(dataset, attributes):
    page = page_of(dataset, [[0, 3, 6, 1, 4, 7]])
    made, _ = lay(dataset, attributes, page, 4, Rules(quotas=(Quota(field="kind", value="red", most=1),)))
    assert made == [[0, 1, 4, 7]]


def test_an_item_with_several_values_counts_for_each(dataset, attributes):
    # i1 and i5 have a and b, i0 has a, i2 has b and c, i3 has c
    page = page_of(dataset, [[1, 0, 5, 2, 3, 7]])
    made, _ = lay(dataset, attributes, page, 4, Rules(quotas=(Quota(field="tags", most=1),)))
    assert made == [[1, 3]]


def test_at_least_so_many_stand_last_where_the_ranking_lacks_them(dataset, attributes):
    page = page_of(dataset, [[0, 3, 6, 9, 12, 1, 4]])
    rules = Rules(quotas=(Quota(field="kind", value="blue", least=2),))
    made, moved = lay(dataset, attributes, page, 4, rules)
    assert made == [[0, 3, 1, 4]]
    assert moved == [{"quotas": 2}]


def test_what_is_missing_is_taken_from_the_popular_items(dataset, attributes):
    page = page_of(dataset, [[0, 3, 6, 9]])
    rules = Rules(quotas=(Quota(field="kind", value="green", least=2),))
    made, _ = lay(dataset, attributes, page, 4, rules, popular=[1, 5, 0, 8, 2])
    assert made == [[0, 3, 5, 8]]
    made, _ = lay(dataset, attributes, page, 3, Rules(quotas=(Quota(field="kind", most=1),)), popular=[3, 1, 5, 8])
    assert made == [[0, 1, 5]]
    allowed = torch.ones(dataset.num_items + 1, dtype=torch.bool)
    allowed[rows(dataset, [5])] = False
    assert lay(dataset, attributes, page, 4, rules, popular=[1, 5, 0, 8, 2], allowed=allowed)[0] == [[0, 3, 8, 2]]


def test_a_quota_that_can_not_be_met_leaves_the_page_shorter_or_without(dataset, attributes):
    page = page_of(dataset, [[0, 3, 6]])
    assert lay(dataset, attributes, page, 3, Rules(quotas=(Quota(field="kind", most=1),)))[0] == [[0]]
    wanted = Rules(quotas=(Quota(field="kind", value="violet", least=2),))
    assert lay(dataset, attributes, page, 3, wanted)[0] == [[0, 3, 6]]


def test_pins_count_for_quotas_wherever_they_stand(dataset, attributes):
    page = page_of(dataset, [[0, 3, 1, 2, 4]])
    rules = Rules(quotas=(Quota(field="kind", most=1),), pins=(Pin(item="i6", position=3),))
    made, _ = lay(dataset, attributes, page, 3, rules, {2: 6})
    assert made == [[1, 2, 6]]
    rules = Rules(quotas=(Quota(field="kind", value="red", least=1),), pins=(Pin(item="i6", position=3),))
    assert lay(dataset, attributes, page_of(dataset, [[1, 2, 4, 0]]), 3, rules, {2: 6})[0] == [[1, 2, 6]]


def test_quotas_hold_on_random_pages(dataset, attributes):
    """No page breaks a limit, and what is owed is there as far as the list has it."""
    rng = np.random.default_rng(2)
    lists = [rng.permutation(NUM)[:16].tolist() for _ in range(40)]
    rules = Rules(
        quotas=(
            Quota(field="kind", most=4),
            Quota(field="tags", value="c", least=4),
            Quota(field="kind", value="red", most=2, least=1),
        )
    )
    made, _ = lay(dataset, attributes, page_of(dataset, lists), 8, rules)
    for given, page in zip(lists, made):
        counts = [sum(n % 3 == kind for n in page) for kind in range(3)]
        assert max(counts) <= 4
        assert 1 <= counts[0] <= 2
        assert sum(n % 4 >= 2 for n in page) >= min(4, sum(n % 4 >= 2 for n in given))
        assert len(set(page)) == len(page) == 8


# -- diversity -------------------------------------------------------------------------------------------------------


def plain_mmr(items, scores, weight, k):
    """Carbonell and Goldstein's formula over (kind, tags), item by item."""
    low, high = min(scores), max(scores)
    relevance = {n: (s - low) / (high - low) for n, s in zip(items, scores)}

    def like(i, j):
        tags = (set(TAGS[i % 4]), set(TAGS[j % 4]))
        return ((i % 3 == j % 3) + len(tags[0] & tags[1]) / len(tags[0] | tags[1])) / 2

    page = []
    for _ in range(k):
        left = [n for n in items if n not in page]
        page.append(
            max(left, key=lambda n: weight * relevance[n] - (1 - weight) * max((like(n, m) for m in page), default=0))
        )
    return page


def test_diversity_is_maximal_marginal_relevance(dataset, attributes):
    rng = np.random.default_rng(3)
    lists = [rng.permutation(NUM)[:15].tolist() for _ in range(12)]
    scores = -np.sort(-rng.random((12, 15)).astype(np.float32), axis=1)
    rules = Rules(diversity=Diversity(relevance=0.6, fields=("kind", "tags")))
    made, moved = lay(dataset, attributes, page_of(dataset, lists, scores), 6, rules)
    for items, given, page in zip(lists, scores, made):
        assert page == plain_mmr(items, given.tolist(), 0.6, 6)
    assert sum(one["diversity"] for one in moved) > 0


def test_full_relevance_is_the_order_as_it_is(dataset, attributes):
    page = page_of(dataset, [[5, 2, 8, 11, 0]])
    assert lay(dataset, attributes, page, 4, Rules(diversity=Diversity(relevance=1))) == (
        [[5, 2, 8, 11]],
        [{"diversity": 0}],
    )


def test_items_without_a_score_come_after_all_others(dataset, attributes):
    page = page_of(dataset, [[0, 3, 6, 1]], [[3.0, 2.0, 1.0, -math.inf]])
    made, _ = lay(dataset, attributes, page, 4, Rules(diversity=Diversity(relevance=0, fields=("kind",))))
    assert made[0][3] == 1


# -- mix -------------------------------------------------------------------------------------------------------------


def test_shares_of_a_past(dataset, attributes):
    """u: i0 (a), i1 (a b), i2 (b c): a 1.5, b 1, c 0.5 of 3 events."""
    past = Jagged.from_rows([rows(dataset, [0, 1, 2]).tolist(), [], rows(dataset, [3, 3]).tolist()])
    value_BM, share_BM = shares_of_past(past, attributes.sets("tags"))
    a, b, c = attributes.ids("tags", ["a", "b", "c"]).tolist()
    assert value_BM.tolist() == [[a, b, c], [0, 0, 0], [c, 0, 0]]
    torch.testing.assert_close(share_BM, torch.tensor([[1.5, 1, 0.5], [0, 0, 0], [3, 0, 0]]) / 3)


def plain_mix(items, scores, past, weight, k):
    """Steck's greedy algorithm over kinds, item by item."""
    low, high = min(scores), max(scores)
    relevance = {n: (s - low) / (high - low) for n, s in zip(items, scores)}
    p = [sum(n % 3 == kind for n in past) / len(past) for kind in range(3)]

    def divergence(page):
        q = [sum(n % 3 == kind for n in page) / len(page) for kind in range(3)]
        return sum(a * math.log(a / ((1 - ALPHA) * b + ALPHA * a)) for a, b in zip(p, q) if a > 0)

    page = []
    for _ in range(k):
        left = [n for n in items if n not in page]
        page.append(max(left, key=lambda n: (1 - weight) * relevance[n] - weight * divergence([*page, n])))
    return page


def test_the_mix_is_steck_s(dataset, attributes):
    rng = np.random.default_rng(4)
    lists = [rng.permutation(NUM)[:18].tolist() for _ in range(12)]
    past = [rng.integers(NUM, size=rng.integers(3, 9)).tolist() for _ in range(12)]
    scores = -np.sort(-rng.random((12, 18)).astype(np.float32), axis=1)
    page = page_of(dataset, lists, scores)
    made, _ = lay(dataset, attributes, page, 6, Rules(mix=Mix(field="kind", weight=0.7)), past=past)
    for items, given, events, one in zip(lists, scores, past, made):
        assert one == plain_mix(items, given.tolist(), events, 0.7, 6)


def test_a_page_has_the_shares_of_the_past(dataset, attributes):
    """Two reds to one blue before, and so on the page; a person without a past keeps the order."""
    lists = [list(range(NUM)), list(range(NUM))]
    rules = Rules(mix=Mix(field="kind", weight=1))
    made, moved = lay(dataset, attributes, page_of(dataset, lists), 6, rules, past=[[0, 3, 1], []])
    assert sorted(n % 3 for n in made[0]) == [0, 0, 0, 0, 1, 1]
    assert made[1] == [0, 1, 2, 3, 4, 5]
    assert moved[1] == {"mix": 0}
    assert moved[0]["mix"] > 0


# -- all of them -----------------------------------------------------------------------------------------------------


def test_requests_are_laid_out_alone_as_together(dataset, attributes):
    rng = np.random.default_rng(5)
    lists = [rng.permutation(NUM)[:15].tolist() for _ in range(5)]
    past = [rng.integers(NUM, size=n).tolist() for n in (4, 0, 7, 1, 2)]
    rules = Rules(
        pins=(Pin(item="i7", position=2),),
        quotas=(Quota(field="kind", most=3), Quota(field="tags", value="b", least=2)),
        diversity=Diversity(relevance=0.5),
        mix=Mix(field="tags", weight=0.4),
    )
    given = {"pins": {1: 7}, "popular": list(range(NUM))}
    together, counted = lay(dataset, attributes, page_of(dataset, lists), 7, rules, past=past, **given)
    for i, (one, events) in enumerate(zip(lists, past)):
        alone, counts = lay(dataset, attributes, page_of(dataset, [one]), 7, rules, past=[events], **given)
        assert alone == [together[i]]
        assert counts == [counted[i]]
        assert together[i][1] == 7
    assert set(counted[0]) == {"pins", "quotas", "diversity", "mix"}


def test_how_long_a_list_is_asked_for():
    assert list_length(Rules(pins=(Pin(item="a"),)), 10) == 10
    mixed = Rules(mix=Mix(field="kind"))
    assert list_length(mixed, 3) == 23
    assert list_length(mixed, 10) == 40
    assert list_length(mixed, 10, 300) == 300
    assert list_length(mixed, 3_000) == 3_000
    assert ADDED >= 100
