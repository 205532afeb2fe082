"""What a person's own past says of each candidate: how often, how lately, how regularly. Rankers read these numbers as pair fields.

All are counted by groups or are the same for all orders inside a group, so the sort of a basket's lines changes nothing. A candidate that
is not in the history has 0 in every field about it. This file needs torch alone.

B requests, H history events of the batch end to end, S distinct (request, item) pairs of the history, C candidates end to end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shortlist.data.batches import Batch
from shortlist.data.jagged import Jagged, segment_sum
from shortlist.data.schema import Numeric

_S_PER_DAY = 86_400
_HALF_LIFE = 30.0
"""Days (places, without a clock) after which an event counts half in pair_recent."""
_LATEST_RATIO = 20.0
_SMALL = 1e-3
_LONG, _SHORT, _RATIO = 6.0, 4.0, 3.0
"""Divisors that bring logarithms to 0..1 or little more: 400 days or events give 6, 54 groups 4, a ratio of 20 gives 3."""
_DIVISORS = torch.tensor([_SHORT, _SHORT, _LONG, _LONG, _SHORT, _LONG, _RATIO, _LONG, _SHORT])[:, None]
"""In the order in which `pair_fields` stacks what it takes logarithms of."""

PAIR_FIELDS: tuple[Numeric, ...] = tuple(
    Numeric(name=name)
    for name in (
        "pair_seen",  # 1 where the item is in the history
        "pair_times",  # its events, logarithm
        "pair_groups",  # groups it occurs in, logarithm
        "pair_share",  # its share of the events
        "pair_group_share",  # share of the groups that hold it
        "pair_since_last",  # days since it was last seen, logarithm
        "pair_since_first",  # days since it was first seen, logarithm
        "pair_recency",  # 1 / (1 + days since last seen)
        "pair_recent",  # its groups, each halved every 30 days, logarithm
        "pair_gap",  # mean days between the groups that hold it, logarithm; 0 below two groups
        "pair_due",  # days since last seen by that gap, at most 20, logarithm: 0.23 when just due; 0 below two groups
        "pair_in_last_group",  # 1 where the newest group holds it
        "pair_place",  # 1 / (1 + groups since the last one that holds it)
        "pair_history_events",  # length of the history, logarithm; the same for all candidates of a request
        "pair_history_groups",  # groups of the history, logarithm; the same for all candidates of a request
    )
)


def pair_fields(batch: Batch, rows: Jagged, *, has_clock: bool = True) -> dict[str, Tensor]:
    """The fields of PAIR_FIELDS for candidates `rows` (B rows of catalogue rows): float32 [C] each, about 0..1, always finite.

    Only the history that the batch carries is read: give the same `max_history` in training and serving.

    Args:
        has_clock: False where times are places in the user's order; "days" above are then places.
    """
    unit = float(_S_PER_DAY if has_clock else 1)
    history = batch.history
    owner_H, events_B = history.items.row_of_value, history.items.lengths
    group_H, groups_B = _group_places(history.group, history.items)

    # One line per (request, item): sorting is stable, so events of a pair stay in time order.
    width = 1 + max((int(t.max()) for t in (history.items.values, rows.values) if len(t)), default=0)
    key_H, order = torch.sort(owner_H * width + history.items.values, stable=True)
    # index_select takes a third of the time of indexing by brackets.
    time_H, group_H, owner_H = (column.index_select(0, order) for column in (history.time, group_H, owner_H))
    opens_H = _changes(key_H)
    pair_H = opens_H.cumsum(0) - 1
    first_S = opens_H.nonzero()[:, 0]
    num_pairs = len(first_S)
    last_S = torch.cat([first_S[1:], first_S.new_full((1,), len(key_H))])[:num_pairs] - 1
    # A group counts once, however many of its lines hold the item.
    fresh_H = (opens_H | _changes(group_H)).float()
    age_H = ((batch.time.index_select(0, owner_H) - time_H) / unit).clamp(min=0)
    halved_H = fresh_H * torch.exp2(-age_H / _HALF_LIFE)

    # Candidates that are not in the history find the empty line that is put behind the pairs; row 0 stands for no item.
    request_C = rows.row_of_value
    key_S = torch.cat([key_H.index_select(0, first_S), key_H.new_full((1,), torch.iinfo(torch.int64).max)])
    wanted_C = request_C * width + rows.values
    line_C = torch.searchsorted(key_S, wanted_C)
    seen_C = (key_S.index_select(0, line_C) == wanted_C) & (rows.values > 0)
    line_C = torch.where(seen_C, line_C, num_pairs)

    line_6S = torch.zeros(6, num_pairs + 1, device=age_H.device)
    line_6S[0, :num_pairs] = torch.bincount(pair_H, minlength=num_pairs)
    line_6S[1].index_add_(0, pair_H, fresh_H)
    line_6S[2].index_add_(0, pair_H, halved_H)
    line_6S[3, :num_pairs] = age_H.index_select(0, last_S)
    line_6S[4, :num_pairs] = age_H.index_select(0, first_S)
    line_6S[5, :num_pairs] = group_H.index_select(0, last_S)
    times, groups, recent, since_last, since_first, last_group = line_6S.index_select(1, line_C).unbind()
    events, all_groups = torch.stack([events_B, groups_B]).float().index_select(1, request_C).unbind()

    seen = seen_C.float()
    groups_after = seen * (all_groups - 1 - last_group)
    several = (groups >= 2).float()
    gap = several * (since_first - since_last) / (groups - 1).clamp(min=1)
    due = several * (since_last / gap.clamp(min=_SMALL)).clamp(max=_LATEST_RATIO)
    counts = torch.stack([times, groups, since_last, since_first, recent, gap, due, events, all_groups])
    logs = counts.log1p() / _DIVISORS.to(counts.device)
    log_times, log_groups, log_last, log_first, log_recent, log_gap, log_due, log_events, log_all = logs.unbind()
    columns = (
        seen,
        log_times,
        log_groups,
        times / events.clamp(min=1),
        groups / all_groups.clamp(min=1),
        log_last,
        log_first,
        seen / (1 + since_last),
        log_recent,
        log_gap,
        log_due,
        seen * (groups_after == 0),
        seen / (1 + groups_after),
        log_events,
        log_all,
    )
    return {field.name: column for field, column in zip(PAIR_FIELDS, columns, strict=True)}


def _group_places(group_H: Tensor, items: Jagged) -> tuple[Tensor, Tensor]:
    """Place of each event's group in its row, oldest 0 [H], and the number of groups per row [B]; int64."""
    opens_H = _changes(group_H) | (items.position_of_value == 0)
    counted_H = opens_H.cumsum(0)
    groups_B = segment_sum(opens_H.long(), items.row_of_value, items.num_rows)
    before_B = groups_B.cumsum(0) - groups_B
    return counted_H - 1 - before_B[items.row_of_value], groups_B


def _changes(values: Tensor) -> Tensor:
    """True [n] where a value differs from the one before it, and at the start."""
    return torch.cat([values.new_ones(min(len(values), 1), dtype=torch.bool), values[1:] != values[:-1]])
