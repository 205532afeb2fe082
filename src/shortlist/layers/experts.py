"""What multi-task rankers share: the input of all tasks, banks of linear maps over it, experts, gates and the tasks' towers.

B requests, t candidates end to end, E history events end to end, D width of an embedding, R of the request's side, V of a candidate's
side, W of several linear maps end to end, n experts, h width of an expert's first layer, e of its output, T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from shortlist.data.batches import Batch, Candidates
from shortlist.data.jagged import segment_mean
from shortlist.data.schema import Space
from shortlist.embeddings.base import TableChoice
from shortlist.errors import ConfigError
from shortlist.layers.fields import ItemEncoder
from shortlist.layers.scoring import EventMarks, PairFeatures, RequestEncoder, linear_flops
from shortlist.layers.towers import MLP


@dataclass(frozen=True, kw_only=True, slots=True)
class InputConfig:
    """What every multi-task ranker reads, and how wide."""

    dim: int = 32
    """Width of one embedding."""
    max_history: int = 50
    """Newest events read per request."""
    use_ids: bool = True
    """Read the items' own id rows; False leaves only their fields."""
    use_user_ids: bool = False
    """Read the user's own id row; unknown users read the unknown row."""
    id_dropout: float = 0.05
    """Share of id rows replaced by the unknown row in training, so that new items and users have one that is trained."""
    pair_bins: int = 8
    """Bins of the piecewise-linear curve that each pair field may take; 0 = linear."""
    table: TableChoice = TableChoice()  # noqa: RUF009  (frozen)
    """Which table holds the id rows."""

    def __post_init__(self) -> None:
        if self.dim < 1 or self.max_history < 1 or self.pair_bins < 0:
            raise ConfigError(
                "input: dim and max_history must be at least 1 and pair_bins at least 0, "
                f"got dim={self.dim}, max_history={self.max_history}, pair_bins={self.pair_bins}"
            )
        if not 0 <= self.id_dropout < 1:
            raise ConfigError(f"input: id_dropout must be from 0 to below 1, got {self.id_dropout}")


class TaskInput(nn.Module):
    """x of the papers, in two parts: the request (user, context, mean of the past items) and the candidate (its vector, pair fields)."""

    def __init__(self, space: Space, config: InputConfig) -> None:
        super().__init__()
        self.dim, self.max_history = config.dim, config.max_history
        readable = space if config.use_ids else replace(space, known_items=torch.zeros_like(space.known_items))
        self.items = ItemEncoder(readable, config.dim, id_dropout=config.id_dropout, table=config.table)
        self.marks = EventMarks(space, config.dim)
        self.fields = RequestEncoder(
            space, config.dim, use_user_ids=config.use_user_ids, id_dropout=config.id_dropout, table=config.table
        )
        self.pair = PairFeatures(space.pair_fields, config.pair_bins)
        self.request_width = self.fields.width + config.dim
        self.candidate_width = config.dim + self.pair.width
        self.candidate_flops = linear_flops(self.items)

    def request(self, batch: Batch) -> Tensor:
        """float32 [B, R]."""
        history = batch.history.last(self.max_history)
        past_ED = self.marks(self.items(history.items.values), history, batch.time)
        pooled_BD = segment_mean(past_ED, history.items.row_of_value, batch.size)
        return torch.cat([self.fields(batch), pooled_BD], dim=1)

    def candidates(self, candidates: Candidates) -> Tensor:
        """float32 [t, V]."""
        rows = candidates.rows.values
        return torch.cat([self.items(rows), self.pair(candidates.pair, len(rows))], dim=1)

    def request_flops(self, num_history: int) -> int:
        """FLOPs of `request` for a history of so many events."""
        return min(num_history, self.max_history) * self.candidate_flops + linear_flops(self.fields)


class LinearBank(nn.Module):
    """Several linear maps of the same [request; candidate]; each request's share of all of them is computed once.

    Args:
        request_width, candidate_width: R, V.
        widths: of the maps' outputs.
        biases: which maps add one; they start at 0.
    """

    def __init__(self, request_width: int, candidate_width: int, widths: Sequence[int], biases: Sequence[bool]) -> None:
        super().__init__()
        self.request_width = request_width
        self.widths = list(widths)
        self.maps = nn.ModuleList(
            linear(request_width + candidate_width, width, bias) for width, bias in zip(widths, biases, strict=True)
        )
        self.request_flops = 2 * request_width * sum(widths)
        self.candidate_flops = 2 * candidate_width * sum(widths)

    def request_side(self, request_BR: Tensor) -> Tensor:
        """float32 [B, W]: the request's share of all maps end to end, biases included."""
        cut = self.request_width
        return torch.cat([nn.functional.linear(request_BR, m.weight[:, :cut], m.bias) for m in self._maps()], dim=1)

    def forward(self, request_BW: Tensor, candidate_tV: Tensor, row_of_t: Tensor) -> list[Tensor]:
        """[t, width] of each map, for what `request_side` gave, candidates [t, V] and the request of each [t] int64."""
        cut, shares = self.request_width, request_BW.split(self.widths, dim=1)
        return [
            nn.functional.linear(candidate_tV, m.weight[:, cut:]) + share_BW[row_of_t]
            for m, share_BW in zip(self._maps(), shares)
        ]

    def _maps(self) -> list[nn.Linear]:
        return [m for m in self.maps if isinstance(m, nn.Linear)]


