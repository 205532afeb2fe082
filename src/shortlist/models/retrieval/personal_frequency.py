"""Personal frequency: what this user chose before, the often and lately chosen first; then what is popular.

    score(y) = popularity(y)^popularity_power
             * sum over the user's choices of y of 2^-(age in days / half_life_days) * 2^-(age in groups / half_life_groups)

with popularity(y) = (events of y in the last days + 1) over the largest such number.

Where people buy the same things again, this is hard to beat. Everything is read from the batch's history, so that a purchase counts from
the next request on.

B requests, E events end to end, N = n + 1 catalogue rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shortlist.data.batches import Batch
from shortlist.data.histories import View
from shortlist.data.schema import Space
from shortlist.errors import ConfigError
from shortlist.layers.counting import (
    SECONDS_PER_DAY,
    distinct_events,
    groups_ago,
    item_popularity,
    popularity_order,
    then_popular,
)
from shortlist.models.base import Cost, ItemScorer, RequestShape
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class PersonalFrequencyConfig:
    """Settings of personal frequency."""

    half_life_days: float | None = 180.0
    """Age at which a choice counts half; None = no decay by days. Ignored on a log without a clock."""
    half_life_groups: float | None = 8.0
    """Number of later groups of the same user after which a choice counts half; None = no decay by groups."""
    popularity_power: float = 0.5
    """How much the item's own popularity counts: of two items chosen once, the one that sells now is likelier again. 0 = not at all."""
    window_days: float | None = 14.0
    """Popularity is counted over these last days of training, then over all times; None = all times only."""
    max_history: int = 1000
    """Newest events read per request."""

    def __post_init__(self) -> None:
        for name in ("half_life_days", "half_life_groups", "window_days"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"personal-frequency: {name} must be above 0 or absent, got {value}")
        if self.popularity_power < 0 or self.max_history < 1:
            raise ConfigError(
                "personal-frequency: popularity_power must be 0 or above and max_history at least 1, "
                f"got {self.popularity_power} and {self.max_history}"
            )


@system("personal-frequency", stage="retrieval", paper="baseline", needs={"order", "history"}, cold_users=True)
class PersonalFrequency(ItemScorer):
    """A user's own items by how often and how lately they were chosen, then the popular ones."""

    Config = PersonalFrequencyConfig
    config: PersonalFrequencyConfig
    popular_N: Tensor
    prior_N: Tensor

    def __init__(self, config: PersonalFrequencyConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.max_history
        self.buffer("popular_N", torch.zeros(space.num_items + 1))
        self.buffer("prior_N", torch.ones(space.num_items + 1))

    def prepare(self, view: View) -> None:
        """Count popularity; a user's own counts come with each request."""
        lately_N = item_popularity(view, window_days=self.config.window_days) + 1
        self.buffer("prior_N", (lately_N / lately_N.max()) ** self.config.popularity_power)
        self.buffer("popular_N", popularity_order(view, self.config.window_days))

    def score_all(self, batch: Batch) -> Tensor:
        """float32 [B, N]: decayed numbers of choices; items never chosen lie between -1 and 0, by popularity."""
        history = batch.history.last(self.max_history)
        chosen = distinct_events(history, per_group=True)
        row_E, item_E = history.items.row_of_value[chosen], history.items.values[chosen]
        log2_weight_E = torch.zeros(len(row_E), device=row_E.device)
        if self.config.half_life_days is not None and self.space.has_clock:
            age_days = (batch.time[row_E] - history.time[chosen]).clamp(min=0) / SECONDS_PER_DAY
            log2_weight_E -= age_days / self.config.half_life_days
        if self.config.half_life_groups is not None:
            log2_weight_E -= groups_ago(history)[chosen] / self.config.half_life_groups
        weight_E = torch.exp2(log2_weight_E.clamp(min=-100))  # an old choice stays a choice
        scores_BN = self.popular_N.new_zeros(batch.size, len(self.popular_N))
        scores_BN.index_put_((row_E, item_E), weight_E * self.prior_N[item_E], accumulate=True)
        return then_popular(scores_BN, self.popular_N)

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Ten operations per event, three per item for the fallback."""
        return Cost(
            user_flops=10.0 * min(shape.num_history, self.max_history), item_flops=3, bytes=4.0 * shape.num_items
        )
