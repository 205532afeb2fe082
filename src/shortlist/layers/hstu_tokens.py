"""A user's past as the tokens that HSTU reads: what was met and what was done with it, in one token or in two that alternate.

    merged         [prefix] (Φ_0 + a_0) (Φ_1 + a_1) ...       a candidate is Φ + a learned placeholder for what is not known yet
    interleaved    [prefix]  Φ_0   a_0   Φ_1   a_1  ...       a candidate is Φ

Zhai et al., ICML 2024, section 2 (features and tasks as sequences); action bits and absolute times as in the authors' ranking example.
An event is an item of one group with all that was done to it there. Events stand by group, then by item, so that the order of lines
inside a group, which may be a sort, is never read.

B requests, h history entries of a batch, G groups, E events, T tokens, F prefix tokens of a request, A actions, k tokens of an event
(1 or 2), D width; all of a batch end to end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from shortlist.data.batches import History
from shortlist.data.jagged import Jagged, segment_sum
from shortlist.data.schema import Categorical, Column, Field, Vector
from shortlist.data.schema import Sequence as SequenceField
from shortlist.kernels.hstu_attention import Sequences

TokenLayout = Literal["merged", "interleaved"]
BIT_DIM = 8
"""Width of the vector for one action that was done, or was not."""
NUM_TO_REQUEST = 2_048
"""Buckets of the root of the minutes up to the request: eight years."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Past:
    """Events of B requests, oldest first."""

    items: Jagged
    """int64 [E] catalogue rows."""
    acted_EA: Tensor
    """bool: what was done; nothing where the action is unknown."""
    value_E: Tensor
    """float32: worth, summed over the entries of the event."""
    time_E: Tensor
    """int64 seconds."""
    next_time_E: Tensor
    """int64 seconds: of the next event, for the last one the request's."""
    opens_group_E: Tensor
    """bool: the first event of its group, so that all events before it were over."""
    last_of_group_h: Tensor
    """int64: per entry of the history the last event of its group."""

    @property
    def num_requests(self) -> int:
        """B."""
        return self.items.num_rows


def past_of(history: History, time_B: Tensor, num_actions: int, *, reads_time: bool = True) -> Past:
    """Events of a history.

    Args:
        time_B: int64 seconds of the requests.
        num_actions: A.
        reads_time: False = all times are 0, for a log without a clock.
    """
    rows, group_h = history.items, history.group
    row_h = rows.row_of_value
    opens_h = rows.position_of_value == 0
    opens_h[1:] |= group_h[1:] != group_h[:-1]
    number_h = opens_h.cumsum(0) - 1
    width = int(rows.values.max()) + 1 if len(rows.values) else 1
    key_E, event_h = torch.unique(number_h * width + rows.values, return_inverse=True)
    number_E, item_E = key_E // width, key_E % width

    acted_EA = torch.zeros(len(key_E), num_actions, dtype=torch.bool, device=item_E.device)
    known_h = history.action > 0
    acted_EA[event_h[known_h], history.action[known_h] - 1] = True
    items = Jagged.from_lengths(item_E, torch.bincount(row_h[opens_h][number_E], minlength=rows.num_rows))
    time_E, next_time_E = torch.zeros_like(item_E), torch.zeros_like(item_E)
    if reads_time:
        time_E = history.time[opens_h][number_E]
        has_any_B = items.lengths > 0
        next_time_E[:-1] = time_E[1:]
        next_time_E[items.offsets[1:][has_any_B] - 1] = time_B[has_any_B]
    events_of_G = torch.bincount(number_E, minlength=int(opens_h.sum()))
    return Past(
        items=items,
        acted_EA=acted_EA,
        value_E=segment_sum(history.value, event_h, len(key_E)),
        time_E=time_E,
        next_time_E=next_time_E,
        opens_group_E=number_E != torch.cat([number_E.new_full((1,), -1), number_E])[:-1],
        last_of_group_h=(events_of_G.cumsum(0) - 1)[number_h],
    )


