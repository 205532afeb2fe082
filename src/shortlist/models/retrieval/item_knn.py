"""Item-based nearest neighbours: items that the same people chose (Sarwar et al., WWW 2001; weightings as in text search).

With x_i the column of weights of item i over all users,

    sim(i, j) = x_i . x_j / (|x_i| |x_j| + shrinkage), the `num_neighbours` largest kept for each i (i itself too, if wanted)
    score(y)  = sum over the user's items i of decay^(groups since i was last chosen) * sim(i, y)

and weights, for a user who chose item i c times, in all l times (l_mean on average), of U users of whom d_i chose i:

    cosine   1
    tf-idf   sqrt(c) * log((1 + U) / (1 + d_i))
    bm25     log((1 + U) / (1 + d_i)) * c (k1 + 1) / (c + k1 (1 - b + b l / l_mean)), k1 = 1.2, b = 0.75

B requests, E events end to end, N = n + 1 catalogue rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from shortlist.data.batches import Batch
from shortlist.data.histories import Int, View
from shortlist.data.schema import Space
from shortlist.errors import ConfigError
from shortlist.layers.counting import (
    PairSums,
    SparseRows,
    UserItems,
    Weights,
    add_sparse_rows,
    distinct_events,
    groups_ago,
    pair_sums,
    popularity_order,
    sparse_rows,
    then_popular,
    user_items,
)
from shortlist.models.base import Cost, ItemScorer, RequestShape
from shortlist.registry import system

BM25_SATURATION = 1.2  # k1
BM25_LENGTH = 0.75  # b


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemKNNConfig:
    """Settings of the item neighbours."""

    num_neighbours: int = 50
    """Most similar items kept per item."""
    weighting: Literal["cosine", "tf-idf", "bm25"] = "bm25"
    """How much a user's choices of an item weigh."""
    shrinkage: float = 10.0
    """Added to the product of lengths, so that a similarity that few users back counts less."""
    keep_self: bool = True
    """Let an item be its own neighbour, so that what was chosen may come again; it changes nothing where history is excluded."""
    decay: float = 1.0
    """Weight of an item relative to one that was last chosen a group later; 1 = all alike."""
    window_days: float | None = 14.0
    """Items without a similar one follow by popularity of these last days; None = of all times."""
    max_history: int = 200
    """Newest events read per request."""

    def __post_init__(self) -> None:
        if self.num_neighbours < 1 or self.max_history < 1 or self.shrinkage < 0:
            raise ConfigError(
                "item-knn: num_neighbours and max_history must be at least 1 and shrinkage at least 0, "
                f"got {self.num_neighbours}, {self.max_history} and {self.shrinkage}"
            )
        if not 0 < self.decay <= 1:
            raise ConfigError(f"item-knn: decay must be above 0 and at most 1, got {self.decay}")
        if self.weighting not in ("cosine", "tf-idf", "bm25"):
            raise ConfigError(f"item-knn: weighting must be cosine, tf-idf or bm25, got {self.weighting!r}")


@system("item-knn", stage="retrieval", paper="Sarwar et al., WWW 2001", needs={"history"}, cold_users=True)
class ItemKNN(ItemScorer):
    """Items most similar to the user's own, by who chose them."""

    Config = ItemKNNConfig
    config: ItemKNNConfig
    offsets: Tensor
    columns: Tensor
    weights: Tensor
    popular_N: Tensor

    def __init__(self, config: ItemKNNConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.max_history
        self._keep(sparse_rows([], space.num_items + 1))
        self.buffer("popular_N", torch.zeros(space.num_items + 1))

    def _keep(self, matrix: SparseRows) -> None:
        for name, tensor in matrix._asdict().items():
            self.buffer(name, tensor)

    def prepare(self, view: View) -> None:
        """Similarities of all pairs of items that share a user, the largest kept; in blocks of items."""
        num_rows = view.space.items.num_rows
        cells = user_items(view.histories, num_rows)
        weight = self._weights(cells, num_rows)
        length_N = np.sqrt(np.bincount(cells.item, weights=weight**2, minlength=num_rows))
        blocks = pair_sums(
            source=cells.item,
            start=cells.offsets[cells.user],
            stop=cells.offsets[cells.user + 1],
            weight=weight,
            partner=cells.item,
            partner_weight=weight,
            num_rows=num_rows,
        )
        self._keep(sparse_rows((self._nearest(block, length_N) for block in blocks), num_rows))
        self.buffer("popular_N", popularity_order(view, self.config.window_days))

    def _weights(self, cells: UserItems, num_rows: int) -> Weights:
        if self.config.weighting == "cosine":
            return np.ones(len(cells.item))
        count = cells.num_groups.astype(np.float64)
        num_users = np.count_nonzero(np.diff(cells.offsets))
        rarity = np.log((1 + num_users) / (1 + np.bincount(cells.item, minlength=num_rows)))[cells.item]
        if self.config.weighting == "tf-idf":
            return np.sqrt(count) * rarity
        total_of_user = np.bincount(cells.user, weights=count)
        relative = total_of_user[cells.user] / (count.sum() / max(num_users, 1))
        dampened = count + BM25_SATURATION * (1 - BM25_LENGTH + BM25_LENGTH * relative)
        return rarity * count * (BM25_SATURATION + 1) / dampened

    def _nearest(self, block: PairSums, length_N: Weights) -> PairSums:
        row, column, product = block
        similarity = product / (length_N[row] * length_N[column] + self.config.shrinkage)
        live = (similarity > 0) & ((row != column) | self.config.keep_self)
        row, column, similarity = row[live], column[live], similarity[live]
        order = np.lexsort((-similarity, row))
        rank = np.empty_like(row)
        rank[order] = _place_in_run(row[order])
        near = rank < self.config.num_neighbours
        return PairSums(row[near], column[near], similarity[near])

    def score_all(self, batch: Batch) -> Tensor:
        """float32 [B, N]: sums of similarities; items without any lie between -1 and 0, by popularity."""
        history = batch.history.last(self.max_history)
        read = distinct_events(history, per_group=False)
        scores_BN = self.popular_N.new_zeros(batch.size, len(self.popular_N))
        add_sparse_rows(
            scores_BN,
            history.items.row_of_value[read],
            history.items.values[read],
            self.config.decay ** groups_ago(history)[read].to(scores_BN.dtype),
            SparseRows(self.offsets, self.columns, self.weights),
        )
        return then_popular(scores_BN, self.popular_N)

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """A multiply-add per stored neighbour of the items read, then the fallback over the catalogue."""
        num_read = min(shape.num_history, self.max_history) * len(self.columns) / max(len(self.popular_N), 1)
        return Cost(user_flops=2 * num_read, item_flops=3, bytes=8 * num_read + 4.0 * shape.num_items)


def _place_in_run(row: Int) -> Int:
    """0, 1, 2, ... within each run of equal values."""
    index = np.arange(len(row))
    starts = np.maximum.accumulate(np.where(np.diff(row, prepend=-1) != 0, index, 0))
    return index - starts
