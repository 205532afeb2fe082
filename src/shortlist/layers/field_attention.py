"""Transformer blocks over fields whose projections belong to the field, and whose attention is weighed per ordered pair of fields.

"From Scaling to Structured Expressivity: Rethinking Transformers for CTR Prediction", Yan et al. (arXiv 2511.12081). For tokens i, j,
one per field f(i):

    q_i = x_i W_Q^f(i),  k_i, v_i likewise;     s_ij = (q_i . k_j) / sqrt(d_h) * w_f(i)f(j);     o_i = sum_j softmax_j(s_ij) v_j
    FFN_i(z) = SiLU(z W_1^f(i)) W_2^f(i);       block: z + FFN(LayerNorm(Attention(LayerNorm(z))))

With `num_bases` = M > 0 every field's matrix is composed of the M bases of its kind, so that parameters grow with M rather than with F:

    W^f = sum over the K largest entries m of r(phi_f) of softmax(those)_m B_m,     phi_f the field's meta-embedding, r linear

Composition reads no sample, so it is done once per step, and once for all outside training. The paper's body was not at hand: equations
are taken from the abstracts and from two independent implementations that agree on them. Where those differ: w is per block and head and
there is no output projection; the single residual around the block is the one quoted from the paper, `two_residuals` the usual form.

rows = requests or candidates, F tokens, D width, h heads, d = D / h, I inner width, M bases, K active bases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from shortlist.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldBlockConfig:
    """Settings of the blocks."""

    width: int = 32
    """D, width of a token."""
    num_heads: int = 4
    """h, a divisor of the width."""
    num_blocks: int = 2
    ffn_width: int = 128
    """I, inner width of the feed-forward part."""
    field_qkv: bool = True
    """Projections of their own per field; False shares them, as in a plain Transformer."""
    field_ffn: bool = True
    """Feed-forward matrices of their own per field; False shares them."""
    pair_scalars: bool = True
    """The weight w per ordered pair of fields; False is 1 for all."""
    scalar_init: Literal["one", "normal"] = "one"
    """w starts at 1 + N(0, 0.01^2), or at N(0, 0.01^2) as quoted from the paper, where attention is uniform and learns slowly."""
    num_bases: int = 0
    """M, bases that fields' matrices are composed of; 0 = free matrices, which is also what up to M fields get."""
    active_bases: int = 3
    """K, bases in one field's matrix."""
    meta_dim: int = 16
    """Width of a field's meta-embedding."""
    two_residuals: bool = False
    """The usual block with a residual around each half instead of one around both."""
    dropout: float = 0.0
    """Share of a block's outputs set to 0 in training."""

    def __post_init__(self) -> None:
        for name in ("width", "num_heads", "num_blocks", "ffn_width", "active_bases", "meta_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"blocks.{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.num_heads:
            raise ConfigError(f"blocks.num_heads must divide blocks.width, got {self.num_heads} and {self.width}")
        if self.num_bases < 0 or 0 < self.num_bases < self.active_bases:
            raise ConfigError(
                f"blocks.num_bases must be 0 or at least active_bases, got {self.num_bases} and {self.active_bases}"
            )
        if self.scalar_init not in ("one", "normal") or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"blocks: scalar_init must be one or normal and dropout from 0 to below 1, "
                f"got {self.scalar_init!r} and {self.dropout}"
            )


class FieldMatrices(nn.Module):
    """One matrix per field: free, composed of bases, or the same for all.

    Args:
        num_fields: F.
        shape: of a matrix, (in, out).
        own: one per field; False = one for all.
        num_bases, active_bases, meta_dim: see FieldBlockConfig.
    """

    def __init__(
        self, num_fields: int, shape: tuple[int, int], *, own: bool, num_bases: int, active_bases: int, meta_dim: int
    ) -> None:
        super().__init__()
        self.num_fields, self.active = num_fields, active_bases
        self.composed = own and 0 < num_bases < num_fields
        count = num_bases if self.composed else num_fields if own else 1
        self.weight = nn.Parameter(torch.empty(count, *shape))
        for matrix in self.weight:
            nn.init.xavier_uniform_(matrix)
        self.router = nn.Linear(meta_dim, num_bases, bias=False) if self.composed else None
        self._kept: Tensor | None = None

    def train(self, mode: bool = True) -> FieldMatrices:
        """As nn.Module; composed matrices are dropped, since they may change."""
        self._kept = None
        super().train(mode)
        return self

    def alpha(self, meta_Fk: Tensor) -> Tensor:
        """Shares [F, M] of the bases in each field's matrix; 0 but for K of them."""
        assert self.router is not None
        logit_FM = self.router(meta_Fk)
        top = logit_FM.topk(self.active, dim=1)
        return torch.zeros_like(logit_FM).scatter(1, top.indices, top.values.softmax(1))

    def forward(self, meta_Fk: Tensor) -> Tensor:
        """float [F, in, out], or [1, in, out] where all fields share one."""
        if self.router is None:
            return self.weight
        if self.training or torch.is_grad_enabled():
            return torch.einsum("fm,mio->fio", self.alpha(meta_Fk), self.weight)
        if self._kept is None or self._kept.device != self.weight.device:
            self._kept = torch.einsum("fm,mio->fio", self.alpha(meta_Fk), self.weight)
        return self._kept


class QKV(NamedTuple):
    """Tokens and what attention reads of them."""

    x_tFD: Tensor
    q_tFD: Tensor
    k_tFD: Tensor
    v_tFD: Tensor


class FieldTransformerBlock(nn.Module):
    """One block over F tokens. `project` works token by token, so a request's tokens are projected once for all its candidates."""

    def __init__(self, num_fields: int, config: FieldBlockConfig) -> None:
        super().__init__()
        self.config = config
        D, I = config.width, config.ffn_width  # noqa: E741

        def matrices(shape: tuple[int, int], own: bool) -> FieldMatrices:
            return FieldMatrices(
                num_fields,
                shape,
                own=own,
                num_bases=config.num_bases,
                active_bases=config.active_bases,
                meta_dim=config.meta_dim,
            )

        self.query, self.key, self.value = (matrices((D, D), config.field_qkv) for _ in range(3))
        self.inner, self.outer = matrices((D, I), config.field_ffn), matrices((I, D), config.field_ffn)
        self.before, self.between = nn.LayerNorm(D), nn.LayerNorm(D)
        self.dropout = nn.Dropout(config.dropout)
        # Flat, since optimisers decay matrices: decay would pull attention to uniform.
        self.scalars = None
        if config.pair_scalars:
            start = 1.0 if config.scalar_init == "one" else 0.0
            self.scalars = nn.Parameter(start + 0.01 * torch.randn(config.num_heads * num_fields**2))
        self.shape = (config.num_heads, num_fields, num_fields)

    @property
    def scalar_hFF(self) -> Tensor | None:
        """w [h, F, F]: row the field that looks, column the field looked at; None where all are 1."""
        return None if self.scalars is None else self.scalars.view(self.shape)

    @property
    def matrices(self) -> tuple[FieldMatrices, ...]:
        """Of queries, keys, values, and the two layers of the feed-forward part."""
        return self.query, self.key, self.value, self.inner, self.outer

    def project(self, x: Tensor, meta_Fk: Tensor, tokens: slice) -> QKV:
        """Queries, keys and values of tokens x [rows, F', D], those of the fields `tokens`."""
        normed = self.before(x)
        q, k, v = (_by_field(normed, each(meta_Fk), tokens) for each in (self.query, self.key, self.value))
        return QKV(x, q, k, v)

    def forward(self, tokens: QKV, meta_Fk: Tensor) -> Tensor:
        """float [rows, F, D]: the tokens after the block."""
        heads = self.config.num_heads
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in tokens[1:])
        score_rhFF = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        scalar_hFF = self.scalar_hFF
        if scalar_hFF is not None:
            score_rhFF = score_rhFF * scalar_hFF
        mixed = (score_rhFF.softmax(-1) @ v).transpose(1, 2).flatten(2)
        if self.config.two_residuals:
            mixed = tokens.x_tFD + mixed
        every = slice(None)
        inner = nn.functional.silu(_by_field(self.between(mixed), self.inner(meta_Fk), every))
        outer = self.dropout(_by_field(inner, self.outer(meta_Fk), every))
        return outer + (mixed if self.config.two_residuals else tokens.x_tFD)

    def plain(self, x_FD: Tensor, meta_Fk: Tensor) -> Tensor:
        """One row, token by token and by the formula: the reference of tests."""
        F, heads, scalar_hFF = len(x_FD), self.config.num_heads, self.scalar_hFF

        def of(each: FieldMatrices, f: int) -> Tensor:
            whole = each(meta_Fk)
            return whole[f if len(whole) > 1 else 0]

        normed = self.before(x_FD)
        q, k, v = (
            torch.stack([normed[f] @ of(each, f) for f in range(F)]) for each in (self.query, self.key, self.value)
        )
        mixed = []
        for i in range(F):
            parts = []
            for h, (q_i, k_h, v_h) in enumerate(zip(q[i].chunk(heads), k.chunk(heads, 1), v.chunk(heads, 1))):
                w = torch.ones(F) if scalar_hFF is None else scalar_hFF[h, i]
                share = torch.stack([q_i @ k_h[j] / len(q_i) ** 0.5 * w[j] for j in range(F)]).softmax(0)
                parts.append(torch.stack([share[j] * v_h[j] for j in range(F)]).sum(0))
            mixed.append(torch.cat(parts) + (x_FD[i] if self.config.two_residuals else 0))
        out = []
        for f, each in enumerate(mixed):
            outer = nn.functional.silu(self.between(each) @ of(self.inner, f)) @ of(self.outer, f)
            out.append(outer + (each if self.config.two_residuals else x_FD[f]))
        return torch.stack(out)


def _by_field(x_rFD: Tensor, weight_FDE: Tensor, tokens: slice) -> Tensor:
    """Each token times its field's matrix: [rows, F', E]."""
    if len(weight_FDE) == 1:
        return x_rFD @ weight_FDE[0]
    return torch.einsum("rfd,fde->rfe", x_rFD, weight_FDE[tokens])
