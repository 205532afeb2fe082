"""One learned number per item beside the inner product, for systems whose scores are q . e_i + b_i.

n items (matrices have n + 1 rows), D width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from shortlist.data.histories import View
from shortlist.embeddings.base import dropped_ids
from shortlist.layers.fields import ItemEncoder


class OutputBias(nn.Module):
    """The bias of every item: a fixed start, the log of its count, and what is learned from there.

    Started at 0, as in the papers, a bias that moves by the learning rate per step takes thousands of steps to say what is popular.
    """

    start_N: Tensor

    def __init__(self, num_items: int) -> None:
        super().__init__()
        self.learned = nn.Embedding(num_items + 1, 1)
        nn.init.zeros_(self.learned.weight)
        self.register_buffer("start_N", torch.zeros(num_items + 1))

    def prepare(self, view: View, *, has_fields: bool) -> None:
        """Set the start: 0 for known items on average. One without events is like the average where fields can tell of it, else like
        the rarest."""
        count_N = np.bincount(view.histories.item, minlength=len(self.start_N))
        log_N = torch.from_numpy(np.log(np.maximum(count_N, 1))).float()
        has_events_N = torch.from_numpy(count_N > 0)
        has_events_N[0] = False
        if not bool(has_events_N.any()):
            self.start_N.zero_()
            return
        log_N -= log_N[has_events_N].mean()
        rarest = float(log_N[has_events_N].min())
        self.start_N.copy_(log_N.masked_fill(~has_events_N, 0.0 if has_fields else rarest))

    def beside(self, vectors: Tensor, rows: Tensor, items: ItemEncoder) -> Tensor:
        """Item vectors [*, D] of catalogue rows [...] with their bias behind: float [*, D + 1].

        Items without training events share the learned part of row 0, which the encoder's id dropout trains.
        """
        ids = rows.masked_fill(~items.known_items[rows], 0)
        bias = self.learned(dropped_ids(ids, items.id_dropout if items.training else 0.0))
        return torch.cat([vectors, (bias + self.start_N[rows][..., None]).to(vectors.dtype)], dim=-1)


class BiasedItems:
    """An item encoder whose vectors [*, D + 1] end with the item's bias; without a bias the encoder's own.

    Args:
        items: the encoder.
        bias: None = no bias.
    """

    def __init__(self, items: ItemEncoder, bias: OutputBias | None) -> None:
        self.items, self.bias = items, bias

    def __call__(self, rows: Tensor) -> Tensor:
        """float [*, D + 1] for catalogue rows [...]."""
        return self.beside(self.items(rows), rows)

    def all(self) -> Tensor:
        """float [n + 1, D + 1]."""
        return self.beside_all(self.items.all())

    def beside(self, vectors: Tensor, rows: Tensor) -> Tensor:
        """The bias of catalogue rows [...] behind their vectors [*, D]."""
        return vectors if self.bias is None else self.bias.beside(vectors, rows, self.items)

    def beside_all(self, vectors_ND: Tensor) -> Tensor:
        """The bias of every item behind its vector [n + 1, D]."""
        return self.beside(vectors_ND, torch.arange(len(vectors_ND), device=vectors_ND.device))

    def asking(self, query_PD: Tensor) -> Tensor:
        """Queries [P, D] with a 1 behind, which reads the bias: float [P, D + 1]."""
        return query_PD if self.bias is None else torch.cat([query_PD, torch.ones_like(query_PD[:, :1])], dim=1)
