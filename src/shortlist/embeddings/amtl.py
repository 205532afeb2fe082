"""AMTL: a layer that learns how many dimensions each id deserves from how often it occurs (Yan et al., CIKM 2021).

    s_i = [z(log(1 + count_i)), rank_i]                  z: standardised over the table's ids; rank from 0 (rarest) to 1
    alpha_i = sigmoid(z(log(1 + count_i)))
    z_i = alpha_i head(s_i) + (1 - alpha_i) tail(s_i)    two MLPs, d logits: one per length
    k_i = argmax z_i,   m_i = 1 in the first k_i places  (k from 1 to d)
    vector = m_i * e_i

The mask is hard in both directions of use; its gradient is that of the softmax of z / T (straight-through). After training only the
first k_i numbers of each vector are stored, and the two networks are dropped.

The paper could not be read whole; the inputs s, the standardisation and the start (argmax = d: nothing is masked) are reconstructed.
Besides: the gradient of an id's mask is the mean, not the sum, over its occurrences in a batch, so that frequent ids do not rule the
networks. The unknown id is never masked. Nothing in the paper's loss asks for short vectors; `size_weight` adds that, off by default.

n ids, d width, m distinct ids of a batch, H hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shortlist.embeddings.base import Table, TableChoice, rows_of
from shortlist.embeddings.packed import PackedRows, emptied
from shortlist.errors import ConfigError
from shortlist.registry import system

START_LOGIT = 1.0
"""Of the full length before training; the others start at 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AMTLConfig(TableChoice):
    """Settings of the adaptively masked table."""

    name: str = "amtl"
    """Registered name of the table."""
    hidden: int = 64
    """Hidden width of each of the two networks."""
    temperature: float = 0.2
    """T: below 1 the gradient goes to lengths near the chosen one's logit; too low and no length ever changes."""
    twins: bool = True
    """A network for frequent and one for rare ids; False = one network of double width."""
    size_weight: float = 0.0
    """Added to the loss: this times the mean share of dimensions kept by the ids of a batch. Not in the paper."""

    def __post_init__(self) -> None:
        TableChoice.__post_init__(self)
        if self.hidden < 1:
            raise ConfigError(f"hidden must be at least 1, got {self.hidden}")
        if not self.temperature > 0:
            raise ConfigError(f"temperature must be above 0, got {self.temperature}")
        if self.size_weight < 0:
            raise ConfigError(f"size_weight must not be below 0, got {self.size_weight}")


