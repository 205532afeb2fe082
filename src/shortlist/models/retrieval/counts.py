"""Directed co-occurrence counts: what others chose soon after the items this user chose last.

n(a -> b) grows by 1 / gap whenever a user chose b `gap` groups after a, for gaps 1..max_gap, and

    score(y) = sum over the last groups k = 0 (newest), 1, ...   of decay^k * sum over their items x of n(x -> y)

which is a skip-gram Markov chain; with events that are groups of their own, gaps count events. Items of one group (a basket) say
nothing of their order, so pairs inside it are left out unless asked for. Personal repeats are counted like other pairs: n(a -> a).

B requests, E events end to end, N = n + 1 catalogue rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from shortlist.data.batches import Batch
from shortlist.data.histories import Histories, Int, View
from shortlist.data.schema import Space
from shortlist.errors import ConfigError
from shortlist.layers.counting import (
    PairSums,
    SparseRows,
    Weights,
    add_sparse_rows,
    distinct_events,
    distinct_in_groups,
    group_runs,
    groups_ago,
    pair_sums,
    popularity_order,
    sparse_rows,
    then_popular,
)
from shortlist.models.base import Cost, ItemScorer, RequestShape
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class CountsConfig:
    """Settings of the co-occurrence counts."""

    max_gap: int = 3
    """Longest distance of a counted pair, in groups; it counts 1 / distance."""
    num_groups: int = 5
    """Newest groups of a request that are read."""
    decay: float = 0.6
    """Weight of a group relative to the one after it."""
    directed: bool = True
    """Count a before b only; False counts the pair both ways, which is better where the order means little."""
    within_group: bool = False
    """Count pairs inside a group too, both ways, as much as a gap of 1."""
    normalise: Literal["raw", "conditional", "cosine"] = "raw"
    """raw; conditional: n(a -> b) / n(a), so that a frequent a says no more than a rare one; cosine: n(a -> b) / sqrt(n(a) n(b))."""
    window_days: float | None = 14.0
    """Items without a count follow by popularity of these last days; None = of all times."""
    max_history: int = 200
    """Newest events read, from which the newest groups are taken."""

    def __post_init__(self) -> None:
        if self.max_gap < 1 or self.num_groups < 1 or self.max_history < 1:
            raise ConfigError(
                "counts: max_gap, num_groups and max_history must be at least 1, "
                f"got {self.max_gap}, {self.num_groups} and {self.max_history}"
            )
        if not 0 < self.decay <= 1:
            raise ConfigError(f"counts: decay must be above 0 and at most 1, got {self.decay}")
        if self.normalise not in ("raw", "conditional", "cosine"):
            raise ConfigError(f"counts: normalise must be raw, conditional or cosine, got {self.normalise!r}")


@system("counts", stage="retrieval", paper="baseline", needs={"order", "history"}, cold_users=True)
class Counts(ItemScorer):
    """A skip-gram Markov chain over groups of events: what was chosen soon after the newest items."""

    Config = CountsConfig
    config: CountsConfig
    offsets: Tensor
    columns: Tensor
    weights: Tensor
    popular_N: Tensor

    def __init__(self, config: CountsConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.max_history
        self._keep(sparse_rows([], space.num_items + 1))
        self.buffer("popular_N", torch.zeros(space.num_items + 1))

    def _keep(self, matrix: SparseRows) -> None:
        for name, tensor in matrix._asdict().items():
            self.buffer(name, tensor)

    def prepare(self, view: View) -> None:
        """Count all pairs of groups up to `max_gap` apart, in both directions unless `directed`."""
        num_rows = view.space.items.num_rows
        histories = distinct_in_groups(view.histories, num_rows)
        gaps = [
            gap
            for size in range(1, self.config.max_gap + 1)
            for gap in ((size,) if self.config.directed else (size, -size))
        ]
        if self.config.within_group:
            gaps.append(0)
        ranges = [_events_of_group_at(histories, gap) for gap in gaps]
        blocks = pair_sums(
            source=np.tile(histories.item, len(gaps)),
            start=np.concatenate([start for start, _ in ranges]),
            stop=np.concatenate([stop for _, stop in ranges]),
            weight=np.repeat([1.0 / max(abs(gap), 1) for gap in gaps], histories.num_events),
            partner=histories.item,
            partner_weight=np.ones(histories.num_events),
            num_rows=num_rows,
        )
        occurs_N = np.bincount(histories.item, minlength=num_rows).astype(np.float64)
        self._keep(sparse_rows((self._finished(block, occurs_N) for block in blocks), num_rows))
        self.buffer("popular_N", popularity_order(view, self.config.window_days))

    def _finished(self, block: PairSums, occurs_N: Weights) -> PairSums:
        row, column, weight = block
        if self.config.within_group:  # an event is no neighbour of itself
            weight = weight - np.where(row == column, occurs_N[row], 0.0)
        if self.config.normalise == "conditional":
            weight = weight / occurs_N[row]
        elif self.config.normalise == "cosine":
            weight = weight / np.sqrt(occurs_N[row] * occurs_N[column])
        live = weight > 0
        return PairSums(row[live], column[live], weight[live])

    def score_all(self, batch: Batch) -> Tensor:
        """float32 [B, N]: sums of counts; items without any lie between -1 and 0, by popularity."""
        history = batch.history.last(self.max_history)
        age = groups_ago(history)
        read = distinct_events(history, per_group=True) & (age < self.config.num_groups)
        scores_BN = self.popular_N.new_zeros(batch.size, len(self.popular_N))
        add_sparse_rows(
            scores_BN,
            history.items.row_of_value[read],
            history.items.values[read],
            self.config.decay ** age[read].to(scores_BN.dtype),
            SparseRows(self.offsets, self.columns, self.weights),
        )
        return then_popular(scores_BN, self.popular_N)

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """A multiply-add per stored count of the items read, then the fallback over the catalogue."""
        num_read = min(shape.num_history, self.max_history) * len(self.columns) / max(len(self.popular_N), 1)
        return Cost(user_flops=2 * num_read, item_flops=3, bytes=8 * num_read + 4.0 * shape.num_items)


def _events_of_group_at(histories: Histories, gap: int) -> tuple[Int, Int]:
    """Per event the range [start, stop) of the events of its user's group `gap` groups later; empty where there is none."""
    run = group_runs(histories)
    num_runs = int(run[-1]) + 1 if len(run) else 0
    first_event = np.searchsorted(run, np.arange(num_runs + 1))
    user_of_run = histories.user_of_event[first_event[:-1]]
    other = np.clip(run + gap, 0, max(num_runs - 1, 0))
    same_user = (other == run + gap) & (user_of_run[other] == user_of_run[run])
    start = first_event[other]
    return start, np.where(same_user, first_event[np.minimum(other + 1, num_runs)], start)
