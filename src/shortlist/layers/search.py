"""What rankers of long histories share: pasts as vectors, a search of them for each candidate, hashes, and attention to what was found.

B requests, C most candidates of a request, t candidates end to end, E past events of the batch end to end, L most of a request, K events
chosen per candidate, D width of a vector, H heads, d = D / H, m bits of a hash, W 64-bit words that hold them, G signatures of an event.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from shortlist.data.batches import Batch, History
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Categorical, Space
from shortlist.data.schema import Sequence as SequenceField
from shortlist.embeddings.base import TableChoice
from shortlist.errors import ConfigError
from shortlist.layers.fields import ItemEncoder
from shortlist.layers.scoring import EventMarks, HeadConfig, Recency, linear_flops

WORD = 64
ROWS_AT_ONCE = 65_536


class KeptRows(nn.Module):
    """What depends on an item's row alone, computed for the whole catalogue once and looked up until training goes on.

    Only outside training and where no gradient is wanted; else it is computed for the rows that are asked for.
    """

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.num_rows = num_rows
        self._kept: Tensor | None = None

    def train(self, mode: bool = True) -> KeptRows:
        """As nn.Module; what was kept is dropped, since weights may change."""
        self._kept = None
        return super().train(mode)

    def forward(self, rows: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """`compute(rows)` for catalogue rows [n] int64: [n, ...]."""
        if self.training or torch.is_grad_enabled():
            return compute(rows)
        if self._kept is None or self._kept.device != rows.device:
            every = torch.arange(self.num_rows, device=rows.device)
            self._kept = torch.cat([compute(part) for part in every.split(ROWS_AT_ONCE)])
        return self._kept.index_select(0, rows)


class Past(NamedTuple):
    """The events that a request may be answered from, oldest first."""

    items: Jagged
    """int64 catalogue rows."""
    item_ED: Tensor
    """Vectors of the items, as a candidate of that item has it."""
    event_ED: Tensor
    """The same with the events' marks: action and age."""

    def newest(self, count: int) -> Chosen:
        """The newest events of each request, as if each had one candidate: [B, count]."""
        stop_B = self.items.offsets[1:]
        place_BK = stop_B[:, None] - 1 - torch.arange(min(count, self.longest), device=stop_B.device)
        is_real_BK = place_BK >= self.items.offsets[:-1, None]
        return Chosen(place_BK.masked_fill(~is_real_BK, 0), is_real_BK)

    @property
    def longest(self) -> int:
        """L; 0 where nobody has a past."""
        return int(self.items.lengths.max()) if len(self.items.values) else 0


class Chosen(NamedTuple):
    """Past events that matter for each candidate."""

    event: Tensor
    """int64 [t, K]: place among the batch's events; 0 where there is none."""
    is_real: Tensor
    """bool [t, K]."""

    def select(self, row_n: Tensor) -> Chosen:
        """Those of the given rows [n]."""
        return Chosen(self.event.index_select(0, row_n), self.is_real.index_select(0, row_n))


@dataclass(frozen=True, kw_only=True, slots=True)
class LongHistoryConfig:
    """Settings that rankers of long pasts share."""

    dim: int = 32
    """Width of one embedding."""
    num_heads: int = 2
    """Heads of the attentions; a divisor of dim."""
    short_history: int = 20
    """Newest events read whole, beside what is made of the long past."""
    max_history: int = 1_000
    """Newest events read per request."""
    ages: bool = True
    """Read the time from an event to the request."""
    use_ids: bool = True
    """Read the items' own id rows; False leaves only their fields."""
    id_dropout: float = 0.05
    """Share of id rows replaced by the unknown row in training, so that new items have one that is trained."""
    pairs_at_once: int = 1_000_000
    """Pairs of candidate and event in memory at a time; training holds all of a batch's chosen ones for its gradient."""
    head: HeadConfig = HeadConfig()  # noqa: RUF009  (frozen)
    """The tower."""
    table: TableChoice = TableChoice()  # noqa: RUF009  (frozen)
    """Which table holds the id rows."""

    def check(self, system: str, at_least: Mapping[str, int] | None = None) -> None:
        """Raises ConfigError, in the name of `system`, where a number is out of range; `at_least` bounds the system's own numbers."""
        shared = dict.fromkeys(("dim", "num_heads", "short_history", "max_history", "pairs_at_once"), 1)
        for name, least in {**shared, **(at_least or {})}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{system}: {name} must be at least {least}, got {getattr(self, name)}")
        if self.dim % self.num_heads:
            raise ConfigError(
                f"{system}: dim must be a multiple of num_heads, got dim {self.dim} and num_heads {self.num_heads}"
            )
        if not 0 <= self.id_dropout < 1:
            raise ConfigError(f"{system}: id_dropout must be from 0 to below 1, got {self.id_dropout}")
        self.head.check(system)


