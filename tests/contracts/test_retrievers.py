"""What every retriever must do, whoever wrote it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from shortlist.data.jagged import Jagged
from shortlist.models.base import RETRIEVAL_TASK, RequestShape, load_weights
from shortlist.registry import systems
from support import NUM_ITEMS, build, one_request, planted_batch, planted_view, train

ENTRIES = systems(kind="retriever")


@pytest.fixture(params=ENTRIES, ids=lambda entry: entry.name)
def entry(request):
    return request.param


@pytest.fixture
def model(entry):
    return build(entry, planted_view())


@torch.no_grad()
def test_retrieves_distinct_real_items_best_first(model):
    found = model.retrieve(planted_batch(), 7)
    assert found.rows.shape == found.scores.shape == (60, 7)
    assert found.rows.dtype == torch.int64
    assert ((found.rows >= 0) & (found.rows <= NUM_ITEMS)).all()
    assert (found.scores.diff(dim=1) <= 0).nan_to_num(0).all()
    for row in found.rows:
        real = row[row > 0]
        assert len(real.unique()) == len(real)
    assert ((found.rows == 0) == (found.scores == -torch.inf)).all()


@torch.no_grad()
def test_excluded_items_never_come_back(model):
    batch = planted_batch()
    batch = replace(batch, excluded=batch.history.items)
    found = model.retrieve(batch, NUM_ITEMS)
    for r in range(batch.size):
        seen = set(
            batch.history.items.values[batch.history.items.offsets[r] : batch.history.items.offsets[r + 1]].tolist()
        )
        assert not seen & set(found.rows[r].tolist())


@torch.no_grad()
def test_asking_for_more_than_the_catalogue_fills_with_nothing(model):
    found = model.retrieve(planted_batch(), NUM_ITEMS + 5)
    assert found.rows.shape == (60, NUM_ITEMS + 5)
    assert (found.rows[:, NUM_ITEMS:] == 0).all()


@torch.no_grad()
def test_scores_of_given_candidates_are_those_it_sorts_by(model):
    batch = planted_batch()
    found = model.retrieve(batch, 5)
    real = found.rows > 0
    again = model.score(batch.with_candidates(Jagged.from_padded(found.rows, real)))[RETRIEVAL_TASK]
    torch.testing.assert_close(again, found.scores[real], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_request_gets_the_same_answer_alone_and_in_a_batch(model):
    batch = planted_batch()
    together = model.retrieve(batch, 5)
    for r in (0, 17, 59):
        alone = model.retrieve(one_request(batch, r), 5)
        torch.testing.assert_close(alone.scores[0], together.scores[r], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_someone_without_history_gets_a_page(model):
    batch = planted_batch()
    none = torch.zeros(0, dtype=torch.int64)
    empty = Jagged(none, torch.zeros(3, dtype=torch.int64))
    first_two = type(batch.history)(items=empty, time=none, action=none, value=torch.zeros(0), group=none)
    nobody = torch.zeros(2, dtype=torch.int64)
    cold = type(batch)(
        user=nobody,
        time=batch.time[:2],
        history=first_two,
        user_fields={"country": nobody},
        context={n: c[:2] for n, c in batch.context.items()},
    )
    found = model.retrieve(cold, 5)
    assert torch.isfinite(found.scores).all()
    assert (found.rows > 0).all()


def test_weights_restore_the_same_answers(entry, model):
    train(model, planted_view(), steps=2)
    fresh = build(entry, planted_view(), seed=9)
    with torch.no_grad():
        fresh.retrieve(planted_batch(), 6)  # whatever it keeps between calls must go with the old weights
    load_weights(fresh, {name: t.clone() for name, t in model.state_dict().items()})
    batch = planted_batch()
    with torch.no_grad():
        old, new = model.retrieve(batch, 6), fresh.eval().retrieve(batch, 6)
    assert torch.equal(old.rows, new.rows)
    assert torch.equal(old.scores, new.scores)


def test_training_lowers_every_phase_s_loss(model):
    for phase_curve in np.array_split(train(model, planted_view(), steps=40), max(len(model.phases()), 1)):
        if len(phase_curve):
            assert np.isfinite(phase_curve).all()
            assert np.mean(phase_curve[-5:]) < np.mean(phase_curve[:3])


def test_same_seed_same_model(entry):
    a, b = (build(entry, planted_view(), seed=3).state_dict() for _ in range(2))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_cost_is_stated_and_grows_with_the_catalogue(model):
    small, large = (model.cost(RequestShape(num_items=n)) for n in (1_000, 100_000))
    assert large.flops(100_000) > small.flops(1_000) > 0
    assert small.bytes > 0
    assert model.cost(RequestShape(), cached=True).user_flops <= model.cost(RequestShape()).user_flops
