"""Two phases of training: item vectors from next events first, then, frozen, a user tower on past requests."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shortlist.data.batches import Batch
from shortlist.data.jagged import segment_mean
from shortlist.data.schema import Space
from shortlist.layers.fields import ItemEncoder
from shortlist.models.base import Cost, Losses, Phase, RequestShape, VectorRetriever
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True)
class TinyTwoPhasesConfig:
    dim: int = 8


@system("tiny-two-phases", stage="retrieval", paper="baseline", needs={"history"}, tiny={"dim": 4})
class TinyTwoPhases(VectorRetriever):
    """Pre-train, then fine-tune."""

    Config = TinyTwoPhasesConfig
    feed = "targets"

    def __init__(self, config: TinyTwoPhasesConfig, space: Space) -> None:
        super().__init__(config, space)
        self.items = ItemEncoder(space, config.dim)
        self.user_map = nn.Linear(config.dim, config.dim)

    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase(name="items", feed="next_event", losses=self.pretraining, parameters=self.items.parameters),
            Phase(name="users", feed="targets", losses=self.losses, parameters=self.user_parameters),
        )

    def user_parameters(self) -> Iterable[nn.Parameter]:
        return self.user_map.parameters()

    def pretraining(self, batch: Batch) -> Losses:
        at = self.items(batch.history.items.values)[batch.targets.position]
        logits_PN = at @ self.items.all().T
        targets = batch.targets.items
        loss = nn.functional.cross_entropy(logits_PN[targets.row_of_value], targets.values, reduction="none")
        return {"items": (loss * batch.targets.weight).mean()}

    def losses(self, batch: Batch) -> Losses:
        rows = batch.candidate_rows
        logits = self.encode_user(batch)[rows.row_of_value] @ self.items(rows.values).detach().T
        return {"users": nn.functional.cross_entropy(logits, torch.arange(len(rows.values)))}

    def encode_user(self, batch: Batch) -> Tensor:
        items = batch.history.items
        return self.user_map(segment_mean(self.items(items.values), items.row_of_value, batch.size))

    def encode_items(self, rows: Tensor) -> Tensor:
        return self.items(rows)

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        d = self.config.dim
        return Cost(
            user_flops=0 if cached else 2.0 * d * d + d * shape.num_history,
            item_flops=2.0 * d,
            bytes=4.0 * d * shape.num_items,
        )
