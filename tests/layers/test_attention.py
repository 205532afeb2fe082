"""Causal attention over jagged sequences: a case by hand, the plain reference, and what must not matter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shortlist.data.jagged import Jagged
from shortlist.errors import ConfigError
from shortlist.layers.attention import (
    CausalSelfAttention,
    LengthClasses,
    SelfAttention,
    attention_flops,
    causal_attention,
    causal_attention_reference,
    whole_attention,
    whole_attention_reference,
)

LENGTHS = [3, 0, 17, 1, 16, 40, 2, 33]


def jagged(lengths, *shape):
    return Jagged.from_lengths(torch.randn(sum(lengths), *shape), torch.tensor(lengths))


def test_by_hand():
    # One head of width 1: the second position scores its two keys 0 and ln 3, so it weighs them 1/4 and 3/4.
    q, k, v = (torch.tensor(x).view(2, 1, 1) for x in ([5.0, 1.0], [0.0, math.log(3)], [1.0, 3.0]))
    classes = LengthClasses.of(Jagged.from_rows([[0, 0]]))
    torch.testing.assert_close(causal_attention(q, k, v, classes).flatten(), torch.tensor([1.0, 2.5]))


def test_classes_by_hand():
    classes = LengthClasses.of(Jagged.from_rows([[0, 0], [0, 0, 0], [0]]), width=2)
    assert classes.shapes == ((2, 2), (1, 3))
    assert classes.gather.tolist() == [0, 1, 5, 5, 2, 3, 4]
    assert classes.place.tolist() == [0, 1, 4, 5, 6, 2]


def test_padding_is_known_by_hand():
    classes = LengthClasses.of(Jagged.from_rows([[0, 0], [0, 0, 0], [0]]), width=2)
    assert classes.is_real.tolist() == [True, True, True, False, True, True, True]
    assert classes.is_full == (False, True)


def test_whole_attention_by_hand():
    # As above, but the first position (query 2, keys 0 and ln 3) sees the second too: weights 1/10 and 9/10.
    q, k, v = (torch.tensor(x).view(2, 1, 1) for x in ([2.0, 1.0], [0.0, math.log(3)], [1.0, 3.0]))
    classes = LengthClasses.of(Jagged.from_rows([[0, 0]]))
    torch.testing.assert_close(whole_attention(q, k, v, classes).flatten(), torch.tensor([2.8, 2.5]))


@pytest.mark.parametrize("width", [1, 16, 1000])
@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize(
    ("attention", "reference"),
    [(causal_attention, causal_attention_reference), (whole_attention, whole_attention_reference)],
    ids=["causal", "whole"],
)
def test_agrees_with_the_reference_in_value_and_gradient(width, num_heads, attention, reference):
    torch.manual_seed(0)
    rows = jagged(LENGTHS)
    qkv = [torch.randn(sum(LENGTHS), num_heads, 8, requires_grad=True) for _ in range(3)]
    weights = torch.randn(sum(LENGTHS), num_heads, 8)
    fast = attention(*qkv, LengthClasses.of(rows, width))
    plain = reference(*qkv, rows)
    torch.testing.assert_close(fast, plain)
    fast_gradients = torch.autograd.grad((fast * weights).sum(), qkv)
    plain_gradients = torch.autograd.grad((plain * weights).sum(), qkv)
    for a, b in zip(fast_gradients, plain_gradients):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_agrees_with_torch_multihead_attention():
    torch.manual_seed(0)
    ours = CausalSelfAttention(12, 3)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key_value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
    theirs.out_proj = ours.out
    rows = jagged([5, 2, 4], 12)
    padded, is_real = rows.padded()
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected, _ = theirs(padded, padded, padded, attn_mask=later, key_padding_mask=~is_real)
    torch.testing.assert_close(ours(rows.values, rows.values, LengthClasses.of(rows)), expected[is_real])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("asked", [[0, 5, 40, 111], [3], [111, 0, 0, 20, 19], list(range(112))], ids=len)
def test_asking_for_some_positions_gives_theirs(causal, asked):
    torch.manual_seed(0)
    attention = SelfAttention(8, 2)
    rows = jagged(LENGTHS, 8)
    classes, at = LengthClasses.of(rows), torch.tensor(asked)
    results = []
    for some in (True, False):
        x = rows.values.clone().requires_grad_()
        out = attention(x, x, classes, causal=causal, at=at) if some else attention(x, x, classes, causal=causal)[at]
        results.append((out, *torch.autograd.grad(out.sin().sum(), [x, *attention.parameters()])))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_asking_for_nothing(causal):
    attention, rows = SelfAttention(8, 2), jagged(LENGTHS, 8)
    nothing = torch.zeros(0, dtype=torch.int64)
    out = attention(rows.values, rows.values, LengthClasses.of(rows), causal=causal, at=nothing)
    assert out.shape == (0, 8)


def test_without_a_causal_mask_later_positions_matter_and_other_sequences_do_not():
    torch.manual_seed(0)
    attention = SelfAttention(8, 2)
    rows = jagged([6, 4], 8)
    classes = LengthClasses.of(rows)
    changed = rows.values.clone()
    changed[5] = torch.randn(8)
    before, after = (attention(x, x, classes, causal=False) for x in (rows.values, changed))
    assert not torch.isclose(before[:6], after[:6]).all(1).any()
    assert torch.equal(before[6:], after[6:])


def test_later_positions_do_not_change_earlier_ones_nor_other_sequences():
    torch.manual_seed(0)
    attention = CausalSelfAttention(8, 2)
    rows = jagged([6, 4], 8)
    classes = LengthClasses.of(rows)
    before = attention(rows.values, rows.values, classes)
    changed = rows.values.clone()
    changed[3:6] = torch.randn(3, 8)
    after = attention(changed, changed, classes)
    assert torch.equal(before[:3], after[:3])
    assert torch.equal(before[6:], after[6:])
    assert not torch.isclose(before[3:6], after[3:6]).all(1).any()


def test_companions_in_the_batch_do_not_matter():
    torch.manual_seed(0)
    attention = CausalSelfAttention(8, 2)
    rows = jagged(LENGTHS, 8)
    together = attention(rows.values, rows.values, LengthClasses.of(rows))
    for r in range(rows.num_rows):
        alone = rows.select(torch.tensor([r]))
        out = attention(alone.values, alone.values, LengthClasses.of(alone))
        torch.testing.assert_close(out, together[rows.value_index(torch.tensor([r]))])


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_nothing_to_attend_to(lengths):
    rows = jagged(lengths, 8)
    attention = CausalSelfAttention(8, 2)
    out = attention(rows.values, rows.values, LengthClasses.of(rows))
    assert out.shape == (0, 8)


def test_dropout_is_unbiased_and_off_in_evaluation():
    torch.manual_seed(0)
    attention = CausalSelfAttention(4, 1, dropout=0.5)
    rows = jagged([6], 4)
    classes = LengthClasses.of(rows)
    attention.eval()
    exact = attention(rows.values, rows.values, classes)
    assert torch.equal(exact, attention(rows.values, rows.values, classes))
    attention.train()
    noisy = torch.stack([attention(rows.values, rows.values, classes) for _ in range(3000)])
    torch.testing.assert_close(noisy.mean(0), exact, atol=0.05, rtol=0)
    assert (noisy.std(0) > 0.01).all()


def test_bf16_autocast_stays_near_float32():
    torch.manual_seed(0)
    attention = CausalSelfAttention(16, 2)
    rows = jagged(LENGTHS, 16)
    classes = LengthClasses.of(rows)
    exact = attention(rows.values, rows.values, classes)
    with torch.autocast("cpu", torch.bfloat16):
        rough = attention(rows.values, rows.values, classes)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, atol=0.03, rtol=0.05)


def test_flops_of_the_maps_are_what_torch_counts():
    attention = CausalSelfAttention(8, 2)
    rows = jagged([16], 8)
    with FlopCounterMode(display=False) as counter:
        attention(rows.values, rows.values, LengthClasses.of(rows))
    counted = {op.__name__.split(".")[0]: n for op, n in counter.get_flop_counts()["Global"].items()}
    maps = counted.get("addmm", 0) + counted.get("mm", 0)
    pairs = 16 * 17 / 2  # each position with itself and those before it
    assert attention_flops(16, 8) == maps + 2 * 2 * pairs * 8


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match="multiple of num_heads, got dim 10 and num_heads 4"):
        CausalSelfAttention(10, 4)
