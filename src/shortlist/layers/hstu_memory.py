"""What HSTU keeps of a user between two requests: keys and values of all events but the last, and all that they depend on.

Causal: those of an event depend on it, on the events before it and on the time of the next one, so a memory serves as far as a new
history is the same, whatever comes after. The last event's depend on the time of the request and are never kept.

B requests, E events end to end, T tokens end to end, F prefix tokens, k tokens of an event, L layers, H heads, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shortlist.data.jagged import Jagged
from shortlist.layers.hstu import KeysValues
from shortlist.layers.hstu_tokens import Past

COLUMNS = ("item", "acted", "value", "time", "next_time")
SAME_PREFIX = 1e-6
"""Vectors of prefix tokens that differ by no more are the same, computed in batches of different sizes."""


class Kept(NamedTuple):
    """What memories hold of a batch: keys and values of the first events of each request, prefix included."""

    num_events_B: Tensor
    """int64; 0 = nothing, not even the prefix."""
    before: list[KeysValues]
    """Per layer [tokens of those events, H, ...]."""


def kept_of(
    past: Past, prefix_BFD: Tensor, memories: Sequence[Mapping[str, Tensor] | None], per_event: int
) -> Kept | None:
    """The part of the memories that the new histories begin with; None where there is none.

    Args:
        prefix_BFD: vectors of the prefix tokens; a memory made with others is passed over.
        memories: per request as `memories_of` made them, or None.
        per_event: k.
    """
    known = [memory for memory in memories if memory is not None]
    if not known:
        return None
    device = prefix_BFD.device
    count = torch.tensor([0 if memory is None else len(memory["item"]) for memory in memories], device=device)
    item, *others = (torch.cat([memory[name] for memory in known]) for name in COLUMNS)
    most_B = past.items.lengths - 1  # the last event's output is wanted, so it is always new
    kept_B = longest_common(Jagged.from_lengths(item, count), others, past.items, _columns(past)[1:], most_B)
    num_prefix = prefix_BFD.shape[1]
    if num_prefix:
        was_BFD = torch.stack([p if m is None else m["prefix"] for m, p in zip(memories, prefix_BFD, strict=True)])
        kept_B = kept_B * (was_BFD - prefix_BFD).abs().amax((1, 2)).le(SAME_PREFIX)
    if not bool(kept_B.any()):
        return None
    num_tokens_B = torch.where(kept_B > 0, num_prefix + per_event * kept_B, 0)
    held = Jagged.from_lengths(item, torch.where(count > 0, num_prefix + per_event * count, 0))
    row_T = torch.repeat_interleave(held.lengths)
    place_T = torch.arange(len(row_T), device=device) - held.offsets[row_T]
    index = (place_T < num_tokens_B[row_T]).nonzero()[:, 0]
    keys_LTHd, values_LTHe = (
        known[0][name] if len(known) == 1 else torch.cat([memory[name] for memory in known], dim=1)
        for name in ("keys", "values")
    )
    if len(index) < len(row_T):
        keys_LTHd, values_LTHe = keys_LTHd.index_select(1, index), values_LTHe.index_select(1, index)
    return Kept(kept_B, [KeysValues(k, v) for k, v in zip(keys_LTHd, values_LTHe)])


def memories_of(
    known: Sequence[KeysValues], past: Past, prefix_BFD: Tensor, per_event: int
) -> list[Mapping[str, Tensor] | None]:
    """Per request its own copy of what is worth keeping; None below two events.

    Args:
        known: per layer keys and values of all tokens.
        past, prefix_BFD, per_event: what the tokens were made of.
    """
    keys_LTHd = torch.stack([layer.k_THd for layer in known])
    values_LTHe = torch.stack([layer.v_THe for layer in known])
    columns = dict(zip(COLUMNS, _columns(past), strict=True))
    num_prefix = prefix_BFD.shape[1]
    made: list[Mapping[str, Tensor] | None] = []
    token = 0
    for start, length, prefix_FD in zip(past.items.offsets.tolist(), past.items.lengths.tolist(), prefix_BFD):
        if length < 2:
            made.append(None)
        else:
            events, tokens = (
                slice(start, start + length - 1),
                slice(token, token + num_prefix + per_event * (length - 1)),
            )
            memory = {name: column[events].clone() for name, column in columns.items()}
            memory |= {"keys": keys_LTHd[:, tokens].clone(), "values": values_LTHe[:, tokens].clone()}
            made.append(memory | {"prefix": prefix_FD.clone()})
        token += num_prefix + per_event * length
    return made


def _columns(past: Past) -> tuple[Tensor, ...]:
    """All that keys and values of events depend on, as COLUMNS names it."""
    return past.items.values, past.acted_EA, past.value_E, past.time_E, past.next_time_E


def longest_common(
    old: Jagged, old_columns: Sequence[Tensor], new: Jagged, new_columns: Sequence[Tensor], most_B: Tensor
) -> Tensor:
    """int64 [B]: how many first values of each row are the same in both, in all columns; at most `most_B`.

    Args:
        old, new: B rows each; their values are the first column.
        old_columns, new_columns: further columns in the same order, [total, ...].
    """
    row, place = old.row_of_value, old.position_of_value
    length_B = torch.minimum(old.lengths, most_B.clamp(min=0))
    if not len(old.values) or not len(new.values):
        return torch.zeros_like(length_B)
    at = (new.offsets[row] + place).clamp(max=len(new.values) - 1)
    same = place < new.lengths[row]
    for was, now in zip((old.values, *old_columns), (new.values, *new_columns), strict=True):
        equal = was == now[at]
        same &= equal if equal.dim() == 1 else equal.all(1)
    differs = ~same
    return length_B.scatter_reduce(0, row[differs], place[differs], "amin")
