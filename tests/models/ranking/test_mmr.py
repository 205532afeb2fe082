"""MMR against the rule written out in plain Python, and the shop's rules one by one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ranking_support import batch_of, space_of
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Categorical, Numeric, Sequence, Space, Vector
from shortlist.errors import ConfigError
from shortlist.models.base import RequestShape, top_k_of_candidates
from shortlist.models.ranking.mmr import MMR, MMRConfig

NUM_ITEMS = 40


def shop(seed: int = 0) -> tuple[Space, list[int], list[set[int]], np.ndarray]:
    """40 items with a category (some unknown), tags (with repeats, some none) and a vector."""
    rng = np.random.default_rng(seed)
    category = [0, *rng.integers(0, 5, NUM_ITEMS).tolist()]
    tags = [[], *[rng.integers(1, 7, rng.integers(0, 5)).tolist() for _ in range(NUM_ITEMS)]]
    vector = rng.standard_normal((NUM_ITEMS + 1, 3)).astype(np.float32)
    vector[[0, 5]] = 0
    fields = (Categorical(name="category", size=4), Sequence(name="tags", size=6), Vector(name="look", dim=3))
    columns = {
        "category": torch.tensor(category),
        "tags": Jagged.from_rows(tags),
        "look": torch.from_numpy(vector),
        "price": torch.zeros(NUM_ITEMS + 1),
    }
    space = space_of(NUM_ITEMS, item_fields=(*fields, Numeric(name="price")), item_columns=columns)
    return space, category, [set(t) for t in tags], vector


def alike(i: int, j: int, category: list[int], tags: list[set[int]], vector: np.ndarray) -> float:
    same = float(category[i] == category[j] != 0)
    overlap = len(tags[i] & tags[j]) / len(tags[i] | tags[j]) if tags[i] and tags[j] else 0.0
    lengths = np.linalg.norm(vector[i]) * np.linalg.norm(vector[j])
    cosine = max(float(vector[i] @ vector[j]) / lengths, 0.0) if lengths else 0.0
    return (same + overlap + cosine) / 3


def greedy(rows: list[int], scores: list[float], k: int, config: MMRConfig, world: tuple) -> list[int]:
    """The page of one request, by the definition."""
    low, high = min(scores), max(scores)
    worth = {
        r: config.relevance * (s - low) / max(high - low, 1e-30) + config.boosts.get(r, 0.0)
        for r, s in zip(rows, scores)
    }
    category = world[0]
    page: list[int] = []
    left = sorted(rows, key=lambda r: -scores[rows.index(r)])
    while left and len(page) < k:
        allowed = [
            r
            for r in left
            if not category[r] or sum(category[p] == category[r] for p in page) < config.max_per.get("category", k)
        ]
        pins = [r for r in config.pins if r in left]
        if pins:
            best = pins[0]
        elif allowed or config.fill:
            gain = {
                r: worth[r] - (1 - config.relevance) * max([alike(r, p, *world) for p in page], default=0.0)
                for r in allowed or left
            }
            best = max(gain, key=lambda r: gain[r])
        else:
            break
        page.append(best)
        left.remove(best)
    return page + [0] * (k - len(page))


def requests(seed: int = 1) -> tuple[list[list[int]], torch.Tensor]:
    rng = np.random.default_rng(seed)
    rows = [(1 + rng.permutation(NUM_ITEMS)[:n]).tolist() for n in (12, 1, 0, 30, 7, 20)]
    return rows, torch.from_numpy(rng.standard_normal(70).astype(np.float32))


@pytest.mark.parametrize(
    "config",
    [
        MMRConfig(relevance=0.5),
        MMRConfig(relevance=0.0),
        MMRConfig(relevance=0.8, max_per={"category": 1}),
        MMRConfig(relevance=0.8, max_per={"category": 2}, fill=False),
        MMRConfig(relevance=0.7, pins=(9, 3, 17), boosts={4: 0.5, 8: -0.5, 20: 0.1}, max_per={"category": 1}),
    ],
)
def test_page_is_the_one_of_the_definition(config):
    space, *world = shop()
    rows, scores = requests()
    page = MMR(config, space).rerank(batch_of([[]] * 6, rows), scores, 10)
    at = 0
    for r, offered in enumerate(rows):
        mine = scores[at : at + len(offered)].tolist()
        at += len(offered)
        expected = greedy(offered, mine, 10, config, tuple(world)) if offered else [0] * 10
        assert page.rows[r].tolist() == expected
    assert ((page.rows == 0) == (page.scores == -torch.inf)).all()
    assert (page.scores.diff(dim=1).nan_to_num(0) <= 0).all()


@pytest.mark.parametrize("scale", ["range", "rank", "none"])
def test_full_relevance_is_the_ranker_s_order(scale):
    space, *_ = shop()
    rows, scores = requests()
    scores[3:6] = scores[0]  # ties keep the ranker's order
    scores[15] = torch.nan
    scores[20] = -torch.inf
    batch = batch_of([[]] * 6, rows)
    page = MMR(MMRConfig(relevance=1.0, scale=scale), space).rerank(batch, scores, 40)
    assert torch.equal(page.rows, top_k_of_candidates(batch.candidate_rows, scores, 40).rows)


def test_by_hand_with_three_items():
    """Items 1 and 2 are of one category: after 1 (worth 1), 2 is worth .9 - 1 * .5 and 3 is worth .5 * .4 = .2 in halves."""
    space = space_of(
        3,
        item_fields=(Categorical(name="kind", size=2),),
        item_columns={"kind": torch.tensor([0, 1, 1, 2])},
    )
    page = MMR(MMRConfig(relevance=0.5, scale="none"), space).rerank(
        batch_of([[]], [[3, 2, 1]]), torch.tensor([0.4, 0.9, 1.0]), 3
    )
    assert page.rows.tolist() == [[1, 3, 2]]
    torch.testing.assert_close(page.scores, torch.tensor([[0.5, 0.2, 0.45 - 0.5]]))


def test_chosen_fields_alone_make_items_alike():
    space, *_ = shop()
    rows, scores = requests()
    batch = batch_of([[]] * 6, rows)
    by_tags = MMR(MMRConfig(relevance=0.4, fields=("tags",)), space)
    by_all = MMR(MMRConfig(relevance=0.4), space)
    assert len(by_tags.parts) == 1
    assert len(by_all.parts) == 3  # a number is no likeness
    assert not torch.equal(by_tags.rerank(batch, scores, 10).rows, by_all.rerank(batch, scores, 10).rows)


def test_a_request_gets_the_same_page_alone_and_in_a_batch():
    space, *_ = shop()
    rows, scores = requests()
    model = MMR(MMRConfig(relevance=0.5, max_per={"category": 2}), space)
    together = model.rerank(batch_of([[]] * 6, rows), scores, 8)
    alone = model.rerank(batch_of([[]], [rows[4]]), scores[43:50], 8)
    assert torch.equal(alone.rows[0], together.rows[4])
    torch.testing.assert_close(alone.scores[0], together.scores[4])


def test_more_relevance_never_makes_the_page_more_varied():
    """Mean likeness on the page falls as lambda does; with lambda 0 it is lowest."""
    space, *world = shop()
    rows, scores = requests()
    likeness = []
    for relevance in (0.0, 0.5, 1.0):
        page = MMR(MMRConfig(relevance=relevance), space).rerank(batch_of([[]] * 6, rows), scores, 6).rows[3].tolist()
        likeness.append(np.mean([alike(i, j, *world) for i in page for j in page if i < j]))
    assert likeness[0] < likeness[1] < likeness[2]


def test_a_catalogue_without_fields_keeps_the_ranker_s_order():
    rows, scores = requests()
    batch = batch_of([[]] * 6, rows)
    page = MMR(MMRConfig(relevance=0.3), space_of(NUM_ITEMS)).rerank(batch, scores, 5)
    assert torch.equal(page.rows, top_k_of_candidates(batch.candidate_rows, scores, 5).rows)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MMRConfig(max_per={"colour": 2}), "no field 'colour'"),
        (MMRConfig(max_per={"tags": 2}), "categorical"),
        (MMRConfig(fields=("price",)), "can not be compared"),
        (MMRConfig(pins=(41,)), "row 41"),
        (MMRConfig(boosts={0: 1.0}), "row 0"),
    ],
)
def test_rules_that_do_not_fit_the_catalogue_are_refused(config, words):
    with pytest.raises(ConfigError, match=words):
        MMR(config, shop()[0])


@pytest.mark.parametrize(
    "wrong", [{"relevance": 1.2}, {"max_per": {"category": 0}}, {"pins": (1, 1)}, {"scale": "log"}]
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        MMRConfig(**wrong)


def test_cost_of_vectors_agrees_with_the_flop_counter():
    look = torch.randn(NUM_ITEMS + 1, 32)
    space = space_of(NUM_ITEMS, item_fields=(Vector(name="look", dim=32),), item_columns={"look": look})
    model = MMR(MMRConfig(), space)
    batch = batch_of([[]], [list(range(1, 31))])
    with FlopCounterMode(display=False) as counter:
        model.rerank(batch, torch.rand(30), 10)
    shape = RequestShape(num_candidates=30)
    assert model.cost(shape).flops(30) == pytest.approx(counter.get_total_flops(), rel=0.2)
    sets = MMR(replace(MMRConfig(), fields=("category", "tags")), shop()[0])
    assert sets.cost(shape).item_flops > 0
