"""HSTU's attention in blocks: a case by hand, the formula as the authors write it over padded tensors, and every gradient."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from shortlist.data.jagged import Jagged
from shortlist.kernels import sequences as sequences_module
from shortlist.kernels.hstu_attention import (
    RelativeBias,
    Sequences,
    hstu_attention,
    hstu_attention_reference,
    softmax_attention,
    softmax_attention_reference,
    time_bucket,
)
from shortlist.kernels.sequences import bucket_table
from shortlist.layers.hstu import HSTUBlock, HSTUBlockConfig, HSTUStack, KeysValues


def sequences_of(lengths: list[int], times: Tensor | None = None) -> Sequences:
    """Plain causal sequences; each event asks a minute ahead."""
    rows = Jagged.from_lengths(torch.zeros(sum(lengths)), torch.tensor(lengths))
    time_T = torch.arange(sum(lengths)) * 100 if times is None else times
    return Sequences(rows.offsets, rows.offsets, rows.lengths, rows.position_of_value, time_T, time_T + 60)


def random_case(rng: np.random.Generator, lengths: list[int], *, general: bool, span: int = 10**8) -> Sequences:
    """With `general`, some of each sequence's keys are candidates, some come from a cache, and places are anything."""
    length_B = torch.tensor(lengths, dtype=torch.int64)
    num_candidates_B = torch.tensor([int(rng.integers(0, n + 1)) if general else 0 for n in lengths], dtype=torch.int64)
    num_history_B = length_B - num_candidates_B
    cached_B = torch.tensor(
        [int(rng.integers(0, n + 1)) if general else 0 for n in num_history_B.tolist()], dtype=torch.int64
    )
    keys = Jagged.from_lengths(torch.zeros(sum(lengths)), length_B)
    queries = Jagged.from_lengths(torch.zeros(int((length_B - cached_B).sum())), length_B - cached_B)
    T, S = len(keys.values), len(queries.values)
    place = torch.from_numpy(rng.integers(0, 40, T)) if general else keys.position_of_value
    key_time, query_time = (torch.from_numpy(np.sort(rng.integers(0, span, n))) for n in (T, S))
    return Sequences(keys.offsets, queries.offsets, num_history_B, place, key_time, query_time)


def tensors_for(sequences: Sequences, heads: int, reach: int = 15, num_buckets: int = 60) -> dict[str, Tensor]:
    T, S = int(sequences.offsets[-1]), int(sequences.query_offsets[-1])
    shapes = {
        "q": (S, heads, 5),
        "k": (T, heads, 5),
        "v": (T, heads, 7),
        "position": (2 * reach + 1,),
        "time": (num_buckets,),
    }
    return {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}


def both(sequences: Sequences, x: dict[str, Tensor], *, position: bool = True, time: bool = True):
    """(value, gradients) of the reference and of the blocks, for the same weighting of the output."""
    found = []
    weight = torch.randn(len(x["q"]), *x["v"].shape[1:])
    bias = RelativeBias(x["position"] if position else None, x["time"] if time else None)
    for attention in (hstu_attention_reference, hstu_attention):
        out = attention(x["q"], x["k"], x["v"], sequences, bias, alpha=0.7, divisor=9.0)
        gradients = torch.autograd.grad((out * weight).sum(), list(x.values()), allow_unused=True)
        found.append((out, gradients))
    return found