class Experts(nn.Module):
    """n ReLU networks of one shape side by side, from the outputs of their first linear map on.

    Every layer but the first is one batched product; weights start as PyTorch's linear maps do, biases at 0.
    """

    def __init__(self, num_experts: int, widths: Sequence[int]) -> None:
        super().__init__()
        if num_experts < 1 or not widths or min(widths) < 1:
            raise ConfigError(
                f"experts need at least one network of at least one layer, got {num_experts} of {list(widths)}"
            )
        self.num_experts, self.first_width, self.out_width = num_experts, num_experts * widths[0], widths[-1]
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for before, after in pairwise(widths):
            bound = before**-0.5
            self.weights.append(nn.Parameter(torch.empty(num_experts, before, after).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.zeros(num_experts, after)))
        self.flops_per_row = sum(2 * weight.numel() for weight in self.weights)

    def forward(self, first_tW: Tensor) -> Tensor:
        """float32 [t, n, e] for the first maps' outputs [t, n h], one expert after the other."""
        hidden_tnh = first_tW.relu().unflatten(1, (self.num_experts, -1))
        for weight_nhe, bias_ne in zip(self.weights, self.biases):
            hidden_tnh = (torch.einsum("tnh,nhe->tne", hidden_tnh, weight_nhe) + bias_ne).relu()
        return hidden_tnh


def linear(in_width: int, out_width: int, bias: bool = True) -> nn.Linear:
    """A linear map whose bias, if any, starts at 0."""
    made = nn.Linear(in_width, out_width, bias=bias)
    if bias:
        nn.init.zeros_(made.bias)
    return made


def gate(logit_tn: Tensor, dropout: float = 0.0) -> Tensor:
    """Softmax weights [t, n] of the experts.

    Args:
        dropout: chance with which each expert is left out of a row, in training; the others' weights still add up to 1. A row that
            would lose all keeps all.
    """
    if dropout:
        kept_tn = torch.rand_like(logit_tn) >= dropout
        kept_tn |= ~kept_tn.any(1, keepdim=True)
        logit_tn = logit_tn.masked_fill(~kept_tn, -torch.inf)
    return logit_tn.softmax(1)


def mixed(expert_tne: Tensor, weight_tn: Tensor) -> Tensor:
    """float32 [t, e]: the experts' outputs weighed by a gate."""
    return torch.einsum("tn,tne->te", weight_tn, expert_tne)


class TaskTowers(nn.Module):
    """One tower per task, each with one output; biases start at 0."""

    def __init__(self, tasks: Sequence[str], in_width: int, widths: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.towers = nn.ModuleList(MLP(in_width, widths, 1, dropout=dropout) for _ in tasks)
        self.flops_per_row = sum(tower.flops_per_row for tower in self.towers if isinstance(tower, MLP))
        for part in self.towers.modules():  # embeddings start small: with other biases many units would start dead
            if isinstance(part, nn.Linear):
                nn.init.zeros_(part.bias)

    def forward(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Logits [t] per task from the tasks' inputs [t, e], in the order of the tasks."""
        return {task: tower(x_te).squeeze(1) for task, tower, x_te in zip(self.tasks, self.towers, inputs, strict=True)}


def gate_diagnosis(weights: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """By task: "entropy" of its gate as a share of the largest (near 0 = one expert takes all), and "apart": the total variation between
    its mean weights and the mean over the tasks (near 0 for all = the gates are one).

    Args:
        weights: [t, n] per task.
    """
    load_Tn = torch.stack([weight_tn.mean(0) for weight_tn in weights.values()])
    found = {}
    for task, weight_tn, load_n in zip(weights, weights.values(), load_Tn):
        entropy = float(torch.special.entr(weight_tn).sum(1).mean()) / math.log(max(weight_tn.shape[1], 2))
        found[task] = {"entropy": entropy, "apart": float((load_n - load_Tn.mean(0)).abs().sum() / 2)}
    return found


def check_experts(
    system: str, *, dropout: float, loss: str, widths: Mapping[str, Sequence[int]], counts: Mapping[str, int]
) -> None:
    """ConfigError, in the name of a system and by setting, for settings of a multi-task ranker that are out of range.

    Args:
        widths: of networks that need at least one layer.
        counts: numbers that must be at least 1.
    """
    for name, sizes in widths.items():
        if not sizes or min(sizes) < 1:
            raise ConfigError(f"{system}: {name} must name at least one width of 1 or more, got {list(sizes)}")
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{system}: {name} must be at least 1, got {count}")
    if not 0 <= dropout < 1:
        raise ConfigError(f"{system}: dropout must be from 0 to below 1, got {dropout}")
    if loss not in ("softmax", "bce"):
        raise ConfigError(f"{system}: loss must be softmax or bce, got {loss!r}")
