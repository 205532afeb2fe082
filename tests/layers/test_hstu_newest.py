"""The newest positions alone are what the whole stack says of them, with and without a cache."""

from __future__ import annotations

import pytest
import torch

from shortlist.kernels.hstu_attention import Sequences
from shortlist.layers.hstu import HSTUBlockConfig, HSTUStack


def sequences(lengths: list[int], queries: list[int]) -> Sequences:
    generator = torch.Generator().manual_seed(0)
    cut, query_cut = (torch.tensor([0, *torch.tensor(x).cumsum(0).tolist()]) for x in (lengths, queries))
    times = [torch.randint(0, 10**6, (sum(n),), generator=generator) for n in (lengths, queries)]
    position = torch.cat([torch.arange(n) for n in lengths])
    return Sequences(cut, query_cut, torch.tensor(lengths), position, *times)


@pytest.mark.parametrize("attention", ["pointwise", "softmax"])
@pytest.mark.parametrize(("lengths", "queries"), [([5, 0, 1, 9], [5, 0, 1, 9]), ([5, 4, 3], [2, 0, 3])])
def test_the_newest_positions_are_those_of_all(attention, lengths, queries):
    torch.manual_seed(0)
    stack = HSTUStack(8, 10, HSTUBlockConfig(num_heads=2, attention=attention, block_dropout=0.0), has_clock=True)
    parts, x = sequences(lengths, queries), torch.randn(sum(queries), 8)
    before = None
    if lengths != queries:
        first = [length - new for length, new in zip(lengths, queries)]
        with torch.no_grad():
            _, before = stack(torch.randn(sum(first), 8), sequences(first, first))
    whole, known = stack(x, parts, before)
    newest, same = stack(x, parts, before, only_newest=True)
    at = [sum(queries[: row + 1]) - 1 for row, count in enumerate(queries) if count]
    torch.testing.assert_close(newest, whole[at])
    for one, other in zip(known, same):
        torch.testing.assert_close(one.k_THd, other.k_THd)
    back = torch.randn_like(newest)
    weights = list(stack.parameters())
    grads = [torch.autograd.grad((out * back).sum(), weights) for out in (newest, whole[at])]
    for mine, theirs in zip(*grads):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_flops_of_the_newest_are_fewer():
    stack = HSTUStack(8, 10, HSTUBlockConfig(num_blocks=2), has_clock=True)
    assert stack.flops(100, only_newest=True) < 0.7 * stack.flops(100)
    assert stack.flops(1, 99, only_newest=True) == stack.flops(1, 99)
