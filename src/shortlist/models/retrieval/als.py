"""ALS: factors of users and items by weighted least squares over all cells of the matrix (Hu, Koren and Volinsky, "Collaborative
Filtering for Implicit Feedback Datasets", ICDM 2008). The items' factors are learned by the `implicit` library.

    minimise  sum over all (u, i) of c_ui (p_ui - x_u . y_i)^2 + lambda (sum |x_u|^2 + sum |y_i|^2)
    p_ui = 1 where u chose i, else 0;   c_ui = 1 + alpha r_ui, r_ui = groups (baskets) of u that hold i

A user's vector is never kept: it is the closed-form optimum for the history that the request shows, so that it is as fresh as that:

    x_u = (Y'Y + lambda I + sum over the history of (c_ui - 1) y_i y_i')^-1  sum over the history of c_ui y_i      (eq. 4)

The library is needed to learn, not to serve. B requests, L most items in a history, N = n + 1 catalogue rows, d factors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shortlist.data.batches import Batch
from shortlist.data.histories import View
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Space
from shortlist.errors import ConfigError
from shortlist.extras import library
from shortlist.layers.counting import distinct_events, popularity_order
from shortlist.layers.factors import POPULARITY_SHARE, beside_popularity, choices, learn_factors
from shortlist.models.base import Cost, RequestShape, VectorRetriever
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class ALSConfig:
    """Settings of ALS."""

    num_factors: int = 64
    """d."""
    regularisation: float = 10.0
    """lambda: larger values trust rare items and short histories less."""
    alpha: float = 1.0
    """Confidence that each further group with an item adds to that of an item never chosen, which is 1."""
    iterations: int = 15
    """Each solves all users, then all items."""
    seed: int = 0
    """Of the first factors."""
    num_threads: int = 1
    """Of the library; more of them want OPENBLAS_NUM_THREADS=1 in the environment, as it says itself."""
    window_days: float | None = 14.0
    """Requests without history get the popular items of these last days; None = of all times."""
    max_history: int = 500
    """Newest events read per request."""

    def __post_init__(self) -> None:
        for name in ("num_factors", "iterations", "num_threads", "max_history"):
            if getattr(self, name) < 1:
                raise ConfigError(f"als: {name} must be at least 1, got {getattr(self, name)}")
        if self.regularisation <= 0 or self.alpha < 0:
            raise ConfigError(
                f"als: regularisation must be above 0 and alpha not negative, got {self.regularisation} and {self.alpha}"
            )


@system(
    "als",
    stage="retrieval",
    paper="Hu et al., ICDM 2008",
    needs={"history"},
    cold_users=True,
    tiny={"num_factors": 8, "iterations": 5},
)
class ALS(VectorRetriever):
    """Factors by weighted least squares; a user's are solved anew for each request."""

    Config = ALSConfig
    config: ALSConfig
    item_Nd: Tensor
    gram_dd: Tensor
    popular_N: Tensor

    def __init__(self, config: ALSConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.max_history
        self.buffer("item_Nd", torch.zeros(space.num_items + 1, config.num_factors))
        self.buffer("gram_dd", config.regularisation * torch.eye(config.num_factors))
        self.buffer("popular_N", torch.zeros(space.num_items + 1))

    def prepare(self, view: View) -> None:
        """The items' factors, Y'Y + lambda I, and what to show without a history. ConfigError where the library is missing."""
        config = self.config
        als = library("implicit.cpu.als", extra="baselines", user="als")
        learned = learn_factors(
            lambda: als.AlternatingLeastSquares(
                factors=config.num_factors,
                regularization=config.regularisation,
                alpha=1.0,
                iterations=config.iterations,
                num_threads=config.num_threads,
                random_state=config.seed,
            ),
            choices(view, lambda num_groups: 1 + config.alpha * num_groups, "als").matrix,
            config.num_threads,
        )
        item_Nd = torch.from_numpy(learned.items)
        self.buffer("item_Nd", item_Nd)
        self.buffer("gram_dd", item_Nd.T @ item_Nd + config.regularisation * torch.eye(config.num_factors))
        self.buffer("popular_N", popularity_order(view, config.window_days))
        self._matrix = None

    def space_device(self) -> torch.device:
        """Where the factors are."""
        return self.item_Nd.device

    def encode_user(self, batch: Batch) -> Tensor:
        """float32 [B, d + 1]: equation 4 for each history; a history without known items leaves popularity alone."""
        items, confidence = self._confidence(batch)
        item_BL, real_BL = items.padded()
        confidence_BL, _ = items.with_values(confidence).padded()
        item_BLd = self.item_Nd[item_BL]
        more_BL = torch.where(real_BL, confidence_BL - 1, 0.0)
        left_Bdd = self.gram_dd + (item_BLd * more_BL[:, :, None]).transpose(1, 2) @ item_BLd
        right_Bd = (confidence_BL[:, None] @ item_BLd)[:, 0]
        user_Bd = torch.cholesky_solve(right_Bd[:, :, None], torch.linalg.cholesky(left_Bdd))[:, :, 0]
        return beside_popularity(user_Bd, user_Bd.new_full((batch.size,), POPULARITY_SHARE))

    def _confidence(self, batch: Batch) -> tuple[Jagged, Tensor]:
        """Distinct known items per request, and c of each, float32, end to end."""
        history = batch.history.last(self.max_history)
        read = distinct_events(history, per_group=True)
        num_rows = len(self.item_Nd)
        cell, num_groups = (history.items.row_of_value[read] * num_rows + history.items.values[read]).unique(
            return_counts=True
        )
        lengths_B = torch.bincount(cell // num_rows, minlength=batch.size)
        return Jagged.from_lengths(cell % num_rows, lengths_B), 1 + self.config.alpha * num_groups.float()

    def encode_items(self, rows: Tensor) -> Tensor:
        """float32 [n, d + 1]."""
        return beside_popularity(self.item_Nd[rows], self.popular_N[rows])

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """An outer product per item read and one Cholesky solve; then an inner product per item."""
        num_read, d = min(shape.num_history, self.max_history), self.config.num_factors
        user = num_read * (2.0 * d * d + 3.0 * d) + d**3 / 3 + 2.0 * d * d
        return Cost(
            user_flops=0.0 if cached else user,
            item_flops=2.0 * (d + 1),
            bytes=4.0 * (d + 1) * (num_read + shape.num_items) + 4.0 * d * d,
        )
