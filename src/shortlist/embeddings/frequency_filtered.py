"""Frequency-filtered table: only ids that occur often enough in training have a row; the others share the unknown row.

The usual admission rule of production tables. An id seen twice can not learn a vector, but its row costs as much as any other.

n ids, d width, K kept ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shortlist.embeddings.base import Table, TableChoice, rows_of
from shortlist.errors import ConfigError
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class FrequencyFilteredConfig(TableChoice):
    """Settings of the frequency-filtered table."""

    name: str = "frequency-filtered"
    """Registered name of the table."""
    min_count: int = 5
    """Training events from which on an id has its own row."""

    def __post_init__(self) -> None:
        TableChoice.__post_init__(self)
        if self.min_count < 1:
            raise ConfigError(f"min_count must be at least 1, got {self.min_count}")


@system("frequency-filtered", stage="embeddings", paper="baseline", tiny={"min_count": 2})
class FrequencyFilteredTable(Table):
    """A row for each frequent id, and one for all others."""

    Config = FrequencyFilteredConfig
    needs_counts = True
    row_of_id_N: Tensor

    def __init__(self, num_rows: int, dim: int, config: FrequencyFilteredConfig) -> None:
        super().__init__(num_rows, dim)
        self.config = config
        self.rows = rows_of(num_rows, dim, std=config.init_std, sparse=config.sparse)
        self.register_buffer("row_of_id_N", torch.empty(0, dtype=torch.int32))

    @torch.no_grad()
    def prepare(self, counts_N: Tensor) -> None:
        """See Table.prepare; keeps the rows of frequent ids, in the order of the ids."""
        if len(self.row_of_id_N):
            return
        self.check_counts(counts_N)
        kept_N = (counts_N >= self.config.min_count).to(self.rows.weight.device)
        kept_N[0] = True
        self.row_of_id_N = torch.where(kept_N, kept_N.cumsum(0) - 1, 0).int()
        self.rows.weight = nn.Parameter(self.rows.weight[kept_N])
        self.rows.num_embeddings = len(self.rows.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """float32 [*, d] for ids [...]."""
        return self.rows(self.row_of_id_N[ids].long() if len(self.row_of_id_N) else ids)