def assert_agree(sequences: Sequences, x: dict[str, Tensor], **bias: bool) -> None:
    (value, gradients), (fast_value, fast_gradients) = both(sequences, x, **bias)
    torch.testing.assert_close(fast_value, value, rtol=1e-5, atol=1e-5)
    for name, a, b in zip(x, fast_gradients, gradients):
        a, b = (torch.zeros_like(x[name]) if g is None else g for g in (a, b))
        scale = max(float(b.abs().max()) if b.numel() else 0.0, 1.0)
        torch.testing.assert_close(a / scale, b / scale, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


# --- by hand ---


def test_two_events_by_hand():
    """One head of width 1, alpha 1, n = 4. The second event asks at 200 s about keys at 0 and 100 s: 200 s and 100 s apart."""
    sequences = Sequences(
        torch.tensor([0, 2]), torch.tensor([0, 2]), torch.tensor([2]), torch.tensor([0, 1]),
        torch.tensor([0, 100]), torch.tensor([100, 200]),
    )  # fmt: skip
    q, k, v = (torch.tensor(x).view(2, 1, 1) for x in ([1.0, 2.0], [3.0, 4.0], [5.0, 6.0]))
    position = torch.tensor([0.1, 0.2, 0.3])  # key one before, same, one after
    time = torch.zeros(30)
    time[math.floor(math.log(100) / 0.301)], time[math.floor(math.log(200) / 0.301)] = 0.5, 0.7  # buckets 15 and 17

    def act(s: float) -> float:
        return s / (1 + math.exp(-s)) / 4

    first = act(3 + 0.2 + 0.5) * 5
    second = act(6 + 0.1 + 0.7) * 5 + act(8 + 0.2 + 0.5) * 6
    for attention in (hstu_attention, hstu_attention_reference):
        out = attention(q, k, v, sequences, RelativeBias(position, time), alpha=1.0, divisor=4.0)
        torch.testing.assert_close(out.flatten(), torch.tensor([first, second]))


def test_time_buckets_are_natural_logarithms_over_0_301():
    seconds = torch.tensor([0, 1, 2, 3, -3, 60, 3_600, 86_400, 10**12])
    assert time_bucket(seconds, 129).tolist() == [0, 0, 2, 3, 3, 13, 27, 37, 91]
    assert time_bucket(seconds, 30).max() == 29
    assert time_bucket(torch.tensor([86_400]), 129).item() != math.floor(math.log10(86_400) / 0.301)


@pytest.mark.parametrize("num_buckets", [1, 2, 60, 129])
def test_buckets_by_table_are_those_of_the_logarithm(num_buckets):
    """Around every boundary below 2^31, and for a million differences at random."""
    edge = (torch.arange(72, dtype=torch.float64) * 0.301).exp().long()
    near = (edge[:, None] + torch.arange(-4, 5)).flatten()
    drawn = torch.from_numpy(np.exp(np.random.default_rng(0).uniform(0, 21.4, 1_000_000)).astype(np.int64))
    seconds = torch.cat([torch.arange(5_000), near, drawn]).clamp(0, 2**31 - 2)
    found = sequences_module._looked_up(seconds.int(), bucket_table(num_buckets, torch.device("cpu")))
    assert torch.equal(found.long(), time_bucket(seconds, num_buckets))


# --- against the formula over padded tensors ---


def test_agrees_with_the_authors_padded_form():
    """einsum, SiLU, mask by multiplication, einsum over [B, L, L], as in the public code; padding's times are 0 there."""
    torch.manual_seed(0)
    lengths = [5, 0, 12, 1]
    sequences = random_case(np.random.default_rng(0), lengths, general=False)
    x = tensors_for(sequences, heads=2, reach=20)
    rows = Jagged(torch.zeros(sum(lengths)), sequences.offsets)
    q, k, v, tq, tk = (
        rows.with_values(y).padded()[0] for y in (x["q"], x["k"], x["v"], sequences.query_time, sequences.key_time)
    )
    L = q.shape[1]
    apart = torch.arange(L) - torch.arange(L)[:, None]
    rab = x["position"][20 + apart] + x["time"][time_bucket(tq[:, :, None] - tk[:, None], 60)]
    score = torch.einsum("bihd,bjhd->bhij", q, k) * 0.7 + rab[:, None]
    weight = silu(score) / 9.0 * torch.ones(L, L).tril()
    padded = torch.einsum("bhij,bjhe->bihe", weight, v)[rows.padded()[1]]
    bias = RelativeBias(x["position"], x["time"])
    out = hstu_attention(x["q"], x["k"], x["v"], sequences, bias, alpha=0.7, divisor=9.0)
    torch.testing.assert_close(out, padded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(("position", "time"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("general", [False, True], ids=["plain", "candidates-and-cache"])
def test_values_and_all_gradients_agree_with_the_reference(heads, position, time, general):
    torch.manual_seed(0)
    sequences = random_case(np.random.default_rng(heads), [3, 0, 1, 40, 17, 70, 2], general=general)
    assert_agree(sequences, tensors_for(sequences, heads), position=position, time=time)


@pytest.mark.parametrize("seed", range(12))
def test_any_lengths_candidates_and_caches(seed):
    """Ragged lengths with empty sequences and single events; spans of time up to beyond 2^31 seconds."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    lengths = np.where(rng.random(8) < 0.3, rng.integers(0, 2, 8), rng.integers(0, 100, 8)).tolist()
    sequences = random_case(rng, lengths, general=bool(seed % 2), span=int(10 ** rng.integers(1, 13)))
    assert_agree(sequences, tensors_for(sequences, heads=1 + seed % 2))


def test_no_sequence_and_no_event():
    for lengths in ([], [0], [0, 0]):
        sequences = random_case(np.random.default_rng(0), lengths, general=False)
        x = tensors_for(sequences, heads=2)
        bias = RelativeBias(x["position"], x["time"])
        out = hstu_attention(x["q"], x["k"], x["v"], sequences, bias, alpha=1.0, divisor=1.0)
        assert out.shape == (0, 2, 7)
        gradients = torch.autograd.grad(out.sum(), list(x.values()))
        assert not any(g.any() for g in gradients)


@pytest.mark.parametrize(("width", "tile", "cells"), [(1, 4, 64), (7, 16, 1 << 10), (64, 256, 1 << 20)])
def test_how_it_is_cut_does_not_matter(monkeypatch, width, tile, cells):
    for name, value in {"CLASS_WIDTH": width, "QUERY_TILE": tile, "CELLS_AT_ONCE": cells, "KEPT_BUCKETS": 50}.items():
        monkeypatch.setattr(sequences_module, name, value)
    torch.manual_seed(0)
    for general in (False, True):
        sequences = random_case(np.random.default_rng(3), [3, 0, 1, 40, 17, 70, 2], general=general)
        assert_agree(sequences, tensors_for(sequences, heads=2))


def test_half_precision_is_computed_in_float32():
    torch.manual_seed(0)
    sequences = random_case(np.random.default_rng(0), [30, 4], general=False)
    x = tensors_for(sequences, heads=1)
    bias = RelativeBias(x["position"], x["time"])
    halves = [x[name].bfloat16() for name in "qkv"]
    with torch.autocast("cpu", torch.bfloat16):
        out = hstu_attention(*halves, sequences, bias, alpha=1.0, divisor=1.0)
    expected = hstu_attention_reference(*(h.float() for h in halves), sequences, bias, alpha=1.0, divisor=1.0)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_weights_of_the_whole_batch_are_never_held():
    """Kept for the backward pass: queries, keys, values and a byte per pair of time buckets; not one float per pair."""
    sequences = sequences_of([512] * 4)
    x = tensors_for(sequences, heads=1)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hstu_attention(
            x["q"], x["k"], x["v"], sequences, RelativeBias(x["position"], x["time"]), alpha=1.0, divisor=1.0
        )
    assert sum(kept.values()) < 4 * 512 * 512
    assert max(block.rows.stop - block.rows.start for block in sequences.blocks) <= 4


# --- traps ---


def test_the_divisor_is_a_constant_not_the_length_of_the_row():
    """Twice the same event gives twice the sum: how much there is of it must survive."""
    none = RelativeBias(None, None)
    out = []
    for length in (1, 2):
        ones = torch.ones(length, 1, 3)
        out.append(hstu_attention(ones, ones, ones, sequences_of([length]), none, alpha=1.0, divisor=50.0)[-1])
    torch.testing.assert_close(out[1], 2 * out[0])


def test_what_is_hidden_adds_nothing_whatever_its_bias():
    """Masked after SiLU: a later event with a huge bias leaves earlier ones as they were, without NaN."""
    torch.manual_seed(0)
    sequences = sequences_of([6])
    x = tensors_for(sequences, heads=1)
    position = torch.cat([torch.zeros(16), torch.full((15,), 1e4)])  # keys that come after the query
    with torch.no_grad():
        plain = hstu_attention(x["q"], x["k"], x["v"], sequences, RelativeBias(None, None), alpha=1.0, divisor=1.0)
        biased = hstu_attention(x["q"], x["k"], x["v"], sequences, RelativeBias(position, None), alpha=1.0, divisor=1.0)
    torch.testing.assert_close(plain, biased)


def test_candidates_see_the_history_and_themselves_alone():
    """Scored together as scored one by one, at the same place and time."""
    torch.manual_seed(0)
    block = HSTUBlock(8, 20, HSTUBlockConfig(num_heads=2), has_clock=True).eval()
    history, candidates = torch.randn(5, 8), torch.randn(3, 8)

    def run(x_SD: Tensor, num_candidates: int) -> Tensor:
        cuts, times = (
            torch.tensor([0, len(x_SD)]),
            torch.cat([torch.arange(5) * 100, torch.full((num_candidates,), 900)]),
        )
        place = torch.cat([torch.arange(5), torch.full((num_candidates,), 5)])
        query_time = torch.cat([times[1:5], torch.full((1 + num_candidates,), 900)])
        return block(x_SD, Sequences(cuts, cuts, torch.tensor([5]), place, times, query_time))[0][5:]

    together = run(torch.cat([history, candidates]), 3)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], run(torch.cat([history, candidates[i : i + 1]]), 1))


@pytest.mark.parametrize("variant", ["research", "production"])
def test_a_stack_goes_on_from_cached_keys_and_values(variant):
    torch.manual_seed(0)
    stack = HSTUStack(8, 30, HSTUBlockConfig(num_heads=2, variant=variant), has_clock=True).eval()
    x_TD, whole = torch.randn(12, 8), sequences_of([7, 5])
    out, kept = stack(x_TD, whole)
    old = torch.tensor(
        [True] * 4 + [False] * 3 + [True] * 5
    )  # three new events of the first sequence, none of the second
    before = [KeysValues(k[old], v[old]) for k, v in kept]
    later = replace(whole, query_offsets=torch.tensor([0, 3, 3]), query_time=whole.query_time[~old])
    again, kept_again = stack(x_TD[~old], later, before)
    torch.testing.assert_close(again, out[~old])
    torch.testing.assert_close(kept_again[1].k_THd, kept[1].k_THd)


# --- the softmax twin ---


@pytest.mark.parametrize("biased", [False, True])
def test_the_softmax_twin_agrees_with_its_reference(biased):
    torch.manual_seed(0)
    sequences = random_case(np.random.default_rng(0), [3, 0, 1, 40, 17], general=False)
    x = tensors_for(sequences, heads=2)
    bias = RelativeBias(x["position"], x["time"]) if biased else RelativeBias(None, None)
    found = []
    for attention in (softmax_attention, softmax_attention_reference):
        out = attention(x["q"], x["k"], x["v"], sequences, bias, alpha=0.3)
        found.append((out, *torch.autograd.grad(out.sin().sum(), [x["q"], x["k"], x["v"]])))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_softmax_twin_forgets_how_much_there_is():
    ones = torch.ones(4, 1, 3)
    out = softmax_attention(ones, ones, ones, sequences_of([4]), RelativeBias(None, None), alpha=1.0)
    torch.testing.assert_close(out, ones)
