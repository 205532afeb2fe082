"""Pairs of ids, one of the candidate and one of the request: what explicit crosses and co-action units are made from.

    item*history                  the candidate with each past item
    item.genre*history.genre      an item field with the same field of each past item
    item*user, item*context.hour  the candidate with an id of the request

The names are those of layers/field_matrix.py; fields must be categorical.

B requests, t candidates end to end, L ids of a request (1, or the longest past), M pairs, K rows of a dictionary, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shortlist.data.batches import Batch
from shortlist.data.schema import Categorical, Field, Space
from shortlist.embeddings.base import Table, TableChoice, make_table
from shortlist.errors import ConfigError
from shortlist.layers.field_matrix import ItemColumns
from shortlist.registry import nearest


class RequestIds(NamedTuple):
    """Ids of the requests under one name."""

    ids_BL: Tensor
    """int64, 0 = unknown or padding."""
    is_real_BL: Tensor
    """bool."""


class IdPairs(nn.Module):
    """The ids of named pairs; an item without training events has the unknown id 0.

    ConfigError for a pair that is not "candidate*request", or names what the log lacks or what is no single id.
    """

    known_items: Tensor

    def __init__(self, space: Space, pairs: Sequence[str], max_history: int) -> None:
        super().__init__()
        own = _ids(space.items.fields)
        self.candidate_sizes = {"item": space.num_items, **{f"item.{name}": size for name, size in own.items()}}
        self.request_sizes = {
            "user": space.num_users,
            **{f"user.{name}": size for name, size in _ids(space.user_fields).items()},
            **{f"context.{name}": size for name, size in _ids(space.context_fields).items()},
            "history": space.num_items,
            **{f"history.{name}": size for name, size in own.items()},
        }
        self.pairs = [self._parsed(pair) for pair in pairs]
        self.max_history = max_history
        names = {
            name.partition(".")[2] for pair in self.pairs for name in pair if name.startswith(("item.", "history."))
        }
        self.columns = ItemColumns(space, [f for f in space.items.fields if f.name in names])
        self.register_buffer("known_items", space.known_items, persistent=False)

    def _parsed(self, pair: str) -> tuple[str, str]:
        candidate, star, request = pair.partition("*")
        for name, offered in ((candidate, self.candidate_sizes), (request, self.request_sizes)):
            if not star or name not in offered:
                raise ConfigError(
                    f"pair {pair!r}: write it as CANDIDATE*REQUEST, such as item*history; {name!r} is not among the ids of "
                    f"that side: {nearest(name, list(offered))}"
                )
        return candidate, request

    def candidate(self, rows: Tensor) -> dict[str, Tensor]:
        """int64 [t] by name, for catalogue rows [t]."""
        return {name: self._of_items(name, rows) for name in dict.fromkeys(candidate for candidate, _ in self.pairs)}

    def request(self, batch: Batch) -> dict[str, RequestIds]:
        """By name; ids of the past oldest first, padded to the longest."""
        made = {}
        for name in dict.fromkeys(request for _, request in self.pairs):
            if name.startswith("history"):
                items = batch.history.last(self.max_history).items
                ids = self._of_items(name, items.values)
                made[name] = RequestIds(*items.with_values(ids).padded())
            else:
                side, _, field = name.partition(".")
                column = (
                    batch.user if name == "user" else (batch.user_fields if side == "user" else batch.context)[field]
                )
                assert isinstance(column, Tensor)
                made[name] = RequestIds(column[:, None], torch.ones_like(column, dtype=torch.bool)[:, None])
        return made

    def _of_items(self, name: str, rows: Tensor) -> Tensor:
        field = name.partition(".")[2]
        if not field:
            return rows.masked_fill(~self.known_items[rows], 0)
        column = self.columns.column(field, rows)
        assert isinstance(column, Tensor)
        return column


def _ids(fields: Iterable[Field]) -> dict[str, int]:
    return {f.name: f.size for f in fields if isinstance(f, Categorical)}


class CrossTable(nn.Module):
    """Cartesian crosses: one vector per pair of ids that occurs in training, and one for all others.

    A request with several ids, as a past has, gives the sum of its pairs' vectors.

    Args:
        ids: the M pairs.
        dim: D.
        num_rows: K, pairs kept at most, the most frequent ones of all M together; the table has K + 1 rows from the start.
        sparse: see TableChoice.
    """

    keys_K: Tensor

    def __init__(self, ids: IdPairs, dim: int, num_rows: int, *, sparse: bool = False) -> None:
        super().__init__()
        self.num_rows, self.dim = num_rows, dim
        self.steps = [ids.request_sizes[request] + 1 for _, request in ids.pairs]
        widths = [(ids.candidate_sizes[c] + 1) * step for (c, _), step in zip(ids.pairs, self.steps, strict=True)]
        self.first = [sum(widths[:m]) for m in range(len(widths))]
        self.table: Table = make_table(num_rows + 1, dim, TableChoice(sparse=sparse))
        self.register_buffer("keys_K", torch.zeros(0, dtype=torch.int64))

    def key(self, pair: int, candidate_t: Tensor, request_tL: Tensor) -> Tensor:
        """int64 [t, L]: a number for each pair of ids, different for different ones of any of the M pairs."""
        return self.first[pair] + candidate_t[:, None] * self.steps[pair] + request_tL

    def learn(self, keys: Iterable[Tensor]) -> None:
        """Make the dictionary from the keys of training, int64 [n] each; a dictionary that is there stays, so that rows keep meaning."""
        if len(self.keys_K):
            return
        found, count = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        for part in keys:
            new, times = part.cpu().unique(return_counts=True)
            found, place = torch.cat([found, new]).unique(return_inverse=True)
            count = torch.zeros(len(found), dtype=torch.int64).index_add(0, place, torch.cat([count, times]))
        kept = count.sort(descending=True, stable=True).indices[: self.num_rows]
        self.keys_K = found[kept].sort().values.to(self.keys_K.device)

    @property
    def num_used(self) -> int:
        """Numbers of the table that a known pair reads, and the default row's: what the crosses cost to store."""
        return (len(self.keys_K) + 1) * self.dim

    def rows(self, key: Tensor) -> Tensor:
        """int64: rows of the table for keys of any shape, 0 for pairs that training did not have."""
        if not len(self.keys_K):
            return torch.zeros_like(key)
        place = torch.searchsorted(self.keys_K, key).clamp(max=len(self.keys_K) - 1)
        return torch.where(self.keys_K[place] == key, place + 1, 0)

    def forward(self, key_tL: Tensor, is_real_tL: Tensor) -> Tensor:
        """float32 [t, D]: the sum of the vectors of the real pairs."""
        return (self.table(self.rows(key_tL)) * is_real_tL[:, :, None]).sum(1)
