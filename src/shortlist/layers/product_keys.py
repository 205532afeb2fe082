"""A very large memory of vectors read sparsely by product keys (Lample et al., NeurIPS 2019): capacity at hardly any compute.

n queries, M = S * S slots, e width of a query (two halves of e / 2), R slots read per query, D width of a value.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shortlist.embeddings.base import TableChoice, make_table
from shortlist.errors import ConfigError


class ProductKeyMemory(nn.Module):
    """For each vector the mean of the R values whose keys answer it best, weighted by a softmax of the answers.

        q = norm(W x) = [q1; q2],   answer(a, b) = C1[a] q1 + C2[b] q2,   slot (a, b) = a * S + b

    The R best of all S * S sums are among the R x R sums of the R best of each half, so that S * e + R * R products do.

    Args:
        dim: D of inputs and values.
        num_slots: M, a square number.
        num_read: R, at most S.
        key_dim: e, even.
        table: of the values; sparse by default, so that a step writes only the slots that were read.

    Raises ConfigError where the numbers do not fit each other.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_slots: int = 16_384,
        num_read: int = 16,
        key_dim: int = 64,
        table: TableChoice | None = None,
    ) -> None:
        super().__init__()
        self.side = round(num_slots**0.5)
        if self.side**2 != num_slots or key_dim % 2 or not 0 < num_read <= self.side:
            raise ConfigError(
                "a product-key memory needs a square number of slots, an even key_dim and at most sqrt(slots) reads, "
                f"got {num_slots} slots, key_dim {key_dim} and {num_read} reads"
            )
        self.num_read = num_read
        self.query = nn.Linear(dim, key_dim)
        self.norm = nn.LayerNorm(key_dim)  # without it a few keys win for ever
        self.keys = nn.Parameter(torch.randn(2, self.side, key_dim // 2) * key_dim**-0.5)
        self.values = make_table(num_slots, dim, table or TableChoice(init_std=0.02, sparse=True))
        self.flops_per_row = 2 * dim * key_dim + 2 * self.side * key_dim + num_read**2 + 2 * num_read * dim

    def forward(self, x_nD: Tensor) -> Tensor:
        """float [n, D]: what the memory holds for each vector."""
        answer_nR, slot_nR = self.best(self.norm(self.query(x_nD)))
        return (answer_nR.softmax(1)[:, :, None] * self.values(slot_nR)).sum(1)

    def best(self, query_ne: Tensor) -> tuple[Tensor, Tensor]:
        """Answers [n, R] of the R slots that answer best, and the slots, int64 [n, R]; best first."""
        half_2nc = torch.stack(query_ne.chunk(2, dim=1))
        best_2nR, index_2nR = torch.bmm(half_2nc, self.keys.transpose(1, 2)).topk(self.num_read, dim=2)
        sum_nRR = best_2nR[0][:, :, None] + best_2nR[1][:, None, :]
        answer_nR, place_nR = sum_nRR.flatten(1).topk(self.num_read, dim=1)
        first_nR = index_2nR[0].gather(1, place_nR.div(self.num_read, rounding_mode="floor"))
        second_nR = index_2nR[1].gather(1, place_nR % self.num_read)
        return answer_nR, first_nR * self.side + second_nR

    def best_reference(self, query_ne: Tensor) -> tuple[Tensor, Tensor]:
        """The same by brute force over all M slots; for tests."""
        half_2nc = torch.stack(query_ne.chunk(2, dim=1))
        answer_2nS = torch.bmm(half_2nc, self.keys.transpose(1, 2))
        best = (answer_2nS[0][:, :, None] + answer_2nS[1][:, None, :]).flatten(1).topk(self.num_read, dim=1)
        return best.values, best.indices
