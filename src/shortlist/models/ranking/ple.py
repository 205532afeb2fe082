"""PLE: experts of each task beside shared ones, mixed level by level, so that tasks share what helps and keep what does not.

"Progressive Layered Extraction (PLE): A Novel Multi-Task Learning Model for Personalized Recommendations", Tang et al., RecSys 2020,
section 4. Each level has m_k experts for each task and m_s shared ones; the gate of task k sees its own and the shared experts, in this
order, as a linear map of the task's input without bias. Every level but the last also has a shared gate over all experts of all tasks,
whose mixture the next level's shared experts read. One level is the paper's CGC. Towers stand on the tasks' last mixtures.

Differences: x is the request (user, context, mean of the past items) beside the candidate (its vector and pair fields), and the request's
share of the first level is computed once per request. Tasks whose labels are missing are left out per candidate (`task_losses`), and the
task weights that change by epoch (section 4.3) are the trainer's `task_weights` and `task_decay`.

B requests, t candidates end to end, n experts that a gate sees, h width of an expert's first layer, e of its output, W of all first maps,
T tasks; groups are the T tasks and then the shared one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shortlist.data.batches import Batch, Candidates
from shortlist.data.schema import Space
from shortlist.layers.experts import (
    Experts,
    InputConfig,
    LinearBank,
    TaskInput,
    TaskTowers,
    check_experts,
    gate,
    linear,
    mixed,
)
from shortlist.layers.scoring import RankingLoss, dense_bytes, linear_flops, task_losses
from shortlist.models.base import Cost, Losses, Ranker, RequestShape, Scores
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class PLEConfig:
    """Settings of PLE."""

    num_levels: int = 2
    """Extraction levels; 1 = CGC."""
    num_own: int = 2
    """Experts of each task and level."""
    num_shared: int = 2
    """Shared experts of each level."""
    expert_widths: tuple[int, ...] = (64,)
    """Layer widths of one expert, all ReLU."""
    tower_widths: tuple[int, ...] = (32,)
    """Hidden widths of each task's tower; none = a linear map."""
    dropout: float = 0.1
    """Share of the towers' hidden units set to 0 in training."""
    loss: RankingLoss = "bce"
    """bce gives scores that are logits of probabilities, so that tasks can be combined; softmax is over a request's candidates."""
    input: InputConfig = InputConfig()  # noqa: RUF009  (frozen)
    """What is read."""

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("num_levels", "num_own", "num_shared")}
        widths = {"expert_widths": self.expert_widths}
        check_experts("ple", dropout=self.dropout, loss=self.loss, widths=widths, counts=counts)


class Level(nn.Module):
    """One extraction level, from the outputs of its linear maps on: the experts of all groups, and the gates' mixtures.

    The maps are, in this order: the experts' first layers of each group, then the gates' logits, the shared gate last.
    """

    def __init__(self, config: PLEConfig, num_tasks: int, *, is_last: bool) -> None:
        super().__init__()
        counts = [config.num_own] * num_tasks + [config.num_shared]
        self.experts = nn.ModuleList(Experts(count, config.expert_widths) for count in counts)
        gates = [config.num_own + config.num_shared] * num_tasks + ([] if is_last else [sum(counts)])
        self.map_widths = [count * config.expert_widths[0] for count in counts] + gates
        self.map_biases = [True] * len(counts) + [False] * len(gates)
        self.map_inputs = [*range(num_tasks + 1), *range(len(gates))]
        """Which group's input each map reads."""
        self.out_width = config.expert_widths[-1]
        experts = sum(e.flops_per_row for e in self.experts if isinstance(e, Experts))
        self.flops_per_row = experts + 2 * sum(gates) * self.out_width

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """[t, e] per task, and of the shared gate where there is one."""
        num_groups = len(self.experts)
        expert_tne = [experts(first_tW) for experts, first_tW in zip(self.experts, maps)]
        outputs = []
        for task, logit_tn in enumerate(maps[num_groups:]):
            seen = [expert_tne[task], expert_tne[-1]] if task < num_groups - 1 else expert_tne
            outputs.append(mixed(torch.cat(seen, dim=1), gate(logit_tn)))
        return outputs


