"""Frequency steps: widths by frequency band, fixed before training: the rule that AMTL and mixed-dimension tables are held against.

Ids are sorted by their training counts; the first share keeps the full width, later ones less. Blocks of popularity with widths that
fall with rarity are from Ginart et al. ("Mixed Dimension Embeddings", ISIT 2021), where a linear map brings each width to d; here the
missing dimensions are zeros, as in AMTL.

n ids, d width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shortlist.embeddings.base import Table, TableChoice, rows_of
from shortlist.embeddings.packed import PackedRows, emptied
from shortlist.errors import ConfigError
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class FrequencyStepsConfig(TableChoice):
    """Settings of the table with widths by frequency band."""

    name: str = "frequency-steps"
    """Registered name of the table."""
    shares: tuple[float, ...] = (0.1, 0.4, 1.0)
    """Where each band ends, as a share of the ids, most frequent first; the last is 1."""
    widths: tuple[float, ...] = (1.0, 0.5, 0.25)
    """Share of the dimensions that each band keeps; at least one dimension stays."""

    def __post_init__(self) -> None:
        TableChoice.__post_init__(self)
        rising = all(a < b for a, b in zip((0.0, *self.shares), self.shares))
        if not self.shares or not rising or self.shares[-1] != 1 or len(self.shares) != len(self.widths):
            raise ConfigError(
                f"shares must rise from above 0 to 1 and have one width each, got {self.shares} and {self.widths}"
            )
        if not all(0 < width <= 1 for width in self.widths):
            raise ConfigError(f"widths must be above 0 and at most 1, got {self.widths}")


@system("frequency-steps", stage="embeddings", paper="Ginart et al., ISIT 2021")
class FrequencyStepsTable(Table):
    """Rows of its own for every id, shorter the rarer it is."""

    Config = FrequencyStepsConfig
    needs_counts = True

    def __init__(self, num_rows: int, dim: int, config: FrequencyStepsConfig) -> None:
        super().__init__(num_rows, dim)
        self.config = config
        self.rows = rows_of(num_rows, dim, std=config.init_std, sparse=config.sparse)
        self.packed = PackedRows(dim, sparse=config.sparse)

    def prepare(self, counts_N: Tensor) -> None:
        """See Table.prepare; cuts the rows."""
        if self.packed.is_filled:
            return
        self.check_counts(counts_N)
        lengths = step_lengths(counts_N, self.dim, self.config.shares, self.config.widths)
        self.packed.fill(self.rows.weight, lengths.to(self.rows.weight.device))
        emptied(self.rows)

    def forward(self, ids: Tensor) -> Tensor:
        """float32 [*, d] for ids [...]."""
        return self.packed(ids) if self.packed.is_filled else self.rows(ids)


def step_lengths(counts_N: Tensor, dim: int, shares: tuple[float, ...], widths: tuple[float, ...]) -> Tensor:
    """Dimensions per id, int64 [n], by place in the order of counts; the lower id comes first among equals. Id 0 keeps all."""
    num_ids = len(counts_N) - 1
    order = counts_N[1:].argsort(descending=True, stable=True)
    ends = torch.tensor([round(share * num_ids) for share in shares], device=counts_N.device)
    band = torch.bucketize(torch.arange(num_ids, device=counts_N.device), ends, right=True)
    width = torch.tensor([max(1, round(share * dim)) for share in widths], device=counts_N.device)
    lengths = torch.full_like(counts_N, dim, dtype=torch.int64)
    lengths[1 + order] = width[band]
    return lengths
