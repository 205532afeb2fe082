"""Vectors of unequal length, end to end: what an id does not use is not stored.

    ids       0        1    2          offsets  0 3 4 6
    values    a b c    d    e f        vector of 1: d 0 0

n ids, d full width, P stored numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shortlist.errors import DataError


class PackedRows(nn.Module):
    """The first k_i numbers of each id's vector; the rest are zeros. Empty until `fill`."""

    offsets: Tensor

    def __init__(self, dim: int, *, sparse: bool) -> None:
        super().__init__()
        self.dim = dim
        self.values = nn.Embedding.from_pretrained(torch.empty(0, 1), freeze=False, sparse=sparse)
        self.register_buffer("offsets", torch.empty(0, dtype=torch.int32))
        self.register_buffer("place_d", torch.arange(dim), persistent=False)

    @property
    def is_filled(self) -> bool:
        """False until `fill`."""
        return len(self.offsets) > 0

    @property
    def lengths(self) -> Tensor:
        """k, int64 [n]."""
        return self.offsets.diff().long()

    @torch.no_grad()
    def fill(self, rows_ND: Tensor, lengths_N: Tensor) -> None:
        """Take the first lengths [n] int64 (1..d) numbers of rows [n, d]. DataError where there are more than 2^31 of them."""
        total = int(lengths_N.sum())
        if total >= 1 << 31:
            raise DataError(f"{total} packed numbers are more than the 2^31 that an index of 32 bits can tell apart")
        kept = torch.arange(self.dim, device=rows_ND.device) < lengths_N[:, None]
        self.values.weight = nn.Parameter(rows_ND[kept][:, None].clone())
        self.values.num_embeddings = total
        self.offsets = nn.functional.pad(lengths_N.cumsum(0), (1, 0)).int()

    def forward(self, ids: Tensor) -> Tensor:
        """float32 [*, d] for ids [...] int64: zeros from place k_i on."""
        first, end = self.offsets[ids].long(), self.offsets[ids + 1].long()
        place = first[..., None] + self.get_buffer("place_d")
        is_stored = place < end[..., None]
        # Places behind the end read the id's own first number, which is then hidden: no row of another id is touched.
        value = self.values(torch.where(is_stored, place, first[..., None])).squeeze(-1)
        return value.masked_fill(~is_stored, 0.0)


def emptied(rows: nn.Embedding) -> None:
    """Give up the parameters of a table whose vectors are stored elsewhere from now on."""
    rows.weight = nn.Parameter(rows.weight.new_empty(0, rows.embedding_dim))
    rows.num_embeddings = 0
