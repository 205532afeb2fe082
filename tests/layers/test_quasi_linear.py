"""Quasi-linear attention: against a loop, its gradients against the closed forms, blocks, streams, and what must not matter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from shortlist.data.jagged import Jagged
from shortlist.errors import ConfigError
from shortlist.layers.quasi_linear import (
    Blocks,
    QuasiLinearLayer,
    SummaryEncoder,
    phi,
    quasi_linear_attention,
    quasi_linear_reference,
)

LENGTHS = [3, 0, 17, 1, 130, 64]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def jagged(lengths=LENGTHS, width=8):
    return Jagged.from_lengths(drawn(sum(lengths), width), torch.tensor(lengths))


def encoder(num_layers=1, num_seeds=4, width=8):
    torch.manual_seed(1)
    made = SummaryEncoder(num_seeds, width, 2, num_layers)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return made


def whole(made, rows):
    blocks = Blocks.of(rows)
    return made(rows.values[blocks.index_NL], blocks, rows.lengths)


def test_phi_by_hand():
    x = torch.tensor([-1.0, 0.0, 1.0, 3.0])
    torch.testing.assert_close(phi(x, "silu"), x / (1 + torch.exp(-x)))
    torch.testing.assert_close(phi(x, "elu"), torch.tensor([torch.e**-2, torch.e**-1, 1.0, 3.0]))


def test_attention_by_hand():
    """One head of width 1 with the shifted ELU, which leaves 1 and above as they are: W = (2 * 3 + 1 * 4) / 2 = 5."""
    source = [torch.tensor(x).view(1, 2, 1) for x in ([1.0, 2.0], [2.0, 1.0], [3.0, 4.0])]
    target = [torch.tensor(x).view(1, 1, 1) for x in (3.0, 2.0, 10.0)]
    seen, asked = quasi_linear_attention(source, target, "elu")
    assert seen.flatten().tolist() == [5.0, 10.0]
    assert asked.item() == 3 * 5 + 3 * 2 * 10


@pytest.mark.parametrize("kind", ["silu", "elu"])
@pytest.mark.parametrize(("length", "targets", "width"), [(1, 1, 2), (5, 3, 4), (9, 2, 3)])
def test_the_closed_form_agrees_with_the_loop(kind, length, targets, width):
    source = [drawn(2, length, width, seed=s) for s in range(3)]
    target = [drawn(2, targets, width, seed=s + 3) for s in range(3)]
    for fast, slow in zip(quasi_linear_attention(source, target, kind), quasi_linear_reference(source, target, kind)):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)


def test_gradients_of_the_linear_core_are_those_of_the_paper():
    """phi the identity on what is used (the shifted ELU from 1 on), heads and n of 1: the paper's closed forms, row by row."""
    length, targets, width = 6, 3, 4
    # Inputs of at least 1 and a state above 1 keep phi at the identity; n divides K'V, so it divides its gradients too.
    leaves = [
        (drawn(1, n, width, seed=s).abs() + 1).requires_grad_() for s, n in enumerate([length] * 3 + [targets] * 3)
    ]
    q_s, k_s, v_s, q_t, k_t, v_t = leaves
    out_s, out_t = quasi_linear_attention(leaves[:3], leaves[3:], "elu")
    d_s, d_t = drawn(1, length, width, seed=9), drawn(1, targets, width, seed=10)
    ((out_s * d_s).sum() + (out_t * d_t).sum()).backward()
    q_s, k_s, v_s, q_t, k_t, v_t, d_s, d_t = (x.detach()[0] for x in (*leaves, d_s, d_t))
    z, w = k_s.T @ v_s / length, (q_s.T @ d_s + q_t.T @ d_t) / length
    own = (q_t * k_t).sum(1, keepdim=True)
    cross = (d_t * v_t).sum(1, keepdim=True)
    expected = (d_s @ z.T, v_s @ w.T, k_s @ w, d_t @ z.T + cross * k_t, cross * q_t, own * d_t)
    for leaf, gradient in zip(leaves, expected):
        torch.testing.assert_close(leaf.grad[0], gradient, rtol=1e-4, atol=1e-4)


def test_a_target_sees_no_other_target():
    source, target = [drawn(2, 7, 4, seed=s) for s in range(3)], [drawn(2, 5, 4, seed=s + 3) for s in range(3)]
    _, before = quasi_linear_attention(source, target)
    changed = [x.clone() for x in target]
    for x in changed:
        x[:, 3] += 5
    _, after = quasi_linear_attention(source, changed)
    others = [0, 1, 2, 4]
    assert torch.equal(before[:, others], after[:, others])
    assert not torch.equal(before[:, 3], after[:, 3])


def test_blocks_by_hand():
    blocks = Blocks.of(Jagged.from_rows([[0, 0, 0], [], [0]]), width=2)
    assert blocks.index_NL.tolist() == [[0, 1], [2, 3], [3, 3]]
    assert blocks.is_real_NL.tolist() == [[True, True], [True, False], [True, False]]
    assert blocks.row_N.tolist() == [0, 0, 2]
    parts = list(blocks.split(4))
    assert [len(part.row_N) for part in parts] == [2, 1]
    assert not list(Blocks.of(Jagged.from_rows([[], []])).split(4))


