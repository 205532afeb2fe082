"""Shared-bottom: one network that all tasks share, and a tower per task on top of it.

"Multitask Learning", Caruana, Machine Learning 1997; the baseline of MMoE (Ma et al., KDD 2018, section 3.1): y_k = h_k(f(x)). Tasks that
have little in common pull f in different directions, which is what MMoE and PLE were made against.

Differences: x is the request (user, context, mean of the past items) beside the candidate (its vector and pair fields), and the request's
share of the first layer is computed once per request.

B requests, t candidates end to end, h width of the first layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from shortlist.data.batches import Batch, Candidates
from shortlist.data.schema import Space
from shortlist.layers.experts import Experts, InputConfig, LinearBank, TaskInput, TaskTowers, check_experts
from shortlist.layers.scoring import RankingLoss, dense_bytes, task_losses
from shortlist.models.base import Cost, Losses, Ranker, RequestShape, Scores
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedBottomConfig:
    """Settings of the shared-bottom ranker."""

    widths: tuple[int, ...] = (128, 64)
    """Hidden widths of the shared network."""
    tower_widths: tuple[int, ...] = (32,)
    """Hidden widths of each task's tower; none = a linear map."""
    dropout: float = 0.1
    """Share of the towers' hidden units set to 0 in training."""
    loss: RankingLoss = "bce"
    """bce gives scores that are logits of probabilities, so that tasks can be combined; softmax is over a request's candidates."""
    input: InputConfig = InputConfig()  # noqa: RUF009  (frozen)
    """What is read."""

    def __post_init__(self) -> None:
        check_experts("shared-bottom", dropout=self.dropout, loss=self.loss, widths={"widths": self.widths}, counts={})


@system(
    "shared-bottom",
    stage="ranking",
    paper="Caruana, 1997",
    cold_users=True,
    cold_items=True,
    tiny={
        "widths": (16,),
        "tower_widths": (8,),
        "dropout": 0.0,
        "input": InputConfig(dim=8, max_history=10),
    },
)
class SharedBottom(Ranker):
    """One network for all tasks, a tower for each."""

    Config = SharedBottomConfig

    def __init__(self, config: SharedBottomConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.input.max_history
        self.input = TaskInput(space, config.input)
        self.bottom = Experts(1, config.widths)
        self.first = LinearBank(self.input.request_width, self.input.candidate_width, [self.bottom.first_width], [True])
        self.towers = TaskTowers(space.tasks, self.bottom.out_width, config.tower_widths, config.dropout)

    def user_state(self, batch: Batch) -> Tensor:
        """float32 [B, h]: the request's share of the first layer."""
        return self.first.request_side(self.input.request(batch))

    def score_candidates(self, state: Tensor, candidates: Candidates) -> Scores:
        """Logits [t] per task."""
        (first_th,) = self.first(state, self.input.candidates(candidates), candidates.rows.row_of_value)
        shared_te = self.bottom(first_th).squeeze(1)
        return self.towers([shared_te] * len(self.space.tasks))

    def losses(self, batch: Batch) -> Losses:
        """By task, as `config.loss` says; see `task_losses`."""
        return task_losses(self.score(batch), batch, self.config.loss)

    def shared_parameters(self) -> list[nn.Parameter]:
        """All but the towers."""
        return [p for part in (self.input, self.first, self.bottom) for p in part.parameters()]

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Item vectors of the history and the request's layer, and per candidate its vector, the network and all towers."""
        user = self.input.request_flops(shape.num_history) + self.first.request_flops
        item = (
            self.input.candidate_flops
            + self.first.candidate_flops
            + self.bottom.flops_per_row
            + self.towers.flops_per_row
        )
        num_rows = shape.num_candidates + (0 if cached else min(shape.num_history, self.max_history))
        return Cost(
            user_flops=0.0 if cached else float(user),
            item_flops=float(item),
            bytes=dense_bytes(self) + 4.0 * self.config.input.dim * num_rows,
        )
