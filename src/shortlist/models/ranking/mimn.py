"""MIMN: a memory of fixed size that every event updates, whatever the candidate: the long past without keeping it.

"Practice on Long Sequential User Behavior Modeling for Click-Through Rate Prediction", Pi et al., KDD 2019.

    controller    h_t = GRU(h_{t-1}, [e_t; r_{t-1}]) gives key k, sharpness beta, erase = sigmoid(..), add = tanh(..)
    address       w_t(i) = softmax_i(beta cos(k, M(i)))                                  equations 1 to 3
    read          r_t = sum_i w_t(i) M(i)                                                equation 4
    write         M <- M (1 - v_t erase) + v_t add                                       equations 5 to 7
    utilisation   v_t proportional to w_t softmax(W u_{t-1}), u = sum of the v so far;   equations 8 and 9
                  loss: the slots' shares of u are to be equal                           equation 10
    induction     S(i) <- GRU(S(i), [M(i); e_t]) for the slots with the highest w_t      equation 11

A candidate attends to the slots of M and of S. The paper's server of user interests is `recall`: the memory goes on from the event where
it stood. While the window has lost no event this is exact; with `lifelong` it also goes on when the window has slid, and then knows of
events that a memory made anew from the window does not (as the paper's memory does).

Differences from the paper:
1. Weights after the utilisation's factor are scaled back to sum 1; otherwise a step writes about 1/m of what it should.
2. One address serves reading, writing and induction. The loss of utilisation is over shares, so that it does not grow with the past.
3. The newest events are read by multi-head target attention, and the two parts of the memory likewise.
4. The loss is a softmax over a request's candidates unless "bce", the paper's, is chosen.
5. The tower reads the products of candidate and interests as well (see DIN), and user-item pair fields.

The events are read one after another, all requests of a batch together: this is the price of a recurrent memory.

B requests, t candidates end to end, E past events end to end, L most of a request, D width of a vector, m slots, k slots of an induction,
W width of the tower's first layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, softplus

from shortlist.data.batches import Batch, Candidates, History
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Space
from shortlist.layers.scoring import CandidateHead, EventMarks, HeadConfig, dense_bytes
from shortlist.layers.search import (
    Chosen,
    LongHistoryConfig,
    Past,
    PastEncoder,
    TargetAttention,
    attend,
    continued,
    crossed,
    crossed_width,
    window_of,
)
from shortlist.models.base import Cost, Losses, Memory, Ranker, RequestShape, Scores
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class MIMNConfig(LongHistoryConfig):
    """Settings of MIMN, beside those of all rankers of long pasts."""

    num_slots: int = 8
    """Slots of the memory, m."""
    num_induced: int = 3
    """Slots whose induction unit an event updates."""
    max_history: int = 200
    """Newest events that the memory is made from, one after another."""
    lifelong: bool = False
    """Let a memory go on when older events have left the window; it then equals none made from the window alone."""
    utilisation: float = 0.1
    """Weight of the loss that spreads writes over the slots."""

    def __post_init__(self) -> None:
        self.check("mimn", {"num_slots": 1, "num_induced": 1, "utilisation": 0})


class Slots(NamedTuple):
    """The memory of B users and where its controller stands."""

    memory_BmD: Tensor
    induction_BmD: Tensor
    usage_Bm: Tensor
    """How much was written to each slot, in all."""
    read_BD: Tensor
    controller_BD: Tensor

    def where(self, is_B: Tensor, other: Slots) -> Slots:
        """This where True, the other elsewhere."""
        chosen = [torch.where(is_B.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(self, other, strict=True)]
        return Slots(*chosen)


class MemoryCell(nn.Module):
    """One event's update of the memory."""

    def __init__(self, dim: int, num_slots: int, num_induced: int) -> None:
        super().__init__()
        self.num_induced = min(num_induced, num_slots)
        self.controller = nn.GRUCell(2 * dim, dim)
        self.parameters_of = nn.Linear(dim, 3 * dim + 1)
        self.balance = nn.Linear(num_slots, num_slots)
        self.induction = nn.GRUCell(2 * dim, dim)
        self.first_mD = nn.Parameter(torch.randn(num_slots, dim) * 0.1)
        gates = 2 * 3 * dim * (2 * dim + dim)
        slots = 10 * num_slots * dim + 2 * num_slots**2
        self.event_flops = gates * (1 + self.num_induced) + 2 * dim * (3 * dim + 1) + slots

    def empty(self, num_rows: int) -> Slots:
        """The memory of somebody without events."""
        num_slots, dim = self.first_mD.shape
        zero_BD = self.first_mD.new_zeros(num_rows, dim)
        memory_BmD = self.first_mD.expand(num_rows, -1, -1)
        return Slots(memory_BmD, torch.zeros_like(memory_BmD), zero_BD.new_zeros(num_rows, num_slots), zero_BD, zero_BD)

    def forward(self, slots: Slots, event_BD: Tensor) -> Slots:
        """The memory after one more event of each row."""
        controller_BD = self.controller(torch.cat([event_BD, slots.read_BD], dim=1), slots.controller_BD)
        dim = event_BD.shape[1]
        key_BD, erase_BD, add_BD, sharpness_B1 = self.parameters_of(controller_BD).split([dim, dim, dim, 1], dim=1)
        likeness_Bm = cosine_similarity(key_BD[:, None], slots.memory_BmD, dim=2, eps=1e-6)
        address_Bm = (likeness_Bm * (1 + softplus(sharpness_B1))).softmax(1)
        read_BD = (address_Bm[:, None] @ slots.memory_BmD)[:, 0]
        write_Bm = address_Bm * self.balance(slots.usage_Bm / slots.usage_Bm.sum(1, keepdim=True).clamp(min=1)).softmax(
            1
        )
        write_Bm = write_Bm / write_Bm.sum(1, keepdim=True).clamp(min=1e-9)
        memory_BmD = slots.memory_BmD * (1 - write_Bm[:, :, None] * erase_BD.sigmoid()[:, None])
        memory_BmD = memory_BmD + write_Bm[:, :, None] * add_BD.tanh()[:, None]
        induction_BmD = self._induced(slots.induction_BmD, memory_BmD, event_BD, address_Bm)
        return Slots(memory_BmD, induction_BmD, slots.usage_Bm + write_Bm, read_BD, controller_BD)

    def _induced(self, induction_BmD: Tensor, memory_BmD: Tensor, event_BD: Tensor, address_Bm: Tensor) -> Tensor:
        """The induction units after the event: only those of the slots with the highest address move."""
        slot_BkD = address_Bm.topk(self.num_induced, dim=1).indices[:, :, None].expand(-1, -1, event_BD.shape[1])
        old_BkD = induction_BmD.gather(1, slot_BkD)
        given_BkD = torch.cat([memory_BmD.gather(1, slot_BkD), event_BD[:, None].expand_as(old_BkD)], dim=2)
        new_BkD = self.induction(given_BkD.flatten(0, 1), old_BkD.flatten(0, 1)).view(old_BkD.shape)
        return induction_BmD.scatter(1, slot_BkD, new_BkD)

    def run(self, slots: Slots, events: Jagged) -> Slots:
        """The memory after all events [E, D] of each row, oldest first."""
        if not len(events.values):
            return slots
        event_BLD, is_real_BL = events.padded()
        shortest = int(events.lengths.min())
        for place, (event_BD, is_real_B) in enumerate(zip(event_BLD.unbind(1), is_real_BL.unbind(1))):
            after = self(slots, event_BD)
            slots = after if place < shortest else after.where(is_real_B, slots)
        return slots


