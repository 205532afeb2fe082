"""DCN V2: explicit products of all numbers of the input, layer by layer, beside or under a tower.

"DCN V2: Improved Deep & Cross Network and Practical Lessons for Web-scale Learning to Rank Systems", Wang et al., WWW 2021:

    x_0     = all field vectors end to end
    x_{l+1} = x_0 * (W_l x_l + b_l) + x_l                                      equation 1; W = U V' with `rank`, equation 2
    logit   = w' [x_L; tower(x_0)]   in parallel,  or  tower(x_L)   stacked         figure 1

L layers hold products of up to L + 1 fields. The first cross layer and, in parallel, the tower's first layer read x_0 alone, so the
request's share of both is made once per request.

Differences from the paper: the mixture of low-rank experts (equation 3) is left out; see fm.py for past, pair fields and loss.

B requests, t candidates end to end, F fields, D width of a vector, X = F D, R of it the request's, W first layer of the tower, T tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn

from shortlist.data.batches import Batch, Candidates
from shortlist.data.schema import Space
from shortlist.errors import ConfigError
from shortlist.layers.field_matrix import FieldsConfig
from shortlist.layers.field_tower import DeepPart, FieldBlock
from shortlist.layers.interactions import CrossLayers
from shortlist.layers.scoring import HeadConfig, dense_bytes, make_tower, task_losses
from shortlist.models.base import Cost, Losses, Ranker, RequestShape, Scores
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class DCNv2Config:
    """Settings of DCN V2."""

    fields: FieldsConfig = FieldsConfig()  # noqa: RUF009  (frozen)
    """Which fields it reads, and how wide their vectors are."""
    num_cross: int = 3
    """Cross layers."""
    rank: int = 0
    """Width of the low-rank form of their matrices; 0 = whole matrices."""
    structure: Literal["parallel", "stacked", "cross"] = "parallel"
    """The tower beside the cross layers, on top of them, or none (cross alone)."""
    head: HeadConfig = HeadConfig(activation="relu")  # noqa: RUF009  (frozen)
    """The tower."""

    def __post_init__(self) -> None:
        self.fields.check("dcnv2")
        self.head.check("dcnv2")
        if self.num_cross < 1 or self.rank < 0:
            raise ConfigError(
                f"dcnv2: num_cross must be at least 1 and rank at least 0, got {self.num_cross} and {self.rank}"
            )
        if self.structure not in ("parallel", "stacked", "cross"):
            raise ConfigError(f"dcnv2: structure must be parallel, stacked or cross, got {self.structure!r}")


class DCNv2State(NamedTuple):
    """The request's side, made once."""

    request_BR: Tensor
    """Its part of x_0."""
    share_B: Tensor
    """Its part of the first cross layer."""
    tower_BW: Tensor
    """Its part of the tower's first layer; empty where the tower is stacked or not there."""


@system(
    "dcnv2",
    stage="ranking",
    paper="Wang et al., WWW 2021",
    cold_users=True,
    cold_items=True,
    tiny={
        "fields": FieldsConfig(dim=8, max_history=10),
        "num_cross": 2,
        "head": HeadConfig(widths=(16,), activation="relu", dropout=0.0),
    },
)
class DCNv2(Ranker):
    """Cross layers over all field vectors, with a tower beside or on top."""

    Config = DCNv2Config

    def __init__(self, config: DCNv2Config, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.fields.max_history
        self.fields = FieldBlock(space, config.fields.dim, config.fields, config.head)
        D, Fr, Fc = config.fields.dim, self.fields.num_request, self.fields.num_candidate
        self.cross = CrossLayers(Fr * D, Fc * D, config.num_cross, config.rank)
        stacked = config.structure == "stacked"
        self.stack = make_tower(space, [], [D] * (Fr + Fc), config.head) if stacked else None
        self.deep = DeepPart(space, self.fields, config.head) if config.structure == "parallel" else None
        self.out = None if stacked else nn.Linear((Fr + Fc) * D, len(space.tasks), bias=self.deep is None)

    def user_state(self, batch: Batch) -> DCNv2State:
        """See DCNv2State."""
        v_BFD = self.fields.request(batch)
        request_BR = v_BFD.flatten(1)
        tower_BW = request_BR.new_zeros(batch.size, 0)
        if self.deep is not None:
            tower_BW = self.deep.request(v_BFD, batch)
        elif self.stack is not None:
            tower_BW = self.stack.request_side(tower_BW, batch)
        return DCNv2State(request_BR, self.cross.request_side(request_BR), tower_BW)

    def score_candidates(self, state: DCNv2State, candidates: Candidates) -> Scores:
        """Logits [t] per task."""
        rows = candidates.rows
        row_t = rows.row_of_value
        v_tFD = self.fields.candidate(candidates)
        x_tX = self.cross(state.request_BR[row_t], state.share_B[row_t], v_tFD.flatten(1))
        if self.stack is not None:
            logit_tT = self.stack(state.tower_BW, x_tX, row_t, rows.values)
        else:
            assert self.out is not None
            logit_tT = self.out(x_tX)
            if self.deep is not None:
                logit_tT = logit_tT + self.deep(state.tower_BW, v_tFD, candidates)
        return dict(zip(self.space.tasks, logit_tT.unbind(1), strict=True))

    def losses(self, batch: Batch) -> Losses:
        """By task, as `config.head.loss` says."""
        return task_losses(self.score(batch), batch, self.config.head.loss)

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """The request's share of the first layers once; per candidate all else."""
        fields, tower = self.fields, self.deep or self.stack
        out = 0 if self.out is None else 2 * self.out.weight.numel()
        once = fields.request_flops(shape.num_history) + self.cross.request_flops
        each = fields.candidate_flops + self.cross.candidate_flops + out
        if tower is not None:
            once, each = once + tower.request_flops, each + tower.candidate_flops
        read = fields.bytes_read(shape.num_history, shape.num_candidates, cached=cached)
        return Cost(user_flops=0.0 if cached else float(once), item_flops=float(each), bytes=dense_bytes(self) + read)