class Layout(NamedTuple):
    """Where each token of B requests comes from, and when it is."""

    offsets_B1: Tensor
    """int64: cuts of the tokens."""
    row_T: Tensor
    """int64: the request of each token."""
    event_T: Tensor
    """int64 index of the token's event; -1 for a prefix token."""
    position_T: Tensor
    """int64 place in the sequence, from 0."""
    key_time_T: Tensor
    """int64 seconds; 0 for a prefix token."""
    query_time_T: Tensor
    """int64 seconds: what a token is asked about: the moment itself where an outcome is predicted, then the next event's."""

    @property
    def lengths_B(self) -> Tensor:
        """Tokens per request."""
        return self.offsets_B1.diff()


def layout_of(past: Past, per_event: int, num_prefix: int) -> Layout:
    """Tokens of each request: `num_prefix` first, then `per_event` for every event."""
    rows = past.items
    tokens = Jagged.from_lengths(rows.values, num_prefix + per_event * rows.lengths)
    total = int(tokens.offsets[-1])
    row_T = torch.repeat_interleave(torch.arange(rows.num_rows, device=rows.offsets.device), tokens.lengths)
    position_T = torch.arange(total, device=row_T.device) - tokens.offsets[row_T]
    place_T = position_T - num_prefix
    is_event_T = place_T >= 0
    event_T = torch.where(is_event_T, rows.offsets[row_T] + place_T.div(per_event, rounding_mode="floor"), -1)

    def of_event(values_E: Tensor) -> Tensor:
        padded = torch.cat([values_E, values_E.new_zeros(1)])  # -1 finds the zero behind the events
        return padded[event_T]

    ends_event_T = (place_T % per_event) == per_event - 1
    key_time_T = of_event(past.time_E)
    query_time_T = torch.where(ends_event_T, of_event(past.next_time_E), key_time_T)
    return Layout(tokens.offsets, row_T, event_T, position_T, key_time_T, query_time_T)


def content_token(past: Past, layout: Layout, per_event: int, num_prefix: int) -> Tensor:
    """int64 [E]: the first token of each event, the one with its item."""
    row_E = past.items.row_of_value
    return layout.offsets_B1[row_E] + num_prefix + per_event * past.items.position_of_value


def sequences_of(layout: Layout, is_new_T: Tensor) -> Sequences:
    """What attention must know of histories of which only some tokens, each row's last ones, are asked."""
    num_new_B = torch.bincount(layout.row_T[is_new_T], minlength=len(layout.lengths_B))
    return Sequences(
        offsets=layout.offsets_B1,
        query_offsets=torch.cat([num_new_B.new_zeros(1), num_new_B.cumsum(0)]),
        num_history=layout.lengths_B,
        position=layout.position_T,
        key_time=layout.key_time_T,
        query_time=layout.query_time_T[is_new_T],
    )


def joined(first: Jagged, second: Jagged) -> Jagged:
    """Row by row the first's values, then the second's."""
    at_first = torch.arange(len(first.values), device=first.offsets.device) + second.offsets[first.row_of_value]
    at_second = torch.arange(len(second.values), device=first.offsets.device) + first.offsets[second.row_of_value + 1]
    values = torch.cat([first.values, second.values])
    out = torch.empty_like(values)
    out[torch.cat([at_first, at_second])] = values
    return Jagged(out, first.offsets + second.offsets)


class ActionEncoder(nn.Module):
    """What was done with an item, any number of actions, as one vector: each action's bit by a vector, end to end, then an MLP."""

    def __init__(self, num_actions: int, dim: int) -> None:
        super().__init__()
        self.bits = nn.Parameter(torch.randn(num_actions, 2, BIT_DIM))
        self.hidden = nn.Linear(num_actions * BIT_DIM, dim)
        self.out = nn.Linear(dim, dim)
        # As small as item vectors begin: larger ones would drown them in the layers' norms.
        nn.init.normal_(self.out.weight, std=0.02)
        nn.init.zeros_(self.out.bias)

    def forward(self, acted_EA: Tensor) -> Tensor:
        """float32 [E, D] for bool [E, A]."""
        bit_EAb = torch.where(acted_EA[:, :, None], self.bits[:, 1], self.bits[:, 0])
        return self.out(silu(self.hidden(bit_EAb.flatten(1))))