class PastEncoder(nn.Module):
    """Items and past events as vectors.

    Ages are powers of two of hours, or places from the end where the log has no clock.
    """

    def __init__(self, space: Space, config: LongHistoryConfig) -> None:
        super().__init__()
        readable = space if config.use_ids else replace(space, known_items=torch.zeros_like(space.known_items))
        self.items = ItemEncoder(readable, config.dim, id_dropout=config.id_dropout, table=config.table)
        recency: Recency = "none" if not config.ages else "gap" if space.has_clock else "position"
        self.marks = EventMarks(space, config.dim, recency)
        self.kept = KeptRows(space.num_items + 1)

    def forward(self, rows: Tensor) -> Tensor:
        """float32 [n, D] for catalogue rows [n] int64."""
        return self.kept(rows, self.items)

    def past(self, batch: Batch, max_history: int) -> Past:
        """The newest `max_history` events of each request."""
        history = batch.history.last(max_history)
        item_ED = self(history.items.values)
        return Past(history.items, item_ED, self.marks(item_ED, history, batch.time))

    @property
    def flops(self) -> int:
        """Of one item's vector, where it is not kept."""
        return linear_flops(self.items)


class TargetAttention(nn.Module):
    """Each candidate attends to the events chosen for it, with several heads (SIM's exact search unit, ETA's MHTA).

    head_h = sum_j softmax_j(W_q e_a . W_k z_j / sqrt(d)) z_j, and W_v z_j for z_j with `value_map`. No event is projected: W_k' W_q e_a
    is made once per candidate, and the values' map acts on what was mixed, which is the same since both are linear.

    Args:
        dim: D, a multiple of num_heads.
        value_map: map values, output [t, D]; without it the heads' mixes stand end to end, [t, H D].
    """

    def __init__(self, dim: int, num_heads: int, *, value_map: bool = True) -> None:
        super().__init__()
        self.num_heads, self.width = num_heads, dim // num_heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False) if value_map else None
        self.out_width = dim if value_map else num_heads * dim
        for linear in filter(None, (self.query, self.key, self.value)):
            nn.init.eye_(linear.weight)  # begins as likeness of the vectors themselves
        self.candidate_flops = 4 * dim * dim + (2 * dim * dim if value_map else 0)
        self.pair_flops = 4 * num_heads * dim

    def forward(self, item_tD: Tensor, event_ED: Tensor, chosen: Chosen) -> Tensor:
        """float32 [t, out_width]; 0 where nothing is chosen."""
        event_tKD = gathered(event_ED, chosen)
        query_tHd = self.query(item_tD).unflatten(1, (self.num_heads, self.width))
        key_HdD = self.key.weight.unflatten(0, (self.num_heads, self.width))
        query_tHD = torch.einsum("thd,hdD->thD", query_tHd, key_HdD)
        logit_tHK = query_tHD @ event_tKD.transpose(1, 2) / self.width**0.5
        mixed_tHD = masked_softmax(logit_tHK, chosen.is_real[:, None]) @ event_tKD
        return mapped_values(mixed_tHD, self.value)

    def plain(self, item_tD: Tensor, event_ED: Tensor, chosen: Chosen) -> Tensor:
        """The same candidate by candidate and head by head, by the formula as it stands: the reference of tests."""
        rows = []
        for item_D, event_K, is_real_K in zip(item_tD, *chosen):
            z_KD = event_ED[event_K[is_real_K]]
            q_Hd = self.query(item_D).view(self.num_heads, -1)
            k_KHd = self.key(z_KD).view(-1, self.num_heads, self.width)
            v_KHx = (z_KD if self.value is None else self.value(z_KD))[:, None]
            v_KHx = v_KHx.expand(-1, self.num_heads, -1) if self.value is None else v_KHx.view_as(k_KHd)
            heads = []
            for h in range(self.num_heads):
                weight_K = (k_KHd[:, h] @ q_Hd[h] / self.width**0.5).softmax(0)
                heads.append(weight_K @ v_KHx[:, h])
            rows.append(torch.cat(heads))
        return torch.stack(rows)


