"""Quasi-linear attention: every position reads one small matrix per head that sums up all others, so time is linear in length.

    W = phi( sum over S of phi(k)' v / n )          n = number of source positions S
    source      o = phi(q) W
    target      o = phi(q) W + (phi(q) . phi(k)) v  its own term: a target sees S and itself, never another target

"Massive Memorization with Hundreds of Trillions of Parameters for Sequential Transducer Generative Recommenders" (VISTA), Chen et al.,
ICLR 2026, arXiv 2510.22049. The sum is divided by n, which the paper leaves to the norm of the output: without it phi(W) of a long and of
a short history would be different functions. The wiring of norm, gate and SGLU around it is reconstructed after TransNormerLLM.

The sum is additive over events, so a history of any length can be read in blocks; phi is applied to the whole sum, when it is read.

B rows (histories), N blocks, L positions of a block, K seeds, D width, H heads, d = D / H, S source and T target positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from shortlist.data.jagged import Jagged
from shortlist.errors import ConfigError

Phi = Literal["silu", "elu"]
BLOCK = 64
"""Positions of a block at most: the waste of padding is below one block per history."""


def phi(x: Tensor, kind: Phi) -> Tensor:
    """The nonlinearity, elementwise: silu, or the shifted ELU (x from 1 on, exp(x - 1) below)."""
    return silu(x) if kind == "silu" else torch.where(x >= 1, x, (x.clamp(max=1) - 1).exp())


def quasi_linear_attention(
    source: Sequence[Tensor], target: Sequence[Tensor] | None = None, kind: Phi = "silu"
) -> tuple[Tensor, Tensor | None]:
    """Outputs of one history's source positions, and of targets if there are any.

    Args:
        source: q, k, v [H, S, d] before phi.
        target: q, k, v [H, T, d] before phi.

    Returns: float [H, S, d] and [H, T, d].
    """
    q, k, v = source
    state_Hdd = phi(phi(k, kind).transpose(1, 2) @ v / k.shape[1], kind)
    out = phi(q, kind) @ state_Hdd
    if target is None:
        return out, None
    q, k, v = phi(target[0], kind), phi(target[1], kind), target[2]
    return out, q @ state_Hdd + (q * k).sum(-1, keepdim=True) * v


def quasi_linear_reference(
    source: Sequence[Tensor], target: Sequence[Tensor] | None = None, kind: Phi = "silu"
) -> tuple[Tensor, Tensor | None]:
    """The same, position by position and number by number; for tests."""
    heads, length, width = source[0].shape
    q, k, v = phi(source[0], kind), phi(source[1], kind), source[2]
    state = torch.zeros(heads, width, width)
    for h in range(heads):
        for s in range(length):
            for a in range(width):
                for b in range(width):
                    state[h, a, b] += k[h, s, a] * v[h, s, b] / length
    state = phi(state, kind)
    out = torch.stack([torch.stack([state[h].T @ q[h, s] for s in range(length)]) for h in range(heads)])
    if target is None:
        return out, None
    q, k, v = phi(target[0], kind), phi(target[1], kind), target[2]
    own = [
        torch.stack([state[h].T @ q[h, t] + torch.dot(q[h, t], k[h, t]) * v[h, t] for t in range(q.shape[1])])
        for h in range(heads)
    ]
    return out, torch.stack(own)


@dataclass(frozen=True, slots=True)
class Blocks:
    """The values of jagged rows in blocks of equal size, a row's last one filled up.

    Rows of 3 and 1 values with a width of 2 give index [[0, 1], [2, 3], [3, 3]], where the second 3 and the last are filling.
    """

    index_NL: Tensor
    """int64: position in the values."""
    is_real_NL: Tensor
    """bool: False for filling."""
    row_N: Tensor
    """int64: which row a block belongs to."""

    @classmethod
    def of(cls, rows: Jagged, width: int = BLOCK) -> Blocks:
        """Cut jagged rows, whose values are not read; blocks are no wider than the longest row."""
        lengths_B, device = rows.lengths, rows.offsets.device
        width = max(1, min(width, int(lengths_B.max()) if rows.num_rows else 0))
        count_B = (lengths_B + width - 1).div(width, rounding_mode="floor")
        row_N = torch.repeat_interleave(torch.arange(rows.num_rows, device=device), count_B)
        place_N = torch.arange(len(row_N), device=device) - (count_B.cumsum(0) - count_B)[row_N]
        index_NL = (rows.offsets[row_N] + place_N * width)[:, None] + torch.arange(width, device=device)
        is_real_NL = index_NL < rows.offsets[row_N + 1][:, None]
        return cls(index_NL.clamp(max=max(int(rows.offsets[-1]) - 1, 0)), is_real_NL, row_N)

    def split(self, positions: int) -> Iterator[Blocks]:
        """Groups of blocks with about so many positions each, in order."""
        count = max(1, positions // self.index_NL.shape[1])
        for parts in zip(self.index_NL.split(count), self.is_real_NL.split(count), self.row_N.split(count)):
            if len(parts[2]):
                yield Blocks(*parts)


class QuasiLinearLayer(nn.Module):
    """x + W_o(norm(o) * gate), then x + a gated linear map (SGLU): both from the normed input.

    Args:
        width: D, a multiple of num_heads.
        kind: phi.
    """

    def __init__(self, width: int, num_heads: int, kind: Phi = "silu") -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise ConfigError(f"dim must be a multiple of num_heads, got dim {width} and num_heads {num_heads}")
        self.num_heads, self.kind = num_heads, kind
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.gate = nn.Linear(width, width)
        self.norm_out = nn.RMSNorm(width // num_heads, eps=1e-8)
        self.out = nn.Linear(width, width)
        self.norm_ffn = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(width, width)
        self.write_flops = 2 * (2 * width * width + width * width // num_heads)
        self.read_flops = 2 * (6 * width * width + width * width // num_heads)

    def write(self, x_NLD: Tensor, is_real_NL: Tensor | None = None) -> Tensor:
        """float32 [N, H, d, d]: sum over L of phi(k)' v. Filling is cut after phi, since phi of a bias is not 0."""
        k_NLD, v_NLD = self.key_value(self.norm(x_NLD)).chunk(2, dim=-1)
        k_NLD = phi(k_NLD, self.kind)
        if is_real_NL is not None:
            k_NLD = k_NLD * is_real_NL[..., None]
        return self._heads(k_NLD).transpose(2, 3) @ self._heads(v_NLD)

    def state(self, sum_BHdd: Tensor, count_B: Tensor) -> Tensor:
        """float32 [B, H, d, d] that is read, from the raw sum of what was written and the number of positions [B]."""
        return phi(sum_BHdd / count_B.view(-1, 1, 1, 1), self.kind)

    def forward(self, x_NLD: Tensor, state_NHdd: Tensor) -> Tensor:
        """float32 [N, L, D]: the layer's output for positions that read the state of their row."""
        u_NLD = self.norm(x_NLD)
        read_NHLd = self._heads(phi(self.query(u_NLD), self.kind)) @ state_NHdd
        mixed_NLD = self.norm_out(read_NHLd).transpose(1, 2).reshape(x_NLD.shape)
        x_NLD = x_NLD + self.out(mixed_NLD * self.gate(u_NLD))
        one_NLD, other_NLD = self.up(self.norm_ffn(x_NLD)).chunk(2, dim=-1)
        return x_NLD + self.down(one_NLD * other_NLD)

    def _heads(self, x_NLD: Tensor) -> Tensor:
        """[N, H, L, d]."""
        return x_NLD.view(*x_NLD.shape[:2], self.num_heads, x_NLD.shape[2] // self.num_heads).transpose(1, 2)


Parts = Callable[[], Iterable[tuple[Tensor, Blocks]]]
"""Event vectors [N, L, D] with their blocks, part by part; called once per layer."""


class SummaryEncoder(nn.Module):
    """A history becomes K vectors: what K learned seeds have read after all layers, each seeing all events and all seeds.

    Args:
        num_seeds: K.
        width: D.
        num_layers: quasi-linear layers; those before the last one also rewrite the events.
    """

    def __init__(self, num_seeds: int, width: int, num_heads: int, num_layers: int, kind: Phi = "silu") -> None:
        super().__init__()
        self.seeds_KD = nn.Parameter(torch.randn(num_seeds, width) * width**-0.5)
        self.layers = nn.ModuleList(QuasiLinearLayer(width, num_heads, kind) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, event_NLD: Tensor, blocks: Blocks, length_B: Tensor) -> Tensor:
        """Summaries float32 [B, K, D] of histories that are in memory as a whole; carries gradients.

        Args:
            event_NLD: vectors of the events as `blocks` lays them out.
            length_B: int64, events of each history; 0 gives what the seeds see of one another.
        """
        seed_BKD, count_B = self._seeds(len(length_B)), length_B + len(self.seeds_KD)
        for depth, layer in enumerate(self._stack()):
            written = layer.write(event_NLD, blocks.is_real_NL)
            state_BHdd = layer.state(layer.write(seed_BKD).index_add(0, blocks.row_N, written), count_B)
            seed_BKD = layer(seed_BKD, state_BHdd)
            if depth + 1 < len(self.layers):
                event_NLD = layer(event_NLD, state_BHdd[blocks.row_N])
        return self.norm(seed_BKD)

    @torch.no_grad()
    def stream(self, parts: Parts, length_B: Tensor) -> Tensor:
        """The same for histories of any length: one pass over all parts per layer, sums kept in float64, no event kept.

        Pass l reads every part anew through the layers before l, whose states stand by then.
        """
        seed_BKD, count_B = self._seeds(len(length_B)), length_B + len(self.seeds_KD)
        states: list[Tensor] = []
        for layer in self._stack():
            sum_BHdd = layer.write(seed_BKD).double()
            for event_NLD, blocks in parts():
                for earlier, state_BHdd in zip(self._stack(), states):
                    event_NLD = earlier(event_NLD, state_BHdd[blocks.row_N])
                sum_BHdd.index_add_(0, blocks.row_N, layer.write(event_NLD, blocks.is_real_NL).double())
            states.append(layer.state(sum_BHdd, count_B).to(seed_BKD.dtype))
            seed_BKD = layer(seed_BKD, states[-1])
        return self.norm(seed_BKD)

    def flops(self, num_events: float) -> float:
        """FLOPs of one summary, as `forward` works."""
        write, read = self._stack()[0].write_flops, self._stack()[0].read_flops
        seeds, events = len(self.seeds_KD) * (write + read), num_events * write
        return len(self.layers) * (seeds + events) + (len(self.layers) - 1) * num_events * read

    def _stack(self) -> list[QuasiLinearLayer]:
        return [layer for layer in self.layers if isinstance(layer, QuasiLinearLayer)]

    def _seeds(self, num_rows: int) -> Tensor:
        return self.seeds_KD.expand(num_rows, *self.seeds_KD.shape)
