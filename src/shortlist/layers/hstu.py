"""The layer of HSTU, the hierarchical sequential transduction unit (Zhai et al., ICML 2024, section 3.2), in its two published forms.

    [U, V, Q, K] = f1(Norm X)        research: SiLU on all four; production: on U alone
    A V          = SiLU(alpha Q K' + rab) V / n
    Y            = f2(Norm(A V) * U)        production: f2([U, A V, U * Norm(A V)])
    X            = X + Y

B sequences, T positions of all sequences end to end, S of them new (the rest come from a cache), D width, H heads, d width of a head's
query and key, e of its value.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from shortlist.errors import ConfigError
from shortlist.kernels.hstu_attention import RelativeBias, Sequences, hstu_attention, softmax_attention
from shortlist.layers.dropout import Dropout

Variant = Literal["research", "production"]
Attention = Literal["pointwise", "softmax"]
NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class HSTUBlockConfig:
    """Settings of the stack of layers."""

    num_blocks: int = 2
    """Layers."""
    num_heads: int = 1
    """Heads H."""
    qk_dim: int | None = None
    """Width d of a head's query and key; None = dim / num_heads."""
    v_dim: int | None = None
    """Width e of a head's value; None = dim / num_heads."""
    variant: Variant = "research"
    """research: the authors' public code, from which the public figures come; production: their ranking example, with affine norms,
    linear queries, keys and values, scores scaled by 1 / sqrt(d), and an output map over [U, A V, U * Norm(A V)]."""
    position_bias: bool = True
    """Relative position bias."""
    time_bias: bool = True
    """Relative time bias; off where the log has no clock."""
    num_time_buckets: int = 129
    """Buckets of the time bias; each spans a factor of 1.35 of seconds."""
    attention: Attention = "pointwise"
    """pointwise: SiLU(scores) / n, which keeps how much there is of what is sought; softmax: its twin in the paper's comparison, with
    scores scaled by 1 / sqrt(d), which the paper found to need a lower learning rate."""
    block_dropout: float = 0.2
    """Share of gated outputs dropped in training."""

    def check(self, system: str, dim: int) -> None:
        """Raises ConfigError, in the name of `system`, where a number is out of range."""
        for name in ("num_blocks", "num_heads", "num_time_buckets"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{system}: {name} must be at least 1, got {getattr(self, name)}")
        if dim % self.num_heads and (self.qk_dim is None or self.v_dim is None):
            raise ConfigError(f"{system}: num_heads must divide dim, got {self.num_heads} heads and dim {dim}")
        if not 0 <= self.block_dropout < 1:
            raise ConfigError(f"{system}: block_dropout must be from 0 to below 1, got {self.block_dropout}")


class KeysValues(NamedTuple):
    """What a layer keeps of positions for those that come after them."""

    k_THd: Tensor
    v_THe: Tensor


class Newest(NamedTuple):
    """The newest position of each sequence alone, for what only asks what comes next."""

    place_R: Tensor
    """int64 [R]: place among the S new positions, of each of R sequences that have any."""
    sequences: Sequences
    """Over all positions, with these as the only queries."""

    @classmethod
    def of(cls, sequences: Sequences) -> Newest:
        """The last query of each sequence that has one."""
        num_queries_B = sequences.query_offsets.diff()
        place_R = sequences.query_offsets[1:][num_queries_B > 0] - 1
        offsets = torch.zeros_like(sequences.query_offsets)
        torch.cumsum((num_queries_B > 0).long(), 0, out=offsets[1:])
        return cls(
            place_R, replace(sequences, query_offsets=offsets, query_time=sequences.query_time.index_select(0, place_R))
        )


class HSTUBlock(nn.Module):
    """One layer.

    Args:
        dim: D.
        max_length: n, the constant that sums are divided by, and the farthest relative position told apart.
        config: settings.
        has_clock: whether times mean anything; without them there is no time bias.
    """

    def __init__(self, dim: int, max_length: int, config: HSTUBlockConfig, *, has_clock: bool) -> None:
        super().__init__()
        self.config = config
        self.divisor = float(max_length)
        self.heads = config.num_heads
        self.d, self.e = config.qk_dim or dim // config.num_heads, config.v_dim or dim // config.num_heads
        is_production = config.variant == "production"
        width = self.heads * self.e
        self.norm_in = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=is_production)
        self.norm_out = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=is_production)
        self.project = nn.Linear(dim, 2 * width + 2 * self.heads * self.d, bias=is_production)
        self.out = nn.Linear(width * (3 if is_production else 1), dim, bias=not is_production)
        self.dropout = Dropout(config.block_dropout)
        if is_production:
            nn.init.xavier_uniform_(self.project.weight)
            nn.init.zeros_(self.project.bias)
        else:
            nn.init.normal_(self.project.weight, std=0.02)
            nn.init.zeros_(self.out.bias)
        nn.init.xavier_uniform_(self.out.weight)
        position = torch.randn(2 * max_length - 1) * 0.02 if config.position_bias else None
        time = torch.randn(config.num_time_buckets) * 0.02 if config.time_bias and has_clock else None
        self.position_bias = None if position is None else nn.Parameter(position)
        self.time_bias = None if time is None else nn.Parameter(time)

    def forward(
        self,
        x_SD: Tensor,
        sequences: Sequences,
        before: KeysValues | None = None,
        newest: Newest | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """The layer's output [S, D], and keys and values of all positions [T, ...].

        Args:
            x_SD: the new positions of each sequence.
            sequences: over all positions.
            before: keys and values of the positions that are not new, [T - S, ...]; None = all positions are new.
            newest: the only positions whose output is wanted; None = all new ones.
        """
        width = self.heads * self.e
        mixed_SX = self.project(self.norm_in(x_SD))
        is_research = self.config.variant == "research"
        mixed_SX = silu(mixed_SX) if is_research else mixed_SX
        u_SX, v_SX, q_SX, k_SX = mixed_SX.split([width, width, self.heads * self.d, self.heads * self.d], dim=-1)
        u_SX, alpha = (u_SX, 1.0) if is_research else (silu(u_SX), self.d**-0.5)
        new = KeysValues(k_SX.unflatten(-1, (self.heads, self.d)), v_SX.unflatten(-1, (self.heads, self.e)))
        known = new if before is None else appended(before, new, sequences)
        if newest is not None:
            x_SD, u_SX, q_SX = (part.index_select(0, newest.place_R) for part in (x_SD, u_SX, q_SX))
            sequences = newest.sequences
        q_SHd, bias = q_SX.unflatten(-1, (self.heads, self.d)), RelativeBias(self.position_bias, self.time_bias)
        if self.config.attention == "softmax":
            av_SHe = softmax_attention(q_SHd, known.k_THd, known.v_THe, sequences, bias, alpha=self.d**-0.5)
        else:
            av_SHe = hstu_attention(q_SHd, known.k_THd, known.v_THe, sequences, bias, alpha=alpha, divisor=self.divisor)
        av_SX = av_SHe.flatten(1)
        gated_SX = self.norm_out(av_SX) * u_SX
        if self.config.variant == "production":
            gated_SX = torch.cat([u_SX, av_SX, gated_SX], dim=-1)
        return x_SD + self.out(self.dropout(gated_SX)), known

    def flops(self, num_new: int, num_before: int = 0, *, only_newest: bool = False) -> float:
        """FLOPs of so many new positions of one sequence after so many cached ones: both maps, and scores and sums over the pairs that see
        each other; with `only_newest` as in `forward` of the stack.
        """
        num_asking = min(num_new, 1) if only_newest else num_new
        maps = 2 * (num_new * self.project.weight.numel() + num_asking * self.out.weight.numel())
        pairs = num_asking * (num_before + num_new) - num_asking * (num_asking - 1) / 2
        return maps + 2 * pairs * self.heads * (self.d + self.e)


def appended(before: KeysValues, new: KeysValues, sequences: Sequences) -> KeysValues:
    """Keys and values [T, ...] of all positions: those of a cache, [T - S, ...] end to end, with the new ones after each sequence's."""
    lengths_B, num_new_B = sequences.offsets.diff(), sequences.query_offsets.diff()
    row_T = torch.repeat_interleave(torch.arange(len(lengths_B), device=lengths_B.device), lengths_B)
    place_T = torch.arange(len(row_T), device=row_T.device) - sequences.offsets[row_T]
    is_new_T = place_T >= (lengths_B - num_new_B)[row_T]

    def merged(old: Tensor, fresh: Tensor) -> Tensor:
        out = fresh.new_empty(len(is_new_T), *fresh.shape[1:])
        out[is_new_T] = fresh
        out[~is_new_T] = old.to(fresh.dtype)
        return out

    return KeysValues(merged(before.k_THd, new.k_THd), merged(before.v_THe, new.v_THe))


class HSTUStack(nn.Module):
    """The layers one after another; arguments as those of HSTUBlock."""

    def __init__(self, dim: int, max_length: int, config: HSTUBlockConfig, *, has_clock: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            HSTUBlock(dim, max_length, config, has_clock=has_clock) for _ in range(config.num_blocks)
        )

    def forward(
        self,
        x_SD: Tensor,
        sequences: Sequences,
        before: list[KeysValues] | None = None,
        *,
        only_newest: bool = False,
    ) -> tuple[Tensor, list[KeysValues]]:
        """Output [S, D] of the new positions, and each layer's keys and values of all positions, for a cache.

        Args:
            x_SD: the new positions.
            sequences: over all positions.
            before: each layer's keys and values of the positions that are not new, [T - S, ...]; None = all are new.
            only_newest: give the output of each sequence's newest position alone, [R, D] for R sequences that have a new one: the last
                layer then attends from those, which is most of its work saved.
        """
        kept = []
        for number, block in enumerate(self.blocks):
            is_last = number + 1 == len(self.blocks)
            newest = Newest.of(sequences) if only_newest and is_last else None
            x_SD, known = block(x_SD, sequences, None if before is None else before[number], newest)
            kept.append(known)
        return x_SD, kept

    def flops(self, num_new: int, num_before: int = 0, *, only_newest: bool = False) -> float:
        """FLOPs of all layers; see `HSTUBlock.flops`."""
        blocks = [block for block in self.blocks if isinstance(block, HSTUBlock)]
        below = sum(block.flops(num_new, num_before) for block in blocks[:-1])
        return below + blocks[-1].flops(num_new, num_before, only_newest=only_newest)