def attend(
    attention: Callable[[Tensor, Tensor, Chosen], Tensor],
    item_tD: Tensor,
    event_ED: Tensor,
    chosen: Chosen,
    pairs_at_once: int | None,
) -> Tensor:
    """`attention(item_tD, event_ED, chosen)` in slices of candidates that hold at most so many pairs; None = at once."""
    if pairs_at_once is None or chosen.event.numel() <= pairs_at_once:
        return attention(item_tD, event_ED, chosen)
    step = max(pairs_at_once // chosen.event.shape[1], 1)
    slices = zip(item_tD.split(step), chosen.event.split(step), chosen.is_real.split(step))
    return torch.cat([attention(item, event_ED, Chosen(event, is_real)) for item, event, is_real in slices])


def gathered(event_ED: Tensor, chosen: Chosen) -> Tensor:
    """Vectors of the chosen events, [t, K, D]."""
    return event_ED.index_select(0, chosen.event.flatten()).view(*chosen.event.shape, event_ED.shape[1])


def masked_softmax(logit: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last dimension where the mask is True; 0 elsewhere, and everywhere where nothing is."""
    # The lowest finite number, not -inf: a softmax over nothing must not make NaN.
    weight = logit.masked_fill(~mask, torch.finfo(logit.dtype).min).softmax(-1)
    return weight.masked_fill(~mask, 0)


def mapped_values(mixed_tHD: Tensor, value: nn.Linear | None) -> Tensor:
    """Heads' mixes [t, H, D] end to end: each through its own d rows of the values' map, [t, D], or as they are, [t, H D]."""
    if value is None:
        return mixed_tHD.flatten(1)
    value_HdD = value.weight.unflatten(0, (mixed_tHD.shape[1], -1))
    return torch.einsum("thD,hdD->thd", mixed_tHD, value_HdD).flatten(1)


def crossed(item_tD: Tensor, *found: Tensor) -> Tensor:
    """What the tower reads: the candidate, what was found for it, [t, n D] each, and the products of the two."""
    parts = [item_tD]
    for found_tX in found:
        parts += [found_tX, found_tX * item_tD.repeat(1, found_tX.shape[1] // item_tD.shape[1])]
    return torch.cat(parts, dim=1)


def crossed_width(dim: int, *found: int) -> int:
    """Width of `crossed`."""
    return dim + 2 * sum(found)


# -- search -------------------------------------------------------------------------------------------------------------------------------


class Relevance(Protocol):
    """How much each past event matters for each candidate, for one slice of candidates."""

    def __call__(self, first: int, stop: int) -> Tensor:
        """[B, stop - first, L], any integer or float type; higher is better. Read where there is an event and a candidate."""


def search(
    relevance: Relevance, past: Jagged, candidates: Jagged, k: int, *, pairs_at_once: int, pick: Picker | None = None
) -> Chosen:
    """The k most relevant past events of each candidate's request, the newer one first among equals.

    Args:
        relevance: of one slice of the C columns; never more than `pairs_at_once` pairs are asked for, padding included (with at least
            one candidate of every request). No gradient passes.
        past: B rows; only its offsets are read.
        candidates: B rows; only its offsets are read.
        pick: how a slice's [B, c, L] relevance becomes places; None = the k highest.
    """
    longest = int(past.lengths.max()) if len(past.values) else 0
    most = int(candidates.lengths.max()) if len(candidates.values) else 0
    k = min(k, longest)
    device = past.offsets.device
    is_item_BC = torch.arange(most, device=device) < candidates.lengths[:, None]
    if not k or not most:
        none = torch.zeros(len(candidates.values), k, dtype=torch.int64, device=device)
        return Chosen(none, none.bool())
    is_real_BL = torch.arange(longest, device=device) < past.lengths[:, None]
    step = max(pairs_at_once // is_real_BL.numel(), 1)
    pick = pick or highest
    with torch.no_grad():
        places = [
            pick(relevance(first, min(first + step, most)), is_real_BL[:, None], k) for first in range(0, most, step)
        ]
    place_tK = torch.cat(places, dim=1)[is_item_BC]
    row_t = candidates.row_of_value
    is_real_tK = is_real_BL[row_t].gather(1, place_tK)
    event_tK = (place_tK + past.offsets[row_t][:, None]).masked_fill(~is_real_tK, 0)
    return Chosen(event_tK, is_real_tK)


Picker = Callable[[Tensor, Tensor, int], Tensor]
"""Relevance [B, c, L] (or [B, c, H, L]), mask [B, 1, L] of real events and k -> places [B, c, k] int64, real ones first."""


def highest(relevance_BCL: Tensor, is_real_B1L: Tensor, k: int) -> Tensor:
    """Places [.., k] of the highest relevance; of equals the last, which is the newest."""
    return sort_keys(relevance_BCL, is_real_B1L).topk(k, dim=-1).indices


def sort_keys(relevance: Tensor, mask: Tensor) -> Tensor:
    """int64 [.., L], all distinct where the mask is True: relevance in the upper 32 bits, place in the lower; the least where False.

    Floats are rounded to 32 bits and read as integers of the same order.
    """
    if relevance.is_floating_point():
        bits = (relevance.float() + 0.0).view(torch.int32)  # + 0.0 makes -0 a 0
        relevance = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    place_L = torch.arange(relevance.shape[-1], device=relevance.device)
    return ((relevance.long() << 32) + place_L).masked_fill(~mask, torch.iinfo(torch.int64).min)


# -- attributes ---------------------------------------------------------------------------------------------------------------------------


def item_attribute(space: Space, name: str) -> tuple[Tensor, int]:
    """What a hard search compares: an id per item [n + 1] int64, 0 where it has none, and the number of ids (0 counted).

    Args:
        name: a categorical field; a sequence field, of which an item's first entry counts; "item" for the item itself; "auto" for the first
            categorical field, else the first sequence field, else the item.

    Raises ConfigError for a name that no such field has.
    """
    fields = {f.name: f for f in space.items.fields if isinstance(f, Categorical | SequenceField)}
    if name == "auto":
        name = next(iter(sorted(fields, key=lambda n: not isinstance(fields[n], Categorical))), "item")
    if name in fields:
        column = space.items.columns[name]
        if isinstance(column, Jagged):
            first = column.values.new_zeros(column.num_rows)
            filled = column.lengths > 0
            first[filled] = column.values[column.offsets[:-1][filled]]
            column = first
        return column.long(), fields[name].size + 1
    if name != "item":
        raise ConfigError(
            f"no categorical or sequence field of items is called {name!r}; choose from {['item', *fields]} or 'auto'"
        )
    return torch.arange(space.num_items + 1), space.num_items + 1


class BehaviourIndex(NamedTuple):
    """Events sorted by (row, attribute), oldest first within each: the inverted index of a hard search.

    A row is a request of a batch, or a user of a whole log; the two tensors may be memory maps.
    """

    key: Tensor
    """int64 [E], rising: row * num_attributes + attribute."""
    event: Tensor
    """int64 [E]: place of the event."""
    num_attributes: int

    @classmethod
    def of(cls, row_E: Tensor, attribute_E: Tensor, num_attributes: int) -> BehaviourIndex:
        """Index of events in the order given, which is kept within a (row, attribute). Events without attribute (0) are left out."""
        event_E = attribute_E.nonzero()[:, 0]
        key_E = row_E[event_E] * num_attributes + attribute_E[event_E]
        order_E = key_E.argsort(stable=True)
        return cls(key_E[order_E], event_E[order_E], num_attributes)

    def newest(self, row_t: Tensor, attribute_t: Tensor, k: int) -> Chosen:
        """The newest k events of each (row, attribute) [t], newest first: two binary searches each, whatever the length of the past."""
        wanted_t = row_t * self.num_attributes + attribute_t
        first_t = torch.searchsorted(self.key, wanted_t)
        stop_t = torch.searchsorted(self.key, wanted_t, right=True)
        stop_t = torch.where(attribute_t > 0, stop_t, first_t)
        k = min(k, int((stop_t - first_t).max())) if len(wanted_t) else 0
        place_tK = stop_t[:, None] - 1 - torch.arange(k, device=wanted_t.device)
        is_real_tK = place_tK >= first_t[:, None]
        if not k:
            return Chosen(place_tK, is_real_tK)
        event_tK = self.event[place_tK.masked_fill(~is_real_tK, 0)]
        return Chosen(event_tK.masked_fill(~is_real_tK, 0), is_real_tK)


def newest_by_scan(past: Jagged, attribute_E: Tensor, candidates: Jagged, attribute_t: Tensor, k: int) -> Chosen:
    """What BehaviourIndex.newest gives, by comparing every event with every candidate: the reference."""
    attribute_BL, _ = past.with_values(attribute_E).padded()
    attribute_BC, _ = candidates.with_values(attribute_t).padded()

    def same(first: int, stop: int) -> Tensor:
        wanted_BC1 = attribute_BC[:, first:stop, None]
        return ((attribute_BL[:, None] == wanted_BC1) & (wanted_BC1 > 0)).int()

    chosen = search(same, past, candidates, k, pairs_at_once=1 << 62)
    if not chosen.event.numel():
        return chosen
    is_real_tK = chosen.is_real & (attribute_E[chosen.event] == attribute_t[:, None]) & (attribute_t[:, None] > 0)
    return Chosen(chosen.event.masked_fill(~is_real_tK, 0), is_real_tK)


# -- hashes -------------------------------------------------------------------------------------------------------------------------------


def planes(dim: int, num_bits: int, seed: int) -> Tensor:
    """float32 [D, m], independent N(0, 1): fixed normals of the hyperplanes of SimHash, the same for the same seed."""
    return torch.randn(dim, num_bits, generator=torch.Generator().manual_seed(seed))


def sign_bits(vector_nD: Tensor, planes_Dm: Tensor) -> Tensor:
    """bool [n, m]: on which side of each plane a vector lies; no gradient.

    In double precision, so that the same vector has the same bits whatever stands beside it in the batch.
    """
    return vector_nD.detach().double() @ planes_Dm.double() > 0


def packed(bits_nm: Tensor) -> Tensor:
    """int64 [n, W]: bits [n, m] in words of 64."""
    bits_nm = nn.functional.pad(bits_nm, (0, -bits_nm.shape[1] % WORD))
    shift = torch.arange(WORD, device=bits_nm.device)
    return (bits_nm.unflatten(1, (-1, WORD)).long() << shift).sum(-1)


def hamming(one: Tensor, other: Tensor) -> Tensor:
    """int32 [...]: number of differing bits of words int64 [..., W] (broadcast)."""
    total: Tensor | None = None
    for word, other_word in zip(one.unbind(-1), other.unbind(-1), strict=True):
        count = popcount(word ^ other_word)
        total = count if total is None else total + count
    assert total is not None
    return total


def popcount(words: Tensor) -> Tensor:
    """int32: bits that are 1 of int64 words of any shape."""
    if words.device.type == "cpu" and hasattr(np, "bitwise_count"):
        return torch.from_numpy(np.bitwise_count(words.numpy().view(np.uint64))).int()
    return _popcount_by_sums(words)


def _popcount_by_sums(words: Tensor) -> Tensor:
    """The same by adding up neighbouring bits, then pairs, then groups of four (for devices that NumPy does not reach)."""
    x = words - ((words >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((x * 0x0101010101010101 >> 56) & 0xFF).int()


def signatures(vector_nD: Tensor, planes_Dm: Tensor, bits: int) -> Tensor:
    """int64 [n, G], G = m / bits: each run of `bits` signs as a number from 0 to 2 ** bits - 1 (SDIM's groups)."""
    groups_nGb = sign_bits(vector_nD, planes_Dm).unflatten(1, (-1, bits)).long()
    return (groups_nGb << torch.arange(bits, device=vector_nD.device)).sum(-1)


# -- going on from an earlier request -----------------------------------------------------------------------------------------------------


class Continued(NamedTuple):
    """What lies between the windows that were remembered and the present ones."""

    fits_B: Tensor
    """bool [B]: what was kept of the request's user can go on."""
    dropped: History
    """Events of remembered windows that the present ones no longer hold; none where nothing fits."""
    added: History
    """Events that what was kept does not know; the whole window where nothing fits."""


def continued(history: History, memories: Sequence[Mapping[str, Tensor] | None]) -> Continued:
    """Compare the window that each memory holds (`window_of`) with the request's: it fits where its newest part opens the present one.

    `value` and `group` of the events returned are 0.
    """
    names = ("item", "time", "action")
    device = history.time.device
    lengths_B = torch.tensor([0 if memory is None else len(memory["item"]) for memory in memories], device=device)
    known, none = [memory for memory in memories if memory is not None], torch.zeros(0, dtype=torch.int64)
    joined = [torch.cat([none.to(device), *(memory[name].to(device) for memory in known)]) for name in names]
    old = [Jagged.from_lengths(column, lengths_B) for column in joined]
    new = [history.items.with_values(column) for column in (history.items.values, history.time, history.action)]
    dropped_B, fits_B = overlap(old, new)
    row_E = old[0].row_of_value
    gone_E = (old[0].position_of_value < dropped_B[row_E]) & fits_B[row_E]
    known_B = torch.where(fits_B, lengths_B - dropped_B, 0)
    fresh_E = history.items.position_of_value >= known_B[history.items.row_of_value]
    return Continued(fits_B, _events(old, gone_E), _events(new, fresh_E))


def _events(columns: Sequence[Jagged], mask_E: Tensor) -> History:
    items, (time, action) = columns[0].keep(mask_E), (column.values[mask_E] for column in columns[1:])
    nothing = torch.zeros_like(items.values)
    return History(items=items, time=time, action=action, value=nothing.float(), group=nothing)


def window_of(history: History) -> list[dict[str, Tensor]]:
    """What `continued` needs of each request's window: its events, to be kept with what was made of them."""
    sizes = history.items.lengths.tolist()
    columns = {"item": history.items.values, "time": history.time, "action": history.action}
    parts = {name: column.split(sizes) for name, column in columns.items()}
    return [{name: parts[name][b].clone() for name in columns} for b in range(len(sizes))]


def overlap(old: Sequence[Jagged], new: Sequence[Jagged]) -> tuple[Tensor, Tensor]:
    """How the present window of each history continues the one that was remembered.

    Args:
        old, new: columns that identify events (item, time, action), B rows each, oldest first.

    Returns: dropped [B] int64, events of the old window that are no longer in the new one, and fits [B] bool: the rest of the old window
        is the beginning of the new one. Where an old window was empty or nothing of it is left, it does not fit.
    """
    first_B, size_B = new[0].offsets[:-1], new[0].lengths
    row_E, place_E, num_old_B = old[0].row_of_value, old[0].position_of_value, old[0].lengths
    begins_E = size_B[row_E] > 0
    for old_column, new_column in zip(old, new, strict=True):
        if len(new_column.values):
            at_E = first_B[row_E].clamp(max=len(new_column.values) - 1)
            begins_E = begins_E & (old_column.values == new_column.values[at_E])
    # The first old event that opens the new window.
    dropped_B = num_old_B.scatter_reduce(0, row_E[begins_E], place_E[begins_E], "amin")
    fits_B = (dropped_B < num_old_B) & (num_old_B - dropped_B <= size_B)
    still_E = (place_E >= dropped_B[row_E]) & fits_B[row_E]
    row_S = row_E[still_E]
    at_S = first_B[row_S] + place_E[still_E] - dropped_B[row_S]
    for old_column, new_column in zip(old, new, strict=True):
        differs_S = old_column.values[still_E] != new_column.values[at_S]
        fits_B = fits_B.index_fill(0, row_S[differs_S], False)
    return dropped_B, fits_B


# -- settings -----------------------------------------------------------------------------------------------------------------------------
