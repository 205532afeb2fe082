"""A GRU over jagged rows: against one row at a time, and from states handed on."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shortlist.data.jagged import Jagged
from shortlist.layers.gru import gru_flops, run_gru, run_gru_reference

LENGTHS = [3, 0, 7, 1, 7, 2]


def jagged(lengths: list[int]) -> Jagged:
    torch.manual_seed(1)
    return Jagged.from_lengths(torch.randn(sum(lengths), 4), torch.tensor(lengths))


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("started", [False, True])
def test_agrees_with_one_row_at_a_time_in_value_and_gradient(num_layers, started):
    rows, gru = jagged(LENGTHS), nn.GRU(4, 5, num_layers)
    start = torch.randn(num_layers, len(LENGTHS), 5) if started else None
    results = []
    for run in (run_gru, run_gru_reference):
        x = rows.values.clone().requires_grad_()
        out, last = run(gru, x, rows, start)
        results.append((out, last, torch.autograd.grad((out.cos().sum() + last.sin().sum()), x)[0]))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_the_last_output_is_the_state_after_the_last_event():
    rows, gru = jagged(LENGTHS), nn.GRU(4, 5)
    out, last = run_gru(gru, rows.values, rows)
    assert torch.equal(last[0, 2], out[rows.offsets[3] - 1])
    assert not last[0, 1].any()  # an empty row keeps the zeros it starts with


def test_a_row_in_two_parts_is_the_row():
    rows, gru = jagged([6, 3]), nn.GRU(4, 5, 2)
    whole, last = run_gru(gru, rows.values, rows)
    first = torch.tensor([True] * 4 + [False] * 2 + [True] * 3)
    _, state = run_gru(gru, rows.values[first], Jagged.from_lengths(rows.values[first], torch.tensor([4, 3])))
    rest = Jagged.from_lengths(rows.values[~first], torch.tensor([2, 0]))
    out, again = run_gru(gru, rest.values, rest, state)
    torch.testing.assert_close(out, whole[~first])
    torch.testing.assert_close(again, last)


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_nothing_to_read(lengths):
    out, last = run_gru(
        nn.GRU(4, 5), torch.zeros(0, 4), Jagged.from_lengths(torch.zeros(0), torch.tensor(lengths).long())
    )
    assert out.shape == (0, 5)
    assert last.shape == (1, len(lengths), 5)


def test_flops_are_those_of_its_matrices():
    gru = nn.GRU(4, 5, 2)
    x = torch.randn(1, 4)
    with FlopCounterMode(display=False) as counter:
        for layer in range(2):
            h = torch.randn(1, 5)
            x = x @ getattr(gru, f"weight_ih_l{layer}").T
            _ = h @ getattr(gru, f"weight_hh_l{layer}").T
            x = torch.randn(1, 5)
    assert gru_flops(4, 5, 2) == counter.get_total_flops()
