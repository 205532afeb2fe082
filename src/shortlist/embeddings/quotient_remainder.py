"""Quotient-remainder table (Shi et al., "Compositional Embeddings Using Complementary Partitions", KDD 2020).

    e(id) = Q[id // m] o R[id mod m]            o: product or sum of numbers

No two ids share both rows. m + ceil(n / m) rows, at least about 2 sqrt(n).

Difference from the paper: with the product, where the paper starts both tables away from 0, R starts like every other table here and
Q around 1, so that vectors start at the usual scale.

n ids, d width, m remainders.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from shortlist.embeddings.base import Table, TableChoice, rows_of
from shortlist.embeddings.hashing import check_compression, rows_left
from shortlist.errors import ConfigError
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class QuotientRemainderConfig(TableChoice):
    """Settings of the quotient-remainder table."""

    name: str = "quotient-remainder"
    """Registered name of the table."""
    compression: float = 10.0
    """Ids per row of both tables together. Where that leaves fewer rows than 2 sqrt(ids), the smallest table is taken."""
    op: Literal["multiply", "add"] = "multiply"
    """How the two rows become one vector."""

    def __post_init__(self) -> None:
        TableChoice.__post_init__(self)
        check_compression(self.compression)
        if self.op not in ("multiply", "add"):
            raise ConfigError(f"op must be multiply or add, got {self.op!r}")


@system("quotient-remainder", stage="embeddings", paper="Shi et al., KDD 2020", tiny={"compression": 2.0})
class QuotientRemainderTable(Table):
    """A row for the quotient and one for the remainder of each id, multiplied or added."""

    Config = QuotientRemainderConfig

    def __init__(self, num_rows: int, dim: int, config: QuotientRemainderConfig) -> None:
        super().__init__(num_rows, dim)
        self.op = config.op
        self.num_remainders = remainders(num_rows - 1, rows_left(num_rows, config.compression))
        num_quotients = math.ceil((num_rows - 1) / self.num_remainders)
        is_sum = config.op == "add"
        std = config.init_std / math.sqrt(2) if is_sum else config.init_std
        self.remainder = rows_of(self.num_remainders + 1, dim, std=std, sparse=config.sparse)
        self.quotient = rows_of(num_quotients + 1, dim, std=std, sparse=config.sparse)
        if not is_sum:
            nn.init.uniform_(self.quotient.weight, 0.5, 1.5)

    def forward(self, ids: Tensor) -> Tensor:
        """float32 [*, d] for ids [...]."""
        quotient, remainder = self.codes(ids)
        one, other = self.quotient(quotient), self.remainder(remainder)
        return one + other if self.op == "add" else one * other

    def codes(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the quotient and of the remainder, int64 [...] each; both 0 for id 0 alone."""
        number = ids - 1
        quotient = torch.where(ids > 0, number.div(self.num_remainders, rounding_mode="floor") + 1, 0)
        return quotient, torch.where(ids > 0, number % self.num_remainders + 1, 0)


def remainders(num_ids: int, budget: int) -> int:
    """The largest m with m + ceil(num_ids / m) <= budget rows; where there is none, the m with the fewest rows, ceil(sqrt(num_ids))."""
    smallest = math.isqrt(max(num_ids - 1, 0)) + 1
    root = math.sqrt(max(budget * budget - 4 * num_ids, 0))
    for m in range(int((budget + root) / 2) + 1, smallest, -1):
        if m + math.ceil(num_ids / m) <= budget:
            return m
    return smallest
