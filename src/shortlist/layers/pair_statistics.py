"""Statistics of pairs of field values, such as a user's click rate on an item, counted on a window of the history.

B requests, t candidates end to end, P pairs = R relations, N nodes (values of the crossed fields), E events of the window or edges (pairs
that met).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from shortlist.data.batches import Batch
from shortlist.data.histories import Histories, View
from shortlist.data.schema import Space
from shortlist.errors import ConfigError
from shortlist.layers.graphs import newest_times
from shortlist.layers.id_pairs import IdPairs


class Edges(NamedTuple):
    """What the history says of pairs that met: E of them, sorted by key."""

    key: Tensor
    """int64: candidate's node * N + user's node."""
    relation: Tensor
    """int64, 0..R-1."""
    events: Tensor
    """float32: their number n."""
    target: Tensor
    """float32: the statistic a."""


class PairNodes(nn.Module):
    """The values of the crossed fields as nodes: one block of numbers per field, its value 0 (unknown) first.

    ConfigError for pairs that the log can not give, or that a view's events do not tell.
    """

    first_of_item_P: Tensor
    first_of_user_P: Tensor

    def __init__(self, space: Space, pairs: tuple[str, ...]) -> None:
        super().__init__()
        self.ids = IdPairs(space, pairs, 1)
        for pair, (_, user) in zip(pairs, self.ids.pairs, strict=True):
            if user != "user" and not user.startswith("user."):
                raise ConfigError(
                    f"pair {pair!r} crosses {user!r}; the events that statistics are counted on know items and users, "
                    "so name item or item.FIELD, then user or user.FIELD"
                )
        sizes = {
            **{c: self.ids.candidate_sizes[c] for c, _ in self.ids.pairs},
            **{u: self.ids.request_sizes[u] for _, u in self.ids.pairs},
        }
        ends = np.cumsum([size + 1 for size in sizes.values()])
        self.first = dict(zip(sizes, [0, *ends[:-1].tolist()], strict=True))
        for side, names in zip(("item", "user"), zip(*self.ids.pairs, strict=True), strict=True):
            first_P = torch.tensor([self.first[name] for name in names])
            self.register_buffer(f"first_of_{side}_P", first_P, persistent=False)
        self.num_nodes = int(ends[-1])

    def keys(self, one: Tensor, other: Tensor) -> Tensor:
        """int64: one number for each pair of nodes."""
        return one * self.num_nodes + other

    def ends(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """The two nodes of keys."""
        return key // self.num_nodes, key % self.num_nodes

    def of_items(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Nodes int64 [t, P] of catalogue rows [t], and which of them are known values."""
        values = self.ids.candidate(rows)
        value_tP = torch.stack([values[c] for c, _ in self.ids.pairs], dim=1)
        return value_tP + self.first_of_item_P, value_tP > 0

    def of_requests(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The same of requests, [B, P]."""
        values = self.ids.request(batch)
        value_BP = torch.cat([values[u].ids_BL for _, u in self.ids.pairs], dim=1)
        return value_BP + self.first_of_user_P, value_BP > 0

    def of_users(self, view: View, user_E: Tensor) -> tuple[Tensor, Tensor]:
        """The same of a view's users with the rows [E]."""
        columns = view.users.gather(user_E)
        values = [user_E if u == "user" else columns[u.removeprefix("user.")] for _, u in self.ids.pairs]
        value_EP = torch.stack(values, dim=1)  # type: ignore[arg-type]  # IdPairs lets none but single ids through
        return value_EP + self.first_of_user_P, value_EP > 0


class Counted(NamedTuple):
    """Statistics of a history window."""

    edges: Edges
    prior_P: Tensor
    """float32: the relations' means, as logits where the statistic is a rate."""
    until_U: Tensor
    """int64: until when each user's events were counted, seconds; see `history_window`."""


def count_pairs(view: View, nodes: PairNodes, clicks: tuple[str, ...], smoothing: float, share: float) -> Counted:
    """Count how often the values of each pair met in the first `share` of the view's events, and with what outcome.

    Args:
        nodes: on the CPU.
        clicks: actions that count as clicks: the statistic is (clicks + smoothing * mean) / (n + smoothing) with the mean rate of all
            events of the relation. Empty: it is log(1 + n).
    """
    events, until_U = history_window(view, share)
    one_EP, known_EP = nodes.of_items(torch.from_numpy(events.item.copy()))
    other_EP, known_user_EP = nodes.of_users(view, torch.from_numpy(events.user_of_event))
    live_EP, key_EP = known_EP & known_user_EP, nodes.keys(one_EP, other_EP)
    ids = [1 + view.space.actions.index(name) for name in clicks]
    clicked_E = torch.from_numpy(np.isin(events.action, ids)).float() if clicks else None
    found, priors = [], []
    for pair in range(live_EP.shape[1]):
        live_E = live_EP[:, pair]
        edges, prior = _edges(key_EP[live_E, pair], None if clicked_E is None else clicked_E[live_E], smoothing, pair)
        found.append(edges)
        priors.append(prior)
    columns = [torch.cat(column) for column in zip(*found, strict=True)]
    order = columns[0].argsort()
    return Counted(Edges(*(column[order] for column in columns)), torch.stack(priors), until_U)


def _edges(key_E: Tensor, clicked_E: Tensor | None, smoothing: float, relation: int) -> tuple[Edges, Tensor]:
    """Edges of one relation and its prior, from the keys and outcomes of the events."""
    key, edge_of_event, times = key_E.unique(return_inverse=True, return_counts=True)
    events, number = times.float(), torch.full_like(key, relation)
    if clicked_E is None:
        target = events.log1p()
        return Edges(key, number, events, target), target.mean() if len(target) else torch.zeros(())
    clicks = torch.zeros(len(key)).index_add(0, edge_of_event, clicked_E)
    mean = clicked_E.mean() if len(clicked_E) else torch.full((), 0.5)
    return Edges(key, number, events, (clicks + smoothing * mean) / (events + smoothing)), as_logit(mean)


def as_logit(rate: Tensor) -> Tensor:
    """Logits of rates, which are kept from 0 and 1."""
    return rate.clamp(1e-4, 1 - 1e-4).logit()


def looked_up(edges: Edges, key: Tensor, other: Tensor) -> Tensor:
    """The statistics of pairs by key, any shape; `other`, of the same shape, where a pair did not meet."""
    if not len(edges.key):
        return other
    place = torch.searchsorted(edges.key, key).clamp(max=len(edges.key) - 1)
    return torch.where(edges.key[place] == key, edges.target[place], other)


def history_window(view: View, share: float) -> tuple[Histories, Tensor]:
    """The first part of a view's events, and until when it counts for each user: int64 [users + 1] seconds.

    With a clock the part is cut at one moment for all, else at the same share of each user's own order. The whole view counts until each
    user's own newest event, so that a log that is cut per user can be learned from.
    """
    events = view.histories
    if share < 1 and view.space.has_clock and events.num_events:
        cut = int(np.quantile(events.time, share, method="lower"))
        kept = events.keep(np.asarray(events.time) <= cut)
        return kept, torch.full((view.space.num_users + 1,), cut)
    if share < 1:
        user = events.user_of_event
        first, length = events.offsets[user], np.diff(events.offsets)[user]
        events = events.keep(np.arange(events.num_events) - first < np.ceil(share * length))
    return events, newest_times(events, view.space.num_users)