class EventTokens(nn.Module):
    """Vectors of tokens from vectors of items.

    Args:
        num_actions: A.
        dim: D.
        layout: merged or interleaved.
        num_value_buckets: doublings of an event's worth that are told apart; 0 = the worth is not read.
    """

    def __init__(self, num_actions: int, dim: int, layout: TokenLayout, num_value_buckets: int = 0) -> None:
        super().__init__()
        self.scale = dim**0.5
        self.per_event = 2 if layout == "interleaved" else 1
        self.actions = ActionEncoder(num_actions, dim)
        self.values = nn.Embedding(num_value_buckets, dim) if num_value_buckets else None
        self.unknown = nn.Parameter(torch.zeros(dim)) if layout == "merged" else None
        if self.values is not None:
            nn.init.normal_(self.values.weight, std=0.02)

    def events(self, item_ED: Tensor, acted_EA: Tensor, value_E: Tensor) -> Tensor:
        """float32 [k E, D]: the tokens of events in their order."""
        action_ED = self.actions(acted_EA)
        if self.values is not None:
            bucket_E = torch.log2(1 + value_E.abs()).long().clamp(max=self.values.num_embeddings - 1)
            action_ED = action_ED + self.values(bucket_E)
        if self.per_event == 1:
            return self.scale * item_ED + action_ED
        return torch.stack([self.scale * item_ED, action_ED], dim=1).flatten(0, 1)

    def candidates(self, item_tD: Tensor) -> Tensor:
        """float32 [t, D]: tokens of items with which nothing has been done yet."""
        token_tD = self.scale * item_tD
        return token_tD if self.unknown is None else token_tD + self.unknown


class RequestMarks(nn.Module):
    """How far a token is from the request, as vectors to add: places back from the candidates, which are all at 0, and minutes.

    They change with every request, so keys and values of a history can not be kept between requests.

    Args:
        num_places: tokens at most, candidates included; 0 = places are not read.
        reads_time: whether minutes are.
    """

    def __init__(self, dim: int, num_places: int, *, reads_time: bool) -> None:
        super().__init__()
        self.places = nn.Embedding(num_places, dim) if num_places else None
        self.minutes = nn.Embedding(NUM_TO_REQUEST, dim) if reads_time else None
        for table in filter(None, (self.places, self.minutes)):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, x_TD: Tensor, places_T: Tensor, seconds_T: Tensor) -> Tensor:
        """float32 [T, D] for places and seconds back from the request, int64 [T] each."""
        if self.places is not None:
            x_TD = x_TD + self.places(places_T)
        if self.minutes is not None:
            root_T = (seconds_T.clamp(min=0).to(torch.float64) / 60).sqrt().long()
            x_TD = x_TD + self.minutes(root_T.clamp(max=NUM_TO_REQUEST - 1))
        return x_TD


class TimeOfDay(nn.Module):
    """Hour of the day and day of the week (UTC) of the moment that is asked about, beside an output vector."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Linear(dim + 4, dim)

    def forward(self, y_tD: Tensor, time_t: Tensor) -> Tensor:
        """float32 [t, D] for seconds, int64 [t]."""
        turns = [(time_t % period).to(y_tD.dtype) * (2 * math.pi / period) for period in (86_400, 7 * 86_400)]
        return self.mix(torch.cat([y_tD, torch.stack([f(a) for a in turns for f in (torch.sin, torch.cos)], dim=1)], 1))


def unknown_columns(fields: Sequence[Field], num_rows: int, device: torch.device) -> dict[str, Column]:
    """Columns [num_rows, ...] that say of every field that it is not known, as a past moment's context."""

    def of(field: Field) -> Column:
        zeros = partial(torch.zeros, device=device)
        match field:
            case Categorical():
                return zeros(num_rows, dtype=torch.int64)
            case SequenceField():
                return Jagged(zeros(0, dtype=torch.int64), zeros(num_rows + 1, dtype=torch.int64))
            case Vector():
                return zeros(num_rows, field.dim)
            case _:
                return zeros(num_rows)

    return {field.name: of(field) for field in fields}
