"""A generator over a prefix trie: an item is a code (first digit, second digit); digits are decoded by beam search inside the trie."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shortlist.data.batches import Batch
from shortlist.data.jagged import segment_mean
from shortlist.data.schema import Space
from shortlist.models.base import RETRIEVAL_TASK, Cost, Losses, RequestShape, Retrieved, Retriever, Scores
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True)
class TinyTrieConfig:
    base: int = 5
    """Digits per level; two levels give base^2 codes."""
    dim: int = 8
    beam: int = 16


@system("tiny-trie", stage="retrieval", paper="baseline", needs={"history"}, tiny={"base": 5, "dim": 8})
class TinyTrie(Retriever):
    """Two-digit codes, generated digit by digit."""

    Config = TinyTrieConfig
    feed = "targets"

    def __init__(self, config: TinyTrieConfig, space: Space) -> None:
        super().__init__(config, space)
        self.history_vectors = nn.Embedding(space.num_items + 1, config.dim)
        self.first = nn.Linear(config.dim, config.base)
        self.second = nn.Linear(config.dim, config.base * config.base)

    def digits(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return (rows - 1) // self.config.base, (rows - 1) % self.config.base

    def log_probabilities(self, batch: Batch) -> tuple[Tensor, Tensor]:
        items = batch.history.items
        user_Bd = segment_mean(self.history_vectors(items.values), items.row_of_value, batch.size)
        second_BKK = self.second(user_Bd).view(-1, self.config.base, self.config.base)
        return self.first(user_Bd).log_softmax(-1), second_BKK.log_softmax(-1)

    def score(self, batch: Batch) -> Scores:
        first_BK, second_BKK = self.log_probabilities(batch)
        rows = batch.candidate_rows
        a, b = self.digits(rows.values)
        r = rows.row_of_value
        return {RETRIEVAL_TASK: first_BK[r, a] + second_BKK[r, a, b]}

    def retrieve(self, batch: Batch, k: int) -> Retrieved:
        first_BK, second_BKK = self.log_probabilities(batch)
        score_BN = (first_BK[:, :, None] + second_BKK).flatten(1)[:, : self.space.num_items]
        score_BN = nn.functional.pad(score_BN, (1, 0), value=-torch.inf)
        if batch.excluded is not None:
            score_BN[batch.excluded.row_of_value, batch.excluded.values] = -torch.inf
        scores, rows = score_BN.topk(min(k, self.space.num_items), 1)
        pad = k - rows.shape[1]
        rows = nn.functional.pad(rows.masked_fill(scores == -torch.inf, 0), (0, pad))
        return Retrieved(rows, nn.functional.pad(scores, (0, pad), value=-torch.inf))

    def losses(self, batch: Batch) -> Losses:
        return {"code": -self.score(batch)[RETRIEVAL_TASK].mean()}

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        width = self.config.base * (1 + self.config.base)
        return Cost(
            user_flops=2.0 * self.config.dim * width, item_flops=1.0, bytes=4.0 * self.config.dim * shape.num_history
        )
