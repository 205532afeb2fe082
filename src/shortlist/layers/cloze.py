"""Masked-item training made of a next-event batch: which of a user's groups are hidden, and what stands in their place.

B users, total = all events of the whole sequences end to end, G their groups, P hidden groups, T their items end to end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from shortlist.data.batches import History, NextTargets
from shortlist.data.jagged import Jagged


class Sequences(NamedTuple):
    """Each user's inputs and, at the end, the last group, which a next-event batch only has as a target."""

    rows: Jagged
    """int64 catalogue rows [total], B rows."""
    group: Tensor
    """int64 [total]: 0..G-1, rising through the batch."""
    opens: Tensor
    """bool [total]: the first event of its group."""


class Cloze(NamedTuple):
    """Sequences with holes and what belongs there."""

    rows: Jagged
    """Catalogue rows with 0 where is_mask."""
    is_mask: Tensor
    """bool, one per value of `rows`."""
    targets: NextTargets
    """The P masks, each with all distinct items of its hidden group, weighing 1 together."""


def whole_sequences(history: History, targets: NextTargets) -> Sequences:
    """All events that a next-event batch shows or asks for. Users without a supervised position keep what is in their history."""
    items = history.items
    row_T, device = items.row_of_value, items.values.device
    user_P = row_T[targets.position]
    is_last_P = torch.ones_like(user_P, dtype=torch.bool)
    is_last_P[:-1] = user_P[1:] != user_P[:-1]
    last_P = is_last_P.nonzero()[:, 0]
    index, lengths = targets.items.where(last_P)
    last = Jagged.from_lengths(targets.items.values[index], lengths)
    owner = torch.cat([row_T, user_P[last_P][last.row_of_value]])
    order = owner.argsort(stable=True)
    opens = items.position_of_value == 0
    opens[1:] |= history.group[1:] != history.group[:-1]
    opens = torch.cat([opens, last.position_of_value == 0])[order]
    lengths_B = torch.bincount(owner, minlength=items.num_rows)
    rows = Jagged.from_lengths(torch.cat([items.values, last.values])[order].to(device), lengths_B)
    return Sequences(rows, opens.long().cumsum(0) - 1, opens)


def random_prefixes(sequences: Sequences, per_user: int, max_events: int) -> Sequences:
    """So many prefixes of each user, each ending after a random group, and of each the newest `max_events` events.

    Users without events have none: the result has at most B * per_user rows. Uses torch's global generator.
    """
    rows, device = sequences.rows, sequences.rows.values.device
    groups_B = rows.count(sequences.opens)
    user_R = (groups_B > 0).nonzero()[:, 0].repeat_interleave(per_user)
    first_B = groups_B.cumsum(0) - groups_B
    kept_R = (torch.rand(len(user_R), dtype=torch.float64, device=device) * groups_B[user_R]).long() + 1
    opening_G = nn.functional.pad(sequences.opens.nonzero()[:, 0], (0, 1), value=len(rows.values))
    stop_R = opening_G[first_B[user_R] + kept_R]
    start_R = torch.maximum(rows.offsets[:-1][user_R], stop_R - max_events)
    cut = Jagged.from_lengths(torch.empty(int((stop_R - start_R).sum()), device=device), stop_R - start_R)
    index = start_R[cut.row_of_value] + cut.position_of_value
    opens = sequences.opens[index] | (cut.position_of_value == 0)
    return Sequences(cut.with_values(rows.values[index]), opens.long().cumsum(0) - 1, opens)


def draw_segments(sequences: Sequences) -> Tensor:
    """bool [total]: a stretch of whole groups in each row, of 1 to half of them; none in rows with one group.

    Uses torch's global generator.
    """
    rows = sequences.rows
    owner_G = rows.row_of_value[sequences.opens]
    groups_B = torch.bincount(owner_G, minlength=rows.num_rows)
    chance_2B = torch.rand(2, rows.num_rows, dtype=torch.float64, device=owner_G.device)
    length_B = ((chance_2B[0] * (groups_B // 2)).long() + 1) * (groups_B > 1)
    begin_B = (chance_2B[1] * (groups_B - length_B + 1)).long() + groups_B.cumsum(0) - groups_B
    row_T = rows.row_of_value
    return (sequences.group >= begin_B[row_T]) & (sequences.group < (begin_B + length_B)[row_T])


def draw_masks(sequences: Sequences, share: float, last_share: float) -> Tensor:
    """bool [G]: groups to hide. Of each user round(share * groups), at least one and not all; or, with chance `last_share`, the last.

    Uses torch's global generator.
    """
    rows = sequences.rows
    owner_G = rows.row_of_value[sequences.opens]
    groups_B = torch.bincount(owner_G, minlength=rows.num_rows)
    start_B = groups_B.cumsum(0) - groups_B
    wanted_B = (groups_B * share).round().long().clamp(min=1)
    wanted_B = torch.minimum(wanted_B, (groups_B - 1).clamp(min=1))
    device = owner_G.device
    place_G = torch.arange(len(owner_G), device=device) - start_B[owner_G]
    # The order is random within each user and keeps users together, so the place in it is a random rank within the user.
    order = (owner_G + torch.rand(len(owner_G), dtype=torch.float64, device=device)).argsort()
    masked_G = torch.empty(len(owner_G), dtype=torch.bool, device=device)
    masked_G[order] = place_G < wanted_B[owner_G]
    only_last_B = torch.rand(rows.num_rows, device=device) < last_share
    return torch.where(only_last_B[owner_G], place_G == groups_B[owner_G] - 1, masked_G)


def hide(sequences: Sequences, masked_G: Tensor) -> Cloze:
    """Put one mask in place of each masked group [G] bool, so that neither its items nor their number show."""
    rows, group = sequences.rows, sequences.group
    is_hidden = masked_G[group]
    keep = sequences.opens | ~is_hidden
    holes = rows.with_values(rows.values.masked_fill(is_hidden, 0)).keep(keep)
    is_mask = is_hidden[keep]
    width = int(rows.values.max()) + 1 if len(rows.values) else 1
    pair = (group[is_hidden] * width + rows.values[is_hidden]).unique()
    lengths_P = torch.bincount(pair // width, minlength=len(masked_G))[masked_G]
    items = Jagged.from_lengths(pair % width, lengths_P)
    weight = (1.0 / lengths_P).repeat_interleave(lengths_P)
    return Cloze(holes, is_mask, NextTargets(position=is_mask.nonzero()[:, 0], items=items, weight=weight))


def with_mask_behind(rows: Jagged) -> tuple[Jagged, Tensor]:
    """Each row with one mask (value 0) behind its last event, as requests are asked: rows, and bool per value where the masks stand."""
    offsets = rows.offsets + torch.arange(rows.num_rows + 1, device=rows.offsets.device)
    values = rows.values.new_zeros(len(rows.values) + rows.num_rows)
    is_mask = torch.zeros_like(values, dtype=torch.bool)
    is_mask[offsets[1:] - 1] = True
    values[~is_mask] = rows.values
    return Jagged(values, offsets), is_mask
