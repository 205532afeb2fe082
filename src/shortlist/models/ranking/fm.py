"""FM: the product of every pair of fields, from one vector per field value.

"Factorization Machines", Rendle, ICDM 2010, equation 1:

    logit = w_0 + sum_i w_i + sum_{i<j} <v_i, v_j>

over the fields of a request (user, context, past) and of a candidate (item, its fields, user-item pair fields). The sum over pairs splits:
pairs inside the request are a number made once, and the rest needs of the request only the sum s of its vectors,

    sum_{i<j} <v_i, v_j> = pairs(request) + pairs(candidate) + <s(request), s(candidate)>

so a candidate costs its own fields and one inner product of width D, as in a two-tower.

Differences from the paper: the past is read as the mean of its items' vectors, which is a field of its own; a number's vector is
a linear map of it, that of a pair field a curve; with several tasks the vectors are shared and each task weighs their dimensions;
the loss is a softmax over a request's candidates unless "bce" is chosen. Without `pairs` it is logistic regression over the fields.

B requests, t candidates end to end, F fields, D width of a vector, T tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shortlist.data.batches import Batch, Candidates
from shortlist.data.schema import Space
from shortlist.errors import ConfigError
from shortlist.layers.field_matrix import FieldsConfig
from shortlist.layers.field_tower import FieldBlock, LinearPart
from shortlist.layers.interactions import field_pairs
from shortlist.layers.scoring import HeadConfig, dense_bytes, task_losses
from shortlist.models.base import Cost, Losses, Ranker, RequestShape, Scores
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class FMConfig:
    """Settings of the factorisation machine."""

    fields: FieldsConfig = FieldsConfig()  # noqa: RUF009  (frozen)
    """Which fields it reads, and how wide their vectors are."""
    pairs: bool = True
    """Products of pairs; False leaves the linear part: logistic regression."""
    head: HeadConfig = HeadConfig(widths=(), pair_bins=8)  # noqa: RUF009  (frozen)
    """Loss, user ids, id dropout and pair bins; there is no tower, so the rest is not read."""

    def __post_init__(self) -> None:
        self.fields.check("fm")
        self.head.check("fm")
        if self.head.widths or self.head.gates.any or self.head.apg.mode != "off":
            raise ConfigError("fm has no tower: leave head.widths, head.gates and head.apg out, or use deepfm")


class FMState(NamedTuple):
    """The request's side, made once."""

    sum_BD: Tensor
    """Sum of its fields' vectors."""
    logit_BT: Tensor
    """Its linear part and the pairs among its own fields."""


@system(
    "fm",
    stage="ranking",
    paper="Rendle, ICDM 2010",
    cold_users=True,
    cold_items=True,
    tiny={"fields": FieldsConfig(dim=8, max_history=10)},
)
class FM(Ranker):
    """Linear weights and the products of all pairs of fields."""

    Config = FMConfig

    def __init__(self, config: FMConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.fields.max_history
        self.linear = LinearPart(space, config.fields, config.head)
        self.fields = FieldBlock(space, config.fields.dim, config.fields, config.head) if config.pairs else None
        self.scale_TD = nn.Parameter(
            torch.ones(len(space.tasks), config.fields.dim), requires_grad=len(space.tasks) > 1
        )

    def user_state(self, batch: Batch) -> FMState:
        """See FMState."""
        linear_BT = self.linear.request(batch)
        if self.fields is None:
            return FMState(linear_BT.new_zeros(batch.size, self.config.fields.dim), linear_BT)
        v_BFD = self.fields.request(batch)
        return FMState(v_BFD.sum(1), linear_BT + field_pairs(v_BFD) @ self.scale_TD.T)

    def score_candidates(self, state: FMState, candidates: Candidates) -> Scores:
        """Logits [t] per task."""
        row_t = candidates.rows.row_of_value
        logit_tT = state.logit_BT[row_t] + self.linear.candidate(candidates)
        if self.fields is not None:
            v_tFD = self.fields.candidate(candidates)
            both_tD = field_pairs(v_tFD) + state.sum_BD[row_t] * v_tFD.sum(1)
            logit_tT = logit_tT + both_tD @ self.scale_TD.T
        return dict(zip(self.space.tasks, logit_tT.unbind(1), strict=True))

    def losses(self, batch: Batch) -> Losses:
        """By task, as `config.head.loss` says."""
        return task_losses(self.score(batch), batch, self.config.head.loss)

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Sums over the request's fields once; per candidate the sums over its own and one inner product."""
        blocks = [self.linear.weights] + ([] if self.fields is None else [self.fields])
        pairs = 0.0 if self.fields is None else 4.0 * self.config.fields.dim
        once = sum(b.request_flops(shape.num_history) + b.num_request * b.dim for b in blocks)
        each = sum(b.candidate_flops + b.num_candidate * b.dim for b in blocks)
        own, of_candidate = (0, 0) if self.fields is None else (self.fields.num_request, self.fields.num_candidate)
        read = sum(b.bytes_read(shape.num_history, shape.num_candidates, cached=cached) for b in blocks)
        return Cost(
            user_flops=0.0 if cached else once + pairs * own,
            item_flops=each + pairs * (of_candidate + 1),
            bytes=dense_bytes(self) + read,
        )
