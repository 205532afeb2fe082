"""Multi-hash table: several hashes into one table, and optionally learned weights of each (Svenstrup et al., "Hash Embeddings",
NeurIPS 2017).

    e(id) = sum_i p_i(id) E[h_i(id) mod R]      p = 1, or a learned row of P for each id

Two ids are one to the model only if all their hashes meet: for k = 2 in about one of R^2 / 2 pairs instead of one of R. The plain sum
(k = 2: double hashing) has no side table.

Difference from the paper: P starts at 1, so that training starts from the plain sum; the weights are not also given to the model.

n ids, d width, R rows, k hashes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shortlist.embeddings.base import Table, TableChoice, rows_of, summed_rows
from shortlist.embeddings.hashing import check_compression, mixed, rows_left
from shortlist.errors import ConfigError
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class MultiHashConfig(TableChoice):
    """Settings of the multi-hash table."""

    name: str = "multi-hash"
    """Registered name of the table."""
    compression: float = 10.0
    """Ids per row of vectors; rows of importance come on top."""
    num_hashes: int = 2
    """Rows summed per id."""
    importance: float | None = None
    """Ids per row of learned weights, one weight for each hash; None = the plain sum, 1.0 = weights of its own for each id."""
    seed: int = 0
    """Of the hashes."""

    def __post_init__(self) -> None:
        TableChoice.__post_init__(self)
        check_compression(self.compression)
        if self.num_hashes < 1:
            raise ConfigError(f"num_hashes must be at least 1, got {self.num_hashes}")
        if self.importance is not None and not self.importance >= 1:
            raise ConfigError(f"importance must be at least 1 (ids per row of weights), got {self.importance}")


@system(
    "multi-hash",
    stage="embeddings",
    paper="Svenstrup et al., NeurIPS 2017",
    tiny={"compression": 2.0, "importance": 1.0},
)
class MultiHashTable(Table):
    """The sum of the rows that several hashes of an id point to."""

    Config = MultiHashConfig

    def __init__(self, num_rows: int, dim: int, config: MultiHashConfig) -> None:
        super().__init__(num_rows, dim)
        self.config = config
        k = config.num_hashes
        self.num_hashed = rows_left(num_rows, config.compression)
        self.rows = rows_of(self.num_hashed + k, dim, std=config.init_std / math.sqrt(k), sparse=config.sparse)
        self.num_weighted = rows_left(num_rows, config.importance) if config.importance is not None else 0
        self.importance: nn.Embedding | None = None
        if config.importance is not None:
            self.importance = nn.Embedding(self.num_weighted + 1, k, sparse=config.sparse)
            nn.init.ones_(self.importance.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """float32 [*, d] for ids [...]."""
        weights = None if self.importance is None else self.importance(self.weight_codes(ids))
        return summed_rows(self.rows, self.codes(ids), weights)

    def codes(self, ids: Tensor) -> Tensor:
        """Rows of each id, int64 [..., k]: 0..k-1 for id 0, else at least k."""
        k = self.config.num_hashes
        rows = [mixed(ids - 1, self.config.seed + 1 + i) % self.num_hashed + k for i in range(k)]
        own = torch.arange(k, device=ids.device)
        return torch.where(ids[..., None] > 0, torch.stack(rows, dim=-1), own)

    def weight_codes(self, ids: Tensor) -> Tensor:
        """Row of weights of each id, int64 [...]; an id has its own where there are enough."""
        number = ids - 1
        if self.num_weighted < self.num_rows - 1:
            number = mixed(number, self.config.seed) % self.num_weighted
        return torch.where(ids > 0, number + 1, 0)
