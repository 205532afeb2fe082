"""A closed form: linear item-item weights solved once from the counts of training time (EASE, Steck, WWW 2019, in eight lines)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shortlist.data.batches import Batch
from shortlist.data.histories import View
from shortlist.models.base import Cost, ItemScorer, RequestShape
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True)
class TinyClosedFormConfig:
    l2: float = 10.0
    """Ridge on the weights."""


@system("tiny-closed-form", stage="retrieval", paper="baseline", needs={"history"})
class TinyClosedForm(ItemScorer):
    """EASE on dense counts."""

    Config = TinyClosedFormConfig

    def prepare(self, view: View) -> None:
        x_UN = torch.zeros(view.histories.num_users + 1, self.space.num_items + 1)
        x_UN[torch.from_numpy(view.histories.user_of_event), torch.from_numpy(view.histories.item)] = 1
        p_NN = torch.linalg.inv(x_UN.T @ x_UN + self.config.l2 * torch.eye(x_UN.shape[1]))
        weights_NN = -p_NN / p_NN.diagonal()
        self.buffer("weights_NN", weights_NN.fill_diagonal_(0))

    def score_all(self, batch: Batch) -> Tensor:
        items = batch.history.items
        seen_BN = torch.zeros(batch.size, self.space.num_items + 1)
        seen_BN[items.row_of_value, items.values] = 1
        return seen_BN @ self.weights_NN

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        return Cost(item_flops=2.0 * shape.num_history, bytes=4.0 * shape.num_history * shape.num_items)
