"""Popularity: what most people chose lately, the same list for all.

B requests, N = n + 1 catalogue rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shortlist.data.batches import Batch
from shortlist.data.histories import View
from shortlist.data.schema import Space
from shortlist.errors import ConfigError
from shortlist.layers.counting import item_popularity, then_popular
from shortlist.models.base import Cost, ItemScorer, RequestShape
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class PopularityConfig:
    """Settings of popularity."""

    window_days: float | None = 14.0
    """Last days of training that are counted; None = all. Items without an event in them follow by their count of all times."""
    half_life_days: float | None = None
    """Age at which an event counts half; None = all events of the window alike."""
    per_user: bool = False
    """Count each user once per item."""

    def __post_init__(self) -> None:
        for name in ("window_days", "half_life_days"):
            days = getattr(self, name)
            if days is not None and days <= 0:
                raise ConfigError(f"popularity: {name} must be above 0 or absent, got {days}")


@system("popularity", stage="retrieval", paper="baseline", cold_users=True)
class Popularity(ItemScorer):
    """The most chosen items of the last days. On a log without a clock: of all times."""

    Config = PopularityConfig
    config: PopularityConfig
    scores_N: Tensor

    def __init__(self, config: PopularityConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = 1
        self.buffer("scores_N", torch.zeros(space.num_items + 1))

    def prepare(self, view: View) -> None:
        """Count once; see PopularityConfig."""
        c = self.config
        lately_N = item_popularity(
            view, window_days=c.window_days, half_life_days=c.half_life_days, per_user=c.per_user
        )
        self.buffer("scores_N", then_popular(lately_N, item_popularity(view, per_user=c.per_user)))

    def score_all(self, batch: Batch) -> Tensor:
        """float32 [B, N]: the number of events; items not chosen lately lie between -1 and 0."""
        return self.scores_N.expand(batch.size, -1).clone()

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Nothing is computed; the scores are read, one operation each."""
        return Cost(item_flops=1.0, bytes=4.0 * shape.num_items)
