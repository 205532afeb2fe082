"""BH: binary-code hash embedding (Yan et al., CIKM 2021): any table size from one id, by splitting its bits into blocks.

    b = bits of the id, b_0 the lowest          S = bits that the largest id needs
    idx_j = the bits of block j as a number     j = 1 .. B
    e(id) = sum_j E_j[idx_j]                    one small table per block

The blocks hold every bit once, so no two ids share all rows, at any size: B tables of 2^(S/B) rows stand for 2^S ids.

- Succession: t bits that follow each other per block, the last block may be shorter.
- Skip: block j holds bits j, j + B, j + 2B, ...

Difference from the paper: block tables are separate. Sharing one table, as the company's article has it, makes the codes (a, b) and
(b, a) the same vector; `shared` does it all the same.

n ids, d width, S bits, B blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shortlist.embeddings.base import Table, TableChoice, rows_of, summed_rows
from shortlist.embeddings.hashing import GOLDEN, check_compression, rows_left
from shortlist.errors import ConfigError
from shortlist.registry import system

Blocks = tuple[tuple[int, ...], ...]
"""Places of the bits of each block, lowest first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BHConfig(TableChoice):
    """Settings of the binary-code hash table."""

    name: str = "bh"
    """Registered name of the table."""
    compression: float = 10.0
    """Ids per row of all block tables together. The largest layout within it is taken, or the smallest one there is."""
    strategy: Literal["succession", "skip"] = "succession"
    """Which bits form a block: neighbours, or bits at equal distance. Skip has far fewer sizes to choose from."""
    scramble: bool = False
    """Multiply the id by an odd number modulo 2^S first: still one to one, but neighbours by number share no rows for it."""
    shared: bool = False
    """One table for all blocks: smaller, but different ids get the same vector."""

    def __post_init__(self) -> None:
        TableChoice.__post_init__(self)
        check_compression(self.compression)
        if self.strategy not in ("succession", "skip"):
            raise ConfigError(f"strategy must be succession or skip, got {self.strategy!r}")


@system("bh", stage="embeddings", paper="Yan et al., CIKM 2021", tiny={"compression": 2.0})
class BHTable(Table):
    """The sum of one row for each block of the id's bits."""

    Config = BHConfig
    first_B: Tensor

    def __init__(self, num_rows: int, dim: int, config: BHConfig) -> None:
        super().__init__(num_rows, dim)
        self.config = config
        self.num_bits = max(1, (num_rows - 2).bit_length()) if num_rows > 1 else 1
        largest = (1 << self.num_bits) - 1 if config.scramble else max(num_rows - 2, 0)
        self.blocks = chosen_blocks(
            largest, self.num_bits, rows_left(num_rows, config.compression), config.strategy, shared=config.shared
        )
        sizes = [rows + 1 for rows in block_rows(self.blocks, largest)]  # one more for the unknown id
        firsts = [0] * len(sizes) if config.shared else [sum(sizes[:j]) for j in range(len(sizes))]
        total = max(sizes) if config.shared else sum(sizes)
        self.rows = rows_of(total, dim, std=config.init_std / math.sqrt(len(sizes)), sparse=config.sparse)
        self.register_buffer("first_B", torch.tensor(firsts), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """float32 [*, d] for ids [...]."""
        return summed_rows(self.rows, self.codes(ids))

    def codes(self, ids: Tensor) -> Tensor:
        """Rows of each id, int64 [..., B]."""
        number = ids - 1
        if self.config.scramble:
            number = (number * GOLDEN) & ((1 << self.num_bits) - 1)
        index = torch.stack([decimal(number, block) for block in self.blocks], dim=-1)
        return torch.where(ids[..., None] > 0, index + 1, 0) + self.first_B


def decimal(numbers: Tensor, bits: Sequence[int]) -> Tensor:
    """The bits at the given rising places, packed densely, as a number: int64 of the same shape."""
    if bits[-1] - bits[0] == len(bits) - 1:
        return (numbers >> bits[0]) & ((1 << len(bits)) - 1)
    value = torch.zeros_like(numbers)
    for place, bit in enumerate(bits):
        value |= ((numbers >> bit) & 1) << place
    return value


def layouts(num_bits: int, strategy: str) -> Iterator[Blocks]:
    """Every way in which the strategy splits the bits, from one block to one per bit."""
    for step in range(num_bits, 0, -1):
        if strategy == "succession":
            yield tuple(tuple(range(first, min(first + step, num_bits))) for first in range(0, num_bits, step))
        else:
            num_blocks = num_bits + 1 - step
            yield tuple(tuple(range(j, num_bits, num_blocks)) for j in range(num_blocks))


def block_rows(blocks: Blocks, largest: int) -> list[int]:
    """Rows that each block needs for the numbers 0..largest: fewer than 2^bits where the highest bits never are all set."""
    return [min(1 << len(block), (largest >> block[0]) + 1) for block in blocks]


def chosen_blocks(largest: int, num_bits: int, budget: int, strategy: str, *, shared: bool) -> Blocks:
    """The layout with the most rows among those of at most `budget`; the one with the fewest where all have more."""
    combined = max if shared else sum
    options = [(combined(block_rows(blocks, largest)), blocks) for blocks in layouts(num_bits, strategy)]
    fitting = [option for option in options if option[0] <= budget]
    best = max(fitting, key=lambda option: option[0]) if fitting else min(options, key=lambda option: option[0])
    return best[1]