@system("amtl", stage="embeddings", paper="Yan et al., CIKM 2021", tiny={"hidden": 8})
class AMTLTable(Table):
    """Full rows in training, of which each id shows a learned number of leading dimensions; packed afterwards."""

    Config = AMTLConfig
    needs_counts = True
    feature_N2: Tensor

    def __init__(self, num_rows: int, dim: int, config: AMTLConfig) -> None:
        super().__init__(num_rows, dim)
        self.config = config
        self.rows = rows_of(num_rows, dim, std=config.init_std, sparse=config.sparse)
        width = config.hidden if config.twins else 2 * config.hidden
        self.head = _network(width, dim)
        self.tail = _network(width, dim) if config.twins else None
        self.packed = PackedRows(dim, sparse=config.sparse)
        self.register_buffer("feature_N2", torch.empty(0, 2))

    def prepare(self, counts_N: Tensor) -> None:
        """See Table.prepare; sets the networks' inputs s, float32 [n, 2]."""
        if len(self.feature_N2) or self.packed.is_filled:
            return
        self.check_counts(counts_N)
        self.feature_N2 = frequency_features(counts_N).to(self.rows.weight.device)

    def forward(self, ids: Tensor) -> Tensor:
        """float32 [*, d] for ids [...]."""
        if self.packed.is_filled:
            return self.packed(ids)
        vectors = self.rows(ids)
        if not len(self.feature_N2):
            return vectors
        distinct_m, inverse, count_m = ids.unique(return_inverse=True, return_counts=True)
        mask_mD, kept_m = self.mask(distinct_m)
        mask_mD = _averaged(mask_mD, count_m)
        if self.config.size_weight and self.training and len(distinct_m):
            vectors = _Charged.apply(vectors, self.config.size_weight * kept_m.mean())
        return vectors * mask_mD[inverse]

    def mask(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Masks of ids [m], float32 [m, d] of zeros and ones, and the share of dimensions kept [m]; both with the softmax's gradient."""
        logit_mD = self.logits(ids)
        soft_mD = (logit_mD / self.config.temperature).softmax(1).flip(1).cumsum(1).flip(1)  # P(length >= place)
        places = torch.arange(self.dim, device=ids.device)
        hard_mD = (places <= logit_mD.argmax(1, keepdim=True)).to(soft_mD.dtype)
        # The difference is exactly 0, so that the values are exactly those of serving.
        mask_mD = hard_mD + (soft_mD - soft_mD.detach())
        mask_mD = torch.where(ids[:, None] > 0, mask_mD, 1.0)
        return mask_mD, mask_mD.mean(1)

    def logits(self, ids: Tensor) -> Tensor:
        """z of ids [m], float32 [m, d]: one number per length 1..d."""
        feature_m2 = self.feature_N2[ids]
        if self.tail is None:
            return self.head(feature_m2)
        alpha_m1 = feature_m2[:, :1].sigmoid()
        return alpha_m1 * self.head(feature_m2) + (1 - alpha_m1) * self.tail(feature_m2)

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """Dimensions that each id keeps, int64 [n]."""
        if self.packed.is_filled:
            return self.packed.lengths
        if not len(self.feature_N2):
            return torch.full((self.num_rows,), self.dim, device=self.rows.weight.device)
        ids = torch.arange(self.num_rows, device=self.feature_N2.device)
        return torch.cat([self.mask(chunk)[0].sum(1).long() for chunk in ids.split(65_536)])

    def finish(self) -> None:
        """See Table.finish: stores the kept numbers only, and drops the networks."""
        if self.packed.is_filled or not len(self.feature_N2):
            return
        self.packed.fill(self.rows.weight, self.lengths())
        emptied(self.rows)
        for network in filter(None, (self.head, self.tail)):
            for linear in (layer for layer in network if isinstance(layer, nn.Linear)):
                linear.weight = nn.Parameter(linear.weight.new_empty(0, 0))
                linear.bias = nn.Parameter(linear.bias.new_empty(0))
        self.feature_N2 = self.feature_N2.new_empty(0, 2)


def frequency_features(counts_N: Tensor) -> Tensor:
    """s, float32 [n, 2]: log counts standardised over all but the unknown id, and the rank in 0..1, equal for equal counts."""
    known = counts_N[1:].double()
    log = known.log1p()
    spread = log.std(correction=0) if len(log) else log.sum()
    score = (log - log.mean()) / spread if spread > 0 else torch.zeros_like(log)
    _, inverse, num_equal = known.unique(return_inverse=True, return_counts=True)
    below = num_equal.cumsum(0) - num_equal
    rank = (below + (num_equal - 1) / 2)[inverse] / max(len(known) - 1, 1)
    return nn.functional.pad(torch.stack([score, rank], dim=1), (0, 0, 1, 0)).float()


def _network(width: int, dim: int) -> nn.Sequential:
    """An MLP from s to one logit per length that starts at the full length for everyone."""
    last = nn.Linear(width, dim)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    with torch.no_grad():
        last.bias[-1] = START_LOGIT
    return nn.Sequential(nn.Linear(2, width), nn.Tanh(), last)


def _averaged(mask_mD: Tensor, count_m: Tensor) -> Tensor:
    """The same masks; the gradient of each is divided by its number of occurrences, which backward sums over."""
    fixed_mD = mask_mD.detach()
    return fixed_mD + (mask_mD - fixed_mD) / count_m[:, None]


class _Charged(torch.autograd.Function):
    """Passes a tensor on and adds a charge, a scalar, to the loss as far as gradients are concerned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, charge: Tensor) -> Tensor:
        """float [*]: x."""
        ctx.save_for_backward(charge)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (charge,) = ctx.saved_tensors
        return gradients[0], torch.ones_like(charge)
