"""The fused sampled softmax against the plain one: values, every gradient, hits, chunks."""

from __future__ import annotations

import pytest
import torch

from shortlist.data.jagged import Jagged
from shortlist.kernels import sampled_softmax
from shortlist.kernels.sampled_softmax import shared_sampled_softmax
from shortlist.layers.losses import hide_hits, negative_scores, sampled_softmax_loss, target_scores


def parts(lengths: list[int], num_negatives: int, seed: int = 0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    rows = torch.randint(1, 30, (total,), generator=generator)
    vectors = [torch.randn(n, 6, generator=generator, dtype=dtype) for n in (len(lengths), total, num_negatives)]
    targets = Jagged.from_lengths(rows, torch.tensor(lengths))
    negatives = torch.randperm(29, generator=generator)[:num_negatives] + 1
    weight = torch.rand(total, generator=generator, dtype=dtype)
    return [v.requires_grad_() for v in vectors], targets, negatives, weight


def plain(vectors, targets, negatives, weight):
    query, target, negative = vectors
    negative_Pk = hide_hits(negative_scores(query, negative), negatives, targets)
    return sampled_softmax_loss(target_scores(query, target, targets), negative_Pk, targets, weight)


@pytest.mark.parametrize("lengths", [[1], [1] * 50, [2, 0, 3, 1, 0], [0, 0]])
@pytest.mark.parametrize("num_negatives", [1, 7, 29])
@pytest.mark.parametrize("at_once", [1, 16, 1 << 18])
def test_it_is_the_plain_loss_with_all_its_gradients(lengths, num_negatives, at_once, monkeypatch):
    monkeypatch.setattr(sampled_softmax, "LOGITS_AT_ONCE", at_once)
    vectors, targets, negatives, weight = parts(lengths, num_negatives)
    share = weight / weight.sum().clamp(min=1e-300)
    fused = shared_sampled_softmax(*vectors, targets.row_of_value, targets.values, negatives, share)
    expected = plain(vectors, targets, negatives, weight)
    torch.testing.assert_close(fused, expected)
    if not fused.requires_grad or not len(targets.values):
        return
    for ours, theirs in zip(torch.autograd.grad(fused * 3, vectors), torch.autograd.grad(expected * 3, vectors)):
        torch.testing.assert_close(ours, theirs)


def test_a_position_whose_targets_are_all_the_negatives_loses_nothing():
    query, target, negative = torch.randn(3, 1, 4, requires_grad=True).unbind(0)
    row = torch.tensor([5])
    loss = shared_sampled_softmax(query, target, negative, torch.tensor([0]), row, row, torch.ones(1))
    assert loss.item() == 0.0
    loss.backward()


def test_two_negatives_by_hand():
    query = torch.tensor([[1.0, 0.0]])
    target = torch.tensor([[2.0, 5.0]])
    negative = torch.tensor([[1.0, 9.0], [3.0, 9.0]])
    loss = shared_sampled_softmax(
        query, target, negative, torch.tensor([0]), torch.tensor([1]), torch.tensor([2, 3]), torch.ones(1)
    )
    exp = torch.tensor([2.0, 1.0, 3.0]).exp()
    torch.testing.assert_close(loss, -(exp[0] / exp.sum()).log())
