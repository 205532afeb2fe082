"""DeepFM: a factorisation machine and a tower over the same field vectors.

"DeepFM: A Factorization-Machine based Neural Network for CTR Prediction", Guo et al., IJCAI 2017, equation 1:

    logit = FM(fields) + tower(all field vectors end to end)

Both read one set of vectors. The FM part splits into request and candidate as in fm.py; so does the tower's first layer.

Differences from the paper: see fm.py; with several tasks the sum of pairs is weighed per task and dimension, and the tower has one
output each.

B requests, t candidates end to end, F fields, D width of a vector, W first hidden layer of the tower, T tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shortlist.data.batches import Batch, Candidates
from shortlist.data.schema import Space
from shortlist.layers.field_matrix import FieldsConfig
from shortlist.layers.field_tower import DeepPart, FieldBlock, LinearPart
from shortlist.layers.interactions import field_pairs
from shortlist.layers.scoring import HeadConfig, dense_bytes, task_losses
from shortlist.models.base import Cost, Losses, Ranker, RequestShape, Scores
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepFMConfig:
    """Settings of DeepFM."""

    fields: FieldsConfig = FieldsConfig()  # noqa: RUF009  (frozen)
    """Which fields it reads, and how wide their vectors are."""
    head: HeadConfig = HeadConfig(activation="relu")  # noqa: RUF009  (frozen)
    """The tower."""

    def __post_init__(self) -> None:
        self.fields.check("deepfm")
        self.head.check("deepfm")


class DeepFMState(NamedTuple):
    """The request's side, made once."""

    sum_BD: Tensor
    """Sum of its fields' vectors."""
    logit_BT: Tensor
    """Its linear part and the pairs among its own fields."""
    request_BW: Tensor
    """Its part of the tower's first layer."""


@system(
    "deepfm",
    stage="ranking",
    paper="Guo et al., IJCAI 2017",
    cold_users=True,
    cold_items=True,
    tiny={
        "fields": FieldsConfig(dim=8, max_history=10),
        "head": HeadConfig(widths=(16,), activation="relu", dropout=0.0),
    },
)
class DeepFM(Ranker):
    """Products of all pairs of fields beside a tower over the same vectors."""

    Config = DeepFMConfig

    def __init__(self, config: DeepFMConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.fields.max_history
        self.linear = LinearPart(space, config.fields, config.head)
        self.fields = FieldBlock(space, config.fields.dim, config.fields, config.head)
        self.deep = DeepPart(space, self.fields, config.head)
        self.scale_TD = nn.Parameter(
            torch.ones(len(space.tasks), config.fields.dim), requires_grad=len(space.tasks) > 1
        )

    def user_state(self, batch: Batch) -> DeepFMState:
        """See DeepFMState."""
        v_BFD = self.fields.request(batch)
        logit_BT = self.linear.request(batch) + field_pairs(v_BFD) @ self.scale_TD.T
        return DeepFMState(v_BFD.sum(1), logit_BT, self.deep.request(v_BFD, batch))

    def score_candidates(self, state: DeepFMState, candidates: Candidates) -> Scores:
        """Logits [t] per task."""
        row_t = candidates.rows.row_of_value
        v_tFD = self.fields.candidate(candidates)
        both_tD = field_pairs(v_tFD) + state.sum_BD[row_t] * v_tFD.sum(1)
        shallow_tT = state.logit_BT[row_t] + self.linear.candidate(candidates) + both_tD @ self.scale_TD.T
        logit_tT = shallow_tT + self.deep(state.request_BW, v_tFD, candidates)
        return dict(zip(self.space.tasks, logit_tT.unbind(1), strict=True))

    def losses(self, batch: Batch) -> Losses:
        """By task, as `config.head.loss` says."""
        return task_losses(self.score(batch), batch, self.config.head.loss)

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Sums over fields, one inner product per candidate, and the tower."""
        blocks, D = [self.linear.weights, self.fields], self.config.fields.dim
        once = sum(b.request_flops(shape.num_history) + b.num_request * b.dim for b in blocks)
        each = sum(b.candidate_flops + b.num_candidate * b.dim for b in blocks)
        read = sum(b.bytes_read(shape.num_history, shape.num_candidates, cached=cached) for b in blocks)
        return Cost(
            user_flops=0.0 if cached else float(once + 4 * D * self.fields.num_request + self.deep.request_flops),
            item_flops=float(each + 4 * D * (self.fields.num_candidate + 1) + self.deep.candidate_flops),
            bytes=dense_bytes(self) + read,
        )
