"""A ranker that needs user-item pair fields: a linear model over them and the item's cluster."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shortlist.data.batches import Batch, Candidates
from shortlist.data.schema import Space
from shortlist.layers.fields import FieldEmbeddings, ItemEncoder
from shortlist.models.base import Cost, Losses, Ranker, RequestShape, Scores
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True)
class TinyPairsConfig:
    dim: int = 8


@system(
    "tiny-pairs", stage="ranking", paper="baseline", needs={"pair"}, tiny={"dim": 4}, cold_items=True, cold_users=True
)
class TinyPairs(Ranker):
    """Pair fields, item fields and context in one linear layer."""

    Config = TinyPairsConfig

    def __init__(self, config: TinyPairsConfig, space: Space) -> None:
        super().__init__(config, space)
        self.items = ItemEncoder(space, config.dim)
        self.context = FieldEmbeddings(space.context_fields, config.dim)
        self.out = nn.Linear(config.dim + len(space.pair_fields), len(space.tasks))

    def user_state(self, batch: Batch) -> Tensor:
        return self.context(batch.context).sum(1)

    def score_candidates(self, state: Tensor, candidates: Candidates) -> Scores:
        rows = candidates.rows
        item = self.items(rows.values) * state[rows.row_of_value]
        pair = torch.stack([candidates.pair[f.name] for f in self.space.pair_fields], 1)
        out = self.out(torch.cat([item, pair], 1))
        return {task: out[:, t] for t, task in enumerate(self.space.tasks)}

    def losses(self, batch: Batch) -> Losses:
        return {
            task: nn.functional.binary_cross_entropy_with_logits(logit, batch.labels[task])
            for task, logit in self.score(batch).items()
        }

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        width = self.config.dim + len(self.space.pair_fields)
        return Cost(item_flops=2.0 * width * len(self.space.tasks), bytes=4.0 * self.config.dim * shape.num_candidates)
