"""EASE: the linear model of items on items that has a closed form (Steck, "Embarrassingly Shallow Autoencoders for Sparse Data",
WWW 2019).

With X [users, n] the users' choices, B minimises |X - X B|^2 + lambda |B|^2 under diag(B) = 0:

    P = (X'X + lambda I)^-1,   B = -P / diag(P) column-wise, 0 on the diagonal      (eq. 8)
    score(y) = sum over the user's items i of x_i B[i, y]

x_i is 1, or decay^(groups since i was last chosen) when the newest choices are to count more, in training and at serving alike.

R requests, E events end to end, N = n + 1 catalogue rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shortlist.data.batches import Batch
from shortlist.data.histories import View
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Space
from shortlist.errors import ConfigError
from shortlist.layers.counting import distinct_events, groups_ago, pair_sums, popularity_order, user_items
from shortlist.models.base import Cost, ItemScorer, RequestShape
from shortlist.registry import system

POPULARITY_SHARE = 1e-5  # breaks ties, and orders everything where a request has no history


@dataclass(frozen=True, kw_only=True, slots=True)
class EASEConfig:
    """Settings of EASE."""

    regularisation: float = 200.0
    """lambda: larger values trust rare pairs less. Grows with the number of users; 100 to 1000 in the paper."""
    decay: float = 1.0
    """Weight of an item relative to one that was last chosen a group later; 1 = all alike, as in the paper."""
    double: bool = True
    """Invert in float64; False halves time and memory and is enough unless lambda is small."""
    max_items: int = 20_000
    """Refuse larger catalogues: B holds the square of their size, and time grows with the cube."""
    window_days: float | None = 14.0
    """Requests without history get the popular items of these last days; None = of all times."""
    max_history: int = 500
    """Newest events read per request."""

    def __post_init__(self) -> None:
        if self.regularisation <= 0:
            raise ConfigError(f"ease: regularisation must be above 0, got {self.regularisation}")
        if not 0 < self.decay <= 1:
            raise ConfigError(f"ease: decay must be above 0 and at most 1, got {self.decay}")
        if self.max_items < 1 or self.max_history < 1:
            raise ConfigError(
                f"ease: max_items and max_history must be at least 1, got {self.max_items} and {self.max_history}"
            )


@system("ease", stage="retrieval", paper="Steck, WWW 2019", needs={"history"}, cold_users=True)
class EASE(ItemScorer):
    """A linear map from the items a user chose to all others, in closed form."""

    Config = EASEConfig
    config: EASEConfig
    B_NN: Tensor
    popular_N: Tensor

    def __init__(self, config: EASEConfig, space: Space) -> None:
        super().__init__(config, space)
        if space.num_items > config.max_items:
            raise ConfigError(
                f"ease: the catalogue has {space.num_items:,} items, more than max_items = {config.max_items:,}; its matrix would "
                f"take {4e-9 * space.num_items**2:,.1f} GB. Use item-knn or counts, which keep few neighbours per item, drop rare "
                "items (kcore), or raise max_items."
            )
        self.max_history = config.max_history
        self.buffer("B_NN", torch.zeros(space.num_items + 1, space.num_items + 1))
        self.buffer("popular_N", torch.zeros(space.num_items + 1))

    def prepare(self, view: View) -> None:
        """X'X over users, its inverse by Cholesky, and B."""
        num_rows = view.space.items.num_rows
        cells = user_items(view.histories, num_rows)
        weight = self.config.decay ** cells.groups_ago.astype(np.float64)
        gram_NN = np.zeros((num_rows, num_rows), dtype=np.float64 if self.config.double else np.float32)
        for block in pair_sums(
            source=cells.item,
            start=cells.offsets[cells.user],
            stop=cells.offsets[cells.user + 1],
            weight=weight,
            partner=cells.item,
            partner_weight=weight,
            num_rows=num_rows,
        ):
            gram_NN[block.row, block.column] = block.weight
        np.fill_diagonal(gram_NN, gram_NN.diagonal() + self.config.regularisation)
        inverse_NN = torch.cholesky_inverse(torch.linalg.cholesky(torch.from_numpy(gram_NN)))
        B_NN = (inverse_NN / -inverse_NN.diagonal()).float()
        self.buffer("B_NN", B_NN.fill_diagonal_(0.0))
        self.buffer("popular_N", popularity_order(view, self.config.window_days))

    def score_all(self, batch: Batch) -> Tensor:
        """float32 [R, N]; without history, the popularity order times a small number."""
        history = batch.history.last(self.max_history)
        read = distinct_events(history, per_group=False)
        row_E = history.items.row_of_value[read]
        items = Jagged.from_lengths(history.items.values[read], torch.bincount(row_E, minlength=batch.size))
        weight_E = self.config.decay ** groups_ago(history)[read].to(self.B_NN.dtype)
        scores_RN = torch.nn.functional.embedding_bag(
            items.values, self.B_NN, items.offsets, mode="sum", per_sample_weights=weight_E, include_last_offset=True
        )
        return scores_RN + POPULARITY_SHARE * self.popular_N

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """A multiply-add per item and item read."""
        num_read = min(shape.num_history, self.max_history)
        return Cost(item_flops=2.0 * num_read + 2, bytes=4.0 * (num_read + 1) * shape.num_items)
