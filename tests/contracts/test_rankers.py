"""What every ranker must do, whoever wrote it."""

import numpy as np
import pytest
import torch

from shortlist.data.jagged import Jagged
from shortlist.models.base import RequestShape, load_weights
from shortlist.registry import systems
from support import build, one_request, pair_fields, planted_batch, planted_view, train

ENTRIES = systems(kind="ranker")


@pytest.fixture(params=ENTRIES, ids=lambda entry: entry.name)
def entry(request):
    return request.param


@pytest.fixture
def model(entry):
    return build(entry, planted_view())


@torch.no_grad()
def test_one_finite_score_per_candidate_and_task(model):
    batch = planted_batch(candidates=6)
    scores = model.score(batch)
    assert set(scores) == set(model.space.tasks)
    for score in scores.values():
        assert score.shape == batch.candidate_rows.values.shape
        assert torch.isfinite(score).all()


@torch.no_grad()
def test_a_request_gets_the_same_scores_alone_and_in_a_batch(model):
    batch = planted_batch(candidates=6)
    together = model.score(batch)["target"]
    rows = batch.candidate_rows
    for r in (0, 31, 59):
        alone = model.score(one_request(batch, r))["target"]
        torch.testing.assert_close(alone, together[rows.offsets[r] : rows.offsets[r + 1]], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_candidate_s_score_does_not_depend_on_its_neighbours(model):
    batch = planted_batch(candidates=6)
    rows = batch.candidate_rows
    turned = Jagged(rows.values.flip(0), torch.cat([torch.zeros(1, dtype=torch.int64), rows.lengths.flip(0).cumsum(0)]))
    first = one_request(batch, 0)
    mine = first.candidate_rows.values.flip(0)
    backwards = Jagged.from_lengths(mine, torch.tensor([len(mine)]))
    again = first.with_candidates(backwards, pair_fields(first, backwards))
    torch.testing.assert_close(model.score(again)["target"].flip(0), model.score(first)["target"], rtol=1e-4, atol=1e-5)
    assert turned.num_rows == batch.size


@torch.no_grad()
def test_user_side_is_computed_once_and_reused(model):
    batch = planted_batch(candidates=6)
    state = model.user_state(batch)
    torch.testing.assert_close(model.score_candidates(state, batch.candidates)["target"], model.score(batch)["target"])


@torch.no_grad()
def test_a_request_without_candidates_is_fine(model):
    batch = planted_batch(candidates=6)
    nothing = Jagged(torch.zeros(0, dtype=torch.int64), torch.zeros(batch.size + 1, dtype=torch.int64))
    assert model.score(batch.with_candidates(nothing, pair_fields(batch, nothing)))["target"].shape == (0,)


def test_weights_restore_the_same_scores(entry, model):
    train(model, planted_view(), steps=2)
    fresh = entry.cls(entry.config(entry.tiny), planted_view().space)
    load_weights(fresh, {name: t.clone() for name, t in model.state_dict().items()})
    batch = planted_batch(candidates=6)
    with torch.no_grad():
        assert torch.equal(model.score(batch)["target"], fresh.eval().score(batch)["target"])


def test_learns_to_put_the_next_basket_first(model):
    """In the planted shop the next basket is of the user's own cluster, and pair fields show that cluster's items as bought."""
    curve = train(model, planted_view(), steps=60)
    assert np.isfinite(curve).all()
    batch = planted_batch(seed=5, candidates=8)
    with torch.no_grad():
        score = model.score(batch)["target"]
    positive = batch.labels["target"] > 0
    assert (score[positive][:, None] > score[~positive][None]).float().mean() > 0.75


def test_cost_is_stated_per_candidate(model):
    cost = model.cost(RequestShape(num_history=20))
    assert cost.item_flops > 0
    assert cost.bytes > 0
    assert model.cost(RequestShape(), cached=True).user_flops <= model.cost(RequestShape()).user_flops
