"""A graph made from training-time data: two-step walks on the co-occurrence graph of baskets, kept sparse."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shortlist.data.batches import Batch
from shortlist.data.histories import View
from shortlist.models.base import Cost, ItemScorer, RequestShape
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True)
class TinyGraphConfig:
    restart: float = 0.5
    """Share of the score that stays on the first step."""


@system("tiny-graph", stage="retrieval", paper="baseline", needs={"history"})
class TinyGraph(ItemScorer):
    """Items two steps away from the history."""

    Config = TinyGraphConfig

    def prepare(self, view: View) -> None:
        group = torch.from_numpy(view.histories.group)
        item = torch.from_numpy(view.histories.item)
        pairs = torch.combinations(torch.arange(len(item)))
        pairs = pairs[group[pairs[:, 0]] == group[pairs[:, 1]]]
        edges = torch.cat([item[pairs], item[pairs].flip(1)])
        self.buffer("edges_2E", edges.T.contiguous())

    def score_all(self, batch: Batch) -> Tensor:
        n = self.space.num_items + 1
        walk_NN = torch.sparse_coo_tensor(self.edges_2E, torch.ones(self.edges_2E.shape[1]), (n, n))
        items = batch.history.items
        start_BN = torch.zeros(batch.size, n).index_put_(
            (items.row_of_value, items.values), torch.tensor(1.0), accumulate=True
        )
        one_BN = (walk_NN @ start_BN.T).T
        return self.config.restart * one_BN + (1 - self.config.restart) * (walk_NN @ one_BN.T).T

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        return Cost(user_flops=4.0 * 20 * shape.num_history, item_flops=2.0, bytes=16.0 * self.edges_2E.shape[1])