@torch.no_grad()
@pytest.mark.parametrize("num_layers", [1, 3])
def test_the_encoder_agrees_with_attention_written_out_row_by_row(num_layers):
    """Each history alone, unpadded, through every layer with the reference attention over [events; seeds]."""
    made, rows = encoder(num_layers), jagged([3, 0, 5])
    fast = whole(made, rows)
    for row in range(3):
        x = torch.cat([rows.values[rows.offsets[row] : rows.offsets[row + 1]], made.seeds_KD])
        for layer in made.layers:
            u = layer.norm(x)
            q, (k, v) = layer.query(u), layer.key_value(u).chunk(2, dim=-1)
            heads = [t.view(len(x), 2, 4).transpose(0, 1) for t in (q, k, v)]
            read, _ = quasi_linear_reference(heads)
            mixed = layer.norm_out(read).transpose(0, 1).reshape(x.shape)
            x = x + layer.out(mixed * layer.gate(u))
            one, other = layer.up(layer.norm_ffn(x)).chunk(2, dim=-1)
            x = x + layer.down(one * other)
        torch.testing.assert_close(fast[row], made.norm(x[-4:]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("positions", [1, 100, 10_000])
def test_a_stream_of_blocks_gives_what_the_whole_gives(num_layers, positions):
    made, rows = encoder(num_layers), jagged()
    blocks = Blocks.of(rows, width=16)
    num_reads = 0

    def parts():
        nonlocal num_reads
        num_reads += 1
        return ((rows.values[part.index_NL], part) for part in blocks.split(positions))

    torch.testing.assert_close(made.stream(parts, rows.lengths), whole(made, rows), rtol=1e-5, atol=1e-5)
    assert num_reads == num_layers


@torch.no_grad()
def test_a_long_stream_stays_exact():
    """200,000 events, against the same in float64 as a whole."""
    made, rows = encoder(), jagged([200_000])
    blocks = Blocks.of(rows)
    streamed = made.stream(lambda: ((rows.values[p.index_NL], p) for p in blocks.split(4_096)), rows.lengths)
    exact = whole(made.double(), rows.with_values(rows.values.double()))
    torch.testing.assert_close(streamed.double(), exact, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_raw_sum_can_be_appended_to():
    """What a history of 20 events wrote, plus what 7 more write, reads like all 27 at once; phi comes after the sum."""
    layer = encoder().layers[0]
    x = drawn(1, 27, 8)
    sums = layer.write(x[:, :20]) + layer.write(x[:, 20:])
    torch.testing.assert_close(
        layer.state(sums, torch.tensor([27])), layer.state(layer.write(x), torch.tensor([27])), rtol=1e-5, atol=1e-6
    )
    apart = layer.state(layer.write(x[:, :20]), torch.tensor([27])) + layer.state(
        layer.write(x[:, 20:]), torch.tensor([27])
    )
    assert not torch.allclose(apart, layer.state(sums, torch.tensor([27])), atol=1e-3)


@torch.no_grad()
def test_neither_padding_nor_neighbours_matter():
    made, rows = encoder(2), jagged()
    together = whole(made, rows)
    for row in range(len(LENGTHS)):
        alone = whole(made, rows.select(torch.tensor([row])))
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-4)
    assert torch.isfinite(together).all()


@torch.no_grad()
def test_long_and_short_histories_are_on_one_scale():
    """A history told a hundred times over is the same history: the sum is divided by n. Seeds weigh little beside 400 events."""
    made, events = encoder(num_seeds=1), drawn(400, 8)
    short = whole(made, Jagged.from_lengths(events, torch.tensor([400])))
    long = whole(made, Jagged.from_lengths(events.repeat(100, 1), torch.tensor([40_000])))
    torch.testing.assert_close(long, short, rtol=0.05, atol=0.05)
    assert torch.isfinite(long.half()).all()


@torch.no_grad()
def test_order_does_not_matter_but_every_event_does():
    made, rows = encoder(), jagged([40])
    mixed = rows.with_values(rows.values[torch.randperm(40)])
    torch.testing.assert_close(whole(made, mixed), whole(made, rows), rtol=1e-4, atol=1e-5)
    other = rows.values.clone()
    other[17, 0] += 3
    assert (whole(made, rows.with_values(other)) - whole(made, rows)).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("num_layers", [1, 2])
def test_flops_are_linear_and_agree_with_the_counter(num_layers):
    made = encoder(num_layers, width=16)
    made.requires_grad_(False)
    rows = jagged([128], width=16)
    with FlopCounterMode(display=False) as counted:
        whole(made, rows)
    assert made.flops(128) == pytest.approx(counted.get_total_flops(), rel=0.05)
    assert made.flops(2_000) - made.flops(1_000) == pytest.approx(made.flops(1_000) - made.flops(0))


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ConfigError, match="multiple of num_heads"):
        QuasiLinearLayer(8, 3)