@system(
    "ple",
    stage="ranking",
    paper="Tang et al., RecSys 2020",
    cold_users=True,
    cold_items=True,
    tiny={
        "expert_widths": (8,),
        "tower_widths": (8,),
        "dropout": 0.0,
        "input": InputConfig(dim=8, max_history=10),
    },
)
class PLE(Ranker):
    """Own and shared experts of each task, separated level by level."""

    Config = PLEConfig

    def __init__(self, config: PLEConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.input.max_history
        num_tasks, last = len(space.tasks), config.num_levels - 1
        self.input = TaskInput(space, config.input)
        self.levels = nn.ModuleList(Level(config, num_tasks, is_last=n == last) for n in range(config.num_levels))
        first, *deeper = self._levels()
        self.first = LinearBank(
            self.input.request_width, self.input.candidate_width, first.map_widths, first.map_biases
        )
        self.deeper = nn.ModuleList(
            nn.ModuleList(
                linear(level.out_width, width, bias) for width, bias in zip(level.map_widths, level.map_biases)
            )
            for level in deeper
        )
        self.towers = TaskTowers(space.tasks, first.out_width, config.tower_widths, config.dropout)

    def _levels(self) -> list[Level]:
        return [level for level in self.levels if isinstance(level, Level)]

    def user_state(self, batch: Batch) -> Tensor:
        """float32 [B, W]: the request's share of the first level's maps."""
        return self.first.request_side(self.input.request(batch))

    def score_candidates(self, state: Tensor, candidates: Candidates) -> Scores:
        """Logits [t] per task."""
        first, *deeper = self._levels()
        outputs = first(self.first(state, self.input.candidates(candidates), candidates.rows.row_of_value))
        for level, maps in zip(deeper, self.deeper):
            assert isinstance(maps, nn.ModuleList)
            outputs = level([m(outputs[group]) for m, group in zip(maps, level.map_inputs)])
        return self.towers(outputs)

    def losses(self, batch: Batch) -> Losses:
        """By task, as `config.loss` says; see `task_losses`."""
        return task_losses(self.score(batch), batch, self.config.loss)

    def shared_parameters(self) -> list[nn.Parameter]:
        """All that several tasks' losses reach. The input; below the last level all experts and the shared gate, since that gate passes
        them on to all tasks; a task's gate where a shared gate two levels above still sees its mixture; the last level's shared experts.
        """
        num_groups, num_levels = len(self.space.tasks) + 1, self.config.num_levels
        parts: list[nn.Module] = [self.input]
        for number, (level, bank) in enumerate(zip(self._levels(), [self.first.maps, *self.deeper])):
            assert isinstance(bank, nn.ModuleList)
            maps = list(bank)
            if number == num_levels - 1:
                parts += [level.experts[-1], maps[num_groups - 1]]
            else:
                parts += [level.experts, *maps[:num_groups], maps[-1]]
                parts += maps[num_groups:-1] if number < num_levels - 2 else []
        return [p for part in parts for p in part.parameters()]

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Item vectors of the history and the request's maps, and per candidate its vector, all levels and towers."""
        user = self.input.request_flops(shape.num_history) + self.first.request_flops
        item = (
            self.input.candidate_flops
            + self.first.candidate_flops
            + linear_flops(self.deeper)
            + sum(level.flops_per_row for level in self._levels())
            + self.towers.flops_per_row
        )
        num_rows = shape.num_candidates + (0 if cached else min(shape.num_history, self.max_history))
        return Cost(
            user_flops=0.0 if cached else float(user),
            item_flops=float(item),
            bytes=dense_bytes(self) + 4.0 * self.config.input.dim * num_rows,
        )