class MIMNState(NamedTuple):
    """The request's side, made once."""

    slots: Slots
    newest: Past
    """The newest events."""
    request_BW: Tensor
    """The request's part of the tower's first layer."""


@system(
    "mimn",
    stage="ranking",
    paper="Pi et al., KDD 2019",
    needs={"history"},
    cold_users=True,
    cold_items=True,
    tiny={"dim": 8, "num_slots": 3, "num_induced": 1, "short_history": 3, "max_history": 10, "id_dropout": 0.0}
    | {"head": HeadConfig(widths=(16,), dropout=0.0)},
)
class MIMN(Ranker):
    """A memory of fixed size that every event updates, kept between requests; candidates attend to its slots."""

    Config = MIMNConfig

    def __init__(self, config: MIMNConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.max_history
        self.encoder = PastEncoder(space, config)
        self.marks = EventMarks(space, config.dim)  # without age: it changes with every request, the memory must not
        self.cell = MemoryCell(config.dim, config.num_slots, config.num_induced)
        self.memory = TargetAttention(config.dim, config.num_heads)
        self.induction = TargetAttention(config.dim, config.num_heads)
        self.short = TargetAttention(config.dim, config.num_heads)
        width = crossed_width(config.dim, *[config.dim] * 3)
        self.head = CandidateHead(space, config.dim, width, config.head, table=config.table)

    def events(self, history: History, time_B: Tensor) -> Jagged:
        """What the memory reads: vectors [E, D]."""
        return history.items.with_values(self.marks(self.encoder(history.items.values), history, time_B))

    def user_state(self, batch: Batch) -> MIMNState:
        """See MIMNState: memories and their keys, and the request's side (B, W)."""
        events = self.events(batch.history.last(self.max_history), batch.time)
        return self._state(batch, self.cell.run(self.cell.empty(batch.size), events))

    def _state(self, batch: Batch, slots: Slots) -> MIMNState:
        newest = self.encoder.past(batch, min(self.config.short_history, self.max_history))
        return MIMNState(slots, newest, self.head.request_side(batch))

    def recall(self, batch: Batch, memories: Sequence[Memory | None]) -> tuple[MIMNState, list[Memory | None]]:
        """See Remembering: the memory goes on with the events that are new."""
        history = batch.history.last(self.max_history)
        step = continued(history, memories)
        if not self.config.lifelong and len(step.dropped.items.values):
            slid = step.dropped.items.lengths > 0
            memories = [None if gone else memory for gone, memory in zip(slid.tolist(), memories, strict=True)]
            step = continued(history, memories)
        slots = self.cell.run(self._kept(memories, step.fits_B), self.events(step.added, batch.time))
        kept: list[Memory | None] = [
            {**events, **{name: part[b].clone() for name, part in slots._asdict().items()}}
            for b, events in enumerate(window_of(history))
        ]
        return self._state(batch, slots), kept

    def _kept(self, memories: Sequence[Memory | None], fits_B: Tensor) -> Slots:
        """What was kept of each request's user, an empty memory where it does not fit."""
        empty = self.cell.empty(1)
        fitting = [m if fits else None for m, fits in zip(memories, fits_B.tolist(), strict=True)]
        parts = [
            torch.stack([first[0] if m is None else m[name].to(first.device) for m in fitting])
            for name, first in empty._asdict().items()
        ]
        return Slots(*parts)

    def score_candidates(self, state: MIMNState, candidates: Candidates) -> Scores:
        """Logits [t] per task."""
        rows = candidates.rows
        item_tD, row_t = self.encoder(rows.values), rows.row_of_value
        num_slots = self.config.num_slots
        slot_tm = row_t[:, None] * num_slots + torch.arange(num_slots, device=row_t.device)
        slots = Chosen(slot_tm, torch.ones_like(slot_tm, dtype=torch.bool))
        newest = state.newest.newest(self.config.short_history).select(row_t)
        pairs = None if self.training else self.config.pairs_at_once
        read = (
            attend(self.memory, item_tD, state.slots.memory_BmD.flatten(0, 1), slots, pairs),
            attend(self.induction, item_tD, state.slots.induction_BmD.flatten(0, 1), slots, pairs),
            attend(self.short, item_tD, state.newest.event_ED, newest, pairs),
        )
        return self.head(state.request_BW, candidates, crossed(item_tD, *read))

    def losses(self, batch: Batch) -> Losses:
        """By task, as `config.head.loss` says; the loss of utilisation is added to the first."""
        state = self.user_state(batch)
        assert batch.candidates is not None
        losses = self.head.losses(self.score_candidates(state, batch.candidates), batch)
        first = self.space.tasks[0]
        losses[first] = losses[first] + self.config.utilisation * unevenness(state.slots.usage_Bm)
        return losses

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Once: the updates of the memory, one per event, and the request's layer; nothing of it where the memory is kept. Per candidate:
        attention to both parts of the memory and to the newest, the tower. Item vectors are kept and only looked up."""
        config, num_past = self.config, min(shape.num_history, self.max_history)
        newest = min(config.short_history, num_past)
        attended = 2 * config.num_slots + newest
        item = 3 * self.short.candidate_flops + attended * self.short.pair_flops + self.head.candidate_flops
        read = newest if cached else num_past
        return Cost(
            user_flops=0.0 if cached else float(num_past * self.cell.event_flops + self.head.request_flops),
            item_flops=float(item),
            bytes=dense_bytes(self) + 4.0 * config.dim * (shape.num_candidates + read + 2 * config.num_slots),
        )


def unevenness(usage_Bm: Tensor) -> Tensor:
    """Mean over users with events of sum_i (share of slot i - 1 / m) ** 2 (equation 10, on shares)."""
    total_B1 = usage_Bm.sum(1, keepdim=True)
    square_B = (usage_Bm / total_B1.clamp(min=1e-9) - 1 / usage_Bm.shape[1]).square().sum(1)
    wrote_B = total_B1[:, 0] > 0
    return (square_B * wrote_B).sum() / wrote_B.sum().clamp(min=1)
