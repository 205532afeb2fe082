"""The shared objective: where negatives come from, and what is taken off their scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from next_item_support import next_events, view_of
from shortlist.data.batches import NextTargets
from shortlist.data.jagged import Jagged
from shortlist.errors import ConfigError
from shortlist.layers.losses import bpr_max_loss, hide_hits
from shortlist.layers.next_item import NextItemConfig, NextItemLoss


class Table(nn.Module):
    """Vectors of items by row."""

    def __init__(self, vectors: torch.Tensor) -> None:
        super().__init__()
        self.vectors = vectors

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.vectors[rows]

    def all(self) -> torch.Tensor:
        return self.vectors


COUNTED = [[[1], [1], [1], [2]], [[1], [2], [3]], [[4], [1]]]  # 1 five times, 2 twice, 3 and 4 once, 5 never


def objective(**settings) -> NextItemLoss:
    view = view_of(COUNTED, 5)
    loss = NextItemLoss(NextItemConfig(**{"negatives": "in_batch", **settings}), view.space, has_fields=False)
    loss.prepare(view)
    return loss


def test_counts_are_those_of_training_and_are_kept_with_the_weights():
    loss = objective(loss="bpr")
    assert loss.count_N.tolist() == [0, 5, 2, 1, 1, 0]
    assert "count_N" in loss.state_dict()
    assert "count_N" not in objective(loss="bpr", negatives="shared").state_dict()


def test_in_batch_negatives_are_the_batch_s_targets_and_extra_popular_items():
    torch.manual_seed(0)
    loss = objective(loss="bpr", num_negatives=6000, popularity_alpha=0.5)
    rows, _ = loss._in_batch(torch.tensor([3, 3, 4]), 3)
    assert rows[:3].tolist() == [3, 3, 4]
    share = np.bincount(rows[3:].numpy(), minlength=6) / 6000
    root = np.sqrt([0, 5, 2, 1, 1, 0])
    np.testing.assert_allclose(share, root / root.sum(), atol=0.02)


def test_a_batch_of_whole_sequences_gives_as_many_as_it_has_sequences():
    torch.manual_seed(0)
    loss = objective(loss="bpr", num_negatives=0)
    batch = next_events(view_of(COUNTED, 5))
    rows, _ = loss._in_batch(batch.targets.items.values, batch.history.items.num_rows)
    assert len(rows) == 3
    assert set(rows.tolist()) <= set(batch.targets.items.values.tolist())


def test_own_targets_are_no_negatives():
    """Two lanes: for each the only in-batch negative is the other's target, though both stand in the pool."""
    vectors = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    query = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    targets = NextTargets(position=torch.arange(2), items=Jagged.from_rows([[1], [2]]), weight=torch.ones(2))
    history = Jagged.from_rows([[3], [4]])
    value = objective(loss="bpr", num_negatives=0)(Table(vectors), query, targets, history)
    score = query @ vectors.T
    by_hand = -(torch.sigmoid(score[0, 1] - score[0, 2]).log() + torch.sigmoid(score[1, 2] - score[1, 1]).log()) / 2
    torch.testing.assert_close(value, by_hand)


def test_corrected_softmax_tends_to_the_full_one():
    """With many extra samples and log_q = 1 the loss is the full softmax's; without, popular items are punished."""
    torch.manual_seed(0)
    vectors = torch.randn(6, 4)
    vectors[5] = -10.0  # never sold, never drawn: keep it out of the full sum too
    query = torch.randn(2, 4).abs()
    targets = NextTargets(position=torch.arange(2), items=Jagged.from_rows([[1], [2]]), weight=torch.ones(2))
    history = Jagged.from_rows([[3], [4]])

    def value(**settings) -> float:
        loss = objective(loss="sampled_softmax", num_negatives=200_000, popularity_alpha=0.5, **settings)
        return float(loss(Table(vectors), query, targets, history))

    full = NextItemLoss(NextItemConfig(), view_of(COUNTED, 5).space, has_fields=False)
    exact = float(full(Table(vectors), query, targets, history))
    assert value(log_q=1.0) == pytest.approx(exact, abs=0.01)
    assert abs(value(log_q=0.0) - exact) > 1


def test_elu_bends_what_the_loss_reads_and_no_order():
    vectors = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    query = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    targets = NextTargets(position=torch.arange(2), items=Jagged.from_rows([[1], [2]]), weight=torch.ones(2))
    loss = objective(loss="bpr_max", num_negatives=0, elu=0.5, score_penalty=0.7)
    bent = query @ vectors.T
    bent = torch.where(bent > 0, bent, 0.5 * (bent.exp() - 1))
    positive = torch.stack([bent[0, 1], bent[1, 2]])
    rows = torch.tensor([1, 2])
    negative = hide_hits(bent[:, 1:3], rows, targets.items)
    expected = bpr_max_loss(positive, negative, targets.items, penalty=0.7)
    torch.testing.assert_close(loss(Table(vectors), query, targets, Jagged.from_rows([[3], [4]])), expected)
    torch.testing.assert_close(loss.query(query), query)  # served as it is


@pytest.mark.parametrize("name", ["top1", "bpr", "top1_max", "bpr_max"])
def test_pairwise_losses_take_any_negatives(name):
    torch.manual_seed(0)
    vectors = torch.randn(6, 4)
    batch = next_events(view_of(COUNTED, 5))
    query = torch.randn(len(batch.targets.position), 4, requires_grad=True)
    for negatives in ("shared", "own", "in_batch"):
        loss = objective(loss=name, negatives=negatives, num_negatives=4)
        value = loss(Table(vectors), query, batch.targets, batch.history.items)
        assert math.isfinite(value.item())
        assert value.requires_grad


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"negatives": "in_batch"}, "does not count items"),
        ({"popularity_alpha": -1.0}, "must be 0 or above"),
        ({"num_negatives": 0}, "num_negatives must be at least"),
    ],
)
def test_settings_that_make_no_objective_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        NextItemConfig(**settings).check_objective("someone", sparse=False)


def test_whoever_counts_may_do_without_extra_negatives():
    NextItemConfig(negatives="in_batch", num_negatives=0).check_objective("someone", sparse=False, counts=True)
