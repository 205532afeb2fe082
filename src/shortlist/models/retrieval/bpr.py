"""BPR: factors that order what a user chose before what the user did not (Rendle et al., "BPR: Bayesian Personalized Ranking from
Implicit Feedback", UAI 2009). Learned by the `implicit` library.

    maximise  sum over (u, chosen i, other j) of ln sigma(x_u . (y_i - y_j) + b_i - b_j) - lambda |all|^2

The paper has a vector per training user and none for anyone else. A request brings a history, newer than training or of somebody new,
so users' vectors are made from it by a linear map that is fitted to what was learned:

    x(history) = A [1, mean of the history's y_i],    A = argmin sum over training users of |x_u - A [1, mean]|^2 + ridge |A|^2
    mean weighs an item decay^(groups since it was last chosen)

The library is needed to learn, not to serve. B requests, E events end to end, U training users, N = n + 1 catalogue rows, d factors
with the item's bias as the last one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shortlist.data.batches import Batch
from shortlist.data.histories import View
from shortlist.data.jagged import segment_sum
from shortlist.data.schema import Space
from shortlist.errors import ConfigError
from shortlist.extras import library
from shortlist.layers.counting import distinct_events, groups_ago, popularity_order, user_items
from shortlist.layers.factors import POPULARITY_SHARE, beside_popularity, choices, learn_factors
from shortlist.models.base import Cost, RequestShape, VectorRetriever
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class BPRConfig:
    """Settings of BPR."""

    num_factors: int = 64
    """Without the bias; d is one more."""
    lr: float = 0.05
    """Step of the stochastic gradient."""
    regularisation: float = 0.01
    """lambda, of factors and biases."""
    iterations: int = 100
    """Passes over the choices."""
    decay: float = 0.9
    """Weight of an item relative to one that was last chosen a group later, in the mean of a history."""
    ridge: float = 0.01
    """Of the map from histories to users' vectors, relative to the number of training users."""
    seed: int = 0
    """Of the first factors and of the draws. The library runs on one thread here: with more its result is another each time."""
    window_days: float | None = 14.0
    """Requests without history get the popular items of these last days; None = of all times."""
    max_history: int = 500
    """Newest events read per request."""

    def __post_init__(self) -> None:
        for name in ("num_factors", "iterations", "max_history"):
            if getattr(self, name) < 1:
                raise ConfigError(f"bpr: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "ridge"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"bpr: {name} must be above 0, got {getattr(self, name)}")
        if self.regularisation < 0 or not 0 < self.decay <= 1:
            raise ConfigError(
                "bpr: regularisation must not be negative and decay above 0 and at most 1, "
                f"got {self.regularisation} and {self.decay}"
            )


@system(
    "bpr",
    stage="retrieval",
    paper="Rendle et al., UAI 2009",
    needs={"history"},
    cold_users=True,
    tiny={"num_factors": 8, "iterations": 20},
)
class BPR(VectorRetriever):
    """Factors under a pairwise loss; a user's are a linear map of the mean of the history's."""

    Config = BPRConfig
    config: BPRConfig
    item_Nd: Tensor
    map_dd: Tensor
    popular_N: Tensor

    def __init__(self, config: BPRConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.max_history
        d = config.num_factors + 1
        self.buffer("item_Nd", torch.zeros(space.num_items + 1, d))
        self.buffer("map_dd", torch.zeros(d, d))
        self.buffer("popular_N", torch.zeros(space.num_items + 1))

    def prepare(self, view: View) -> None:
        """Factors, the map to users' vectors, and what to show without a history. ConfigError where the library is missing."""
        config = self.config
        bpr = library("implicit.cpu.bpr", extra="baselines", user="bpr")
        chosen = choices(view, np.ones_like, "bpr")
        learned = learn_factors(
            lambda: bpr.BayesianPersonalizedRanking(
                factors=config.num_factors,
                learning_rate=config.lr,
                regularization=config.regularisation,
                iterations=config.iterations,
                num_threads=1,
                random_state=config.seed,
            ),
            chosen.matrix,
            num_threads=1,
        )
        item_Nd = torch.from_numpy(learned.items)
        # Items that nobody chose still hold their first random factors: no liking, and as low a bias as any item has.
        never = torch.from_numpy(np.diff(chosen.matrix.tocsc().indptr) == 0)
        item_Nd[never] = 0.0
        item_Nd[never, -1] = item_Nd[:, -1].min()
        self.buffer("item_Nd", item_Nd)
        self.buffer("map_dd", self._map(view, torch.from_numpy(learned.users)))
        self.buffer("popular_N", popularity_order(view, config.window_days))
        self._matrix = None

    def _map(self, view: View, user_Ud: Tensor) -> Tensor:
        """Ridge regression of the users' vectors on the means of their histories, float32 [d, d]."""
        cells = user_items(view.histories, view.space.items.num_rows)
        _, place = np.unique(cells.user, return_inverse=True)
        weight = torch.from_numpy(self.config.decay ** cells.groups_ago.astype(np.float64)).float()
        past_Ud = self._mean(torch.from_numpy(cells.item), weight, torch.from_numpy(place), len(user_Ud)).double()
        left_dd = past_Ud.T @ past_Ud / len(past_Ud) + self.config.ridge * torch.eye(past_Ud.shape[1]).double()
        return torch.linalg.solve(left_dd, past_Ud.T @ user_Ud.double() / len(past_Ud)).float()

    def _mean(self, item_E: Tensor, weight_E: Tensor, row_E: Tensor, num_rows: int) -> Tensor:
        """float32 [num_rows, d]: 1 and the mean of the items' factors; all 0 for rows without an item."""
        one_Ed = torch.cat([torch.ones_like(self.item_Nd[item_E, :1]), self.item_Nd[item_E, :-1]], dim=1)
        total = segment_sum(weight_E, row_E, num_rows)
        return segment_sum(weight_E[:, None] * one_Ed, row_E, num_rows) / total.clamp(min=1e-30)[:, None]

    def space_device(self) -> torch.device:
        """Where the factors are."""
        return self.item_Nd.device

    def encode_user(self, batch: Batch) -> Tensor:
        """float32 [B, d + 1]; a history without known items leaves popularity alone."""
        history = batch.history.last(self.max_history)
        read = distinct_events(history, per_group=False)
        # Weights may run out of float32's range over hundreds of groups; the mean only needs their ratios within a request.
        weight_E = (self.config.decay ** groups_ago(history)[read].double()).clamp(min=1e-20).float()
        past_Bd = self._mean(history.items.values[read], weight_E, history.items.row_of_value[read], batch.size)
        return beside_popularity(past_Bd @ self.map_dd, past_Bd.new_full((batch.size,), POPULARITY_SHARE))

    def encode_items(self, rows: Tensor) -> Tensor:
        """float32 [n, d + 1]."""
        return beside_popularity(self.item_Nd[rows], self.popular_N[rows])

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """A weighted mean and a linear map; then an inner product per item."""
        num_read, d = min(shape.num_history, self.max_history), self.config.num_factors + 1
        return Cost(
            user_flops=0.0 if cached else 2.0 * d * num_read + 2.0 * d * d,
            item_flops=2.0 * (d + 1),
            bytes=4.0 * (d + 1) * (num_read + shape.num_items) + 4.0 * d * d,
        )
