"""MMoE: experts that all tasks share, and per task a gate that mixes them and a tower on top.

"Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts", Ma et al., KDD 2018, section 4:

    f^k(x) = sum_i softmax(W_g^k x)_i f_i(x)        y_k = h_k(f^k(x))

with ReLU experts f_i of one shape and gates that are linear maps without bias. `gates = "one"` is the paper's OMoE: one gate for all
tasks, so that they differ in their towers alone.

Differences: x is the request (user, context, mean of the past items) beside the candidate (its vector and pair fields); the request's
share of experts and gates is computed once per request. `expert_dropout`, which the paper does not have, leaves experts out in training
against gates that collapse onto one.

B requests, t candidates end to end, n experts, h width of an expert's first layer, e of its output, W of all first maps, T tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from shortlist.data.batches import Batch, Candidates
from shortlist.data.schema import Space
from shortlist.errors import ConfigError
from shortlist.layers.experts import (
    Experts,
    InputConfig,
    LinearBank,
    TaskInput,
    TaskTowers,
    check_experts,
    gate,
    mixed,
)
from shortlist.layers.scoring import RankingLoss, dense_bytes, task_losses
from shortlist.models.base import Cost, Losses, Ranker, RequestShape, Scores
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class MMoEConfig:
    """Settings of MMoE."""

    num_experts: int = 8
    """Networks that all tasks share."""
    expert_widths: tuple[int, ...] = (64,)
    """Layer widths of one expert, all ReLU."""
    tower_widths: tuple[int, ...] = (32,)
    """Hidden widths of each task's tower; none = a linear map."""
    gates: Literal["each", "one"] = "each"
    """each = one gate per task, MMoE; one = a single gate for all, OMoE."""
    expert_dropout: float = 0.0
    """Chance with which an expert is left out of a candidate's mixture in training."""
    dropout: float = 0.1
    """Share of the towers' hidden units set to 0 in training."""
    loss: RankingLoss = "bce"
    """bce gives scores that are logits of probabilities, so that tasks can be combined; softmax is over a request's candidates."""
    input: InputConfig = InputConfig()  # noqa: RUF009  (frozen)
    """What is read."""

    def __post_init__(self) -> None:
        check_experts(
            "mmoe",
            dropout=self.dropout,
            loss=self.loss,
            widths={"expert_widths": self.expert_widths},
            counts={"num_experts": self.num_experts},
        )
        if self.gates not in ("each", "one"):
            raise ConfigError(f"mmoe: gates must be each or one, got {self.gates!r}")
        if not 0 <= self.expert_dropout < 1:
            raise ConfigError(f"mmoe: expert_dropout must be from 0 to below 1, got {self.expert_dropout}")


@system(
    "mmoe",
    stage="ranking",
    paper="Ma et al., KDD 2018",
    cold_users=True,
    cold_items=True,
    tiny={
        "num_experts": 3,
        "expert_widths": (8,),
        "tower_widths": (8,),
        "dropout": 0.0,
        "input": InputConfig(dim=8, max_history=10),
    },
)
class MMoE(Ranker):
    """Shared experts, mixed by a gate for each task."""

    Config = MMoEConfig

    def __init__(self, config: MMoEConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.input.max_history
        self.input = TaskInput(space, config.input)
        self.experts = Experts(config.num_experts, config.expert_widths)
        num_gates = len(space.tasks) if config.gates == "each" else 1
        self.first = LinearBank(
            self.input.request_width,
            self.input.candidate_width,
            [self.experts.first_width, *[config.num_experts] * num_gates],
            [True, *[False] * num_gates],
        )
        self.towers = TaskTowers(space.tasks, self.experts.out_width, config.tower_widths, config.dropout)

    def user_state(self, batch: Batch) -> Tensor:
        """float32 [B, W]: the request's share of the experts' first layers and of the gates."""
        return self.first.request_side(self.input.request(batch))

    def score_candidates(self, state: Tensor, candidates: Candidates) -> Scores:
        """Logits [t] per task."""
        first_tW, gates = self._first(state, candidates)
        expert_tne = self.experts(first_tW)
        mixtures = [mixed(expert_tne, weight_tn) for weight_tn in gates]
        return self.towers(mixtures if len(mixtures) > 1 else mixtures * len(self.space.tasks))

    @torch.no_grad()
    def gate_weights(self, batch: Batch) -> dict[str, Tensor]:
        """Weights of the experts [t, n] per task for the batch's candidates; see `gate_diagnosis`."""
        assert batch.candidates is not None
        _, gates = self._first(self.user_state(batch), batch.candidates)
        return dict(zip(self.space.tasks, gates if len(gates) > 1 else gates * len(self.space.tasks)))

    def _first(self, state: Tensor, candidates: Candidates) -> tuple[Tensor, list[Tensor]]:
        first_tW, *logits = self.first(state, self.input.candidates(candidates), candidates.rows.row_of_value)
        drop = self.config.expert_dropout if self.training else 0.0
        return first_tW, [gate(logit_tn, drop) for logit_tn in logits]

    def losses(self, batch: Batch) -> Losses:
        """By task, as `config.loss` says; see `task_losses`."""
        return task_losses(self.score(batch), batch, self.config.loss)

    def shared_parameters(self) -> list[nn.Parameter]:
        """Input and experts, and the gate where there is one for all: gates and towers of single tasks are their own."""
        maps = self.first.maps if self.config.gates == "one" else self.first.maps[:1]
        return [p for part in (self.input, self.experts, maps) for p in part.parameters()]

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Item vectors of the history and the request's maps, and per candidate its vector, experts, gates, mixtures and towers."""
        user = self.input.request_flops(shape.num_history) + self.first.request_flops
        num_gates = len(self.first.maps) - 1
        item = (
            self.input.candidate_flops
            + self.first.candidate_flops
            + self.experts.flops_per_row
            + 2 * num_gates * self.config.num_experts * self.experts.out_width
            + self.towers.flops_per_row
        )
        num_rows = shape.num_candidates + (0 if cached else min(shape.num_history, self.max_history))
        return Cost(
            user_flops=0.0 if cached else float(user),
            item_flops=float(item),
            bytes=dense_bytes(self) + 4.0 * self.config.input.dim * num_rows,
        )
