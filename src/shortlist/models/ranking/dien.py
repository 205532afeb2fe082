"""DIEN: how an interest evolves, by a GRU that learns to tell the next behaviour and a second GRU gated by the candidate's attention.

"Deep Interest Evolution Network for Click-Through Rate Prediction", Zhou et al., AAAI 2019.

    h_t  = GRU(e_t, h_{t-1})                                                    interest extractor, equations 2 to 5
    aux  = -mean_t [log s(<h_t, e_{t+1}>) + log(1 - s(<h_t, e^_{t+1}>))]           auxiliary loss, equation 6
    a_t  = softmax_t(h_t W e_a)                                                 attention of the candidate a, equation 10
    r_t = s(W_r h_t + U_r h'_{t-1} + b_r),  c_t = tanh(W_c h_t + r_t * U_c h'_{t-1} + b_c),  u_t = s(W_u h_t + U_u h'_{t-1} + b_u)
    h'_t = (1 - z_t) * h'_{t-1} + z_t * c_t                                      interest evolution, equations 11 to 16

    evolution   AIGRU  z_t = u_t, but a_t h_t is read for h_t;   AGRU  z_t = a_t;   AUGRU  z_t = a_t u_t

The first GRU and the products W h_t do not know the candidate: they are made once per request, and `recall` goes on from the states
of an earlier request. Only U h' and the gates run per candidate, for all candidates of all requests at once, the time steps the only
loop; a candidate takes as many steps as its request has events.

Differences from the paper and its code:
1. `evolution="augru-released"` is the cell of the released code, z_t = u_t + a_t (1 - u_t): attention only adds to the update, and a_t = 0
   is a plain step, where the paper's form stands still. `"gru"` is the two-layer GRU with attention over its states.
2. The released code's attention (a net on [q, h, q - h, q * h], q = PReLU of a map of the candidate) is `attention="unit"`, its auxiliary
   net on [h, e] `auxiliary_form="network"` (batch norm, then 100 and 50 PReLU units for its sigmoid ones).
3. The negative is drawn by popularity, as the code's draw from the log, anew where it equals the next item. The next behaviour is the
   first event of the next group: events of one basket do not predict each other. Both items are read without the mark of an action,
   which would tell them apart.
4. The tower reads candidate, mean of the past, their product and h'_T, as the released code (which sums, so that its scale grows
   with the history), and user, context and pair fields; one logit per task for its two-way softmax.
5. `weights="sigmoid"`: attention of each event alone. A softmax gives about 1 / T each, so that AUGRU hardly moves on a long history.
6. `recall` is exact. A history that has grown past `max_history` loses its oldest event, which no GRU can undo: it is read anew.

B requests, C most candidates of a request, t candidates end to end, E history events end to end, L longest history, p (candidate, event)
pairs end to end, P supervised positions, D width of a vector, H of a state, G gates' width (3 H; 2 H for AGRU), W first layer of the tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from shortlist.data.batches import Batch, Candidates, History
from shortlist.data.histories import View
from shortlist.data.jagged import Jagged, segment_sum
from shortlist.data.samplers import PopularitySampler, draw_outside
from shortlist.data.schema import Space
from shortlist.embeddings.base import TableChoice
from shortlist.errors import ConfigError
from shortlist.layers.activation_unit import ActivationUnit
from shortlist.layers.fields import ItemEncoder
from shortlist.layers.scoring import CandidateHead, EventMarks, HeadConfig, dense_bytes, linear_flops
from shortlist.layers.time_major import TimeMajor, run_recurrent
from shortlist.layers.towers import MLP, PReLU, RowNorm
from shortlist.models.base import Cost, Losses, Memory, Ranker, RequestShape, Scores
from shortlist.registry import system

Evolution = Literal["gru", "aigru", "agru", "augru", "augru-released"]
EVOLUTIONS = ("gru", "aigru", "agru", "augru", "augru-released")
AUXILIARY_WIDTHS = (100, 50)


@dataclass(frozen=True, kw_only=True, slots=True)
class DIENConfig:
    """Settings of DIEN."""

    dim: int = 32
    """Width of one embedding."""
    hidden: int = 32
    """Width of both GRUs' states; the inner product of the auxiliary loss needs it equal to dim."""
    evolution: Evolution = "augru"
    """The second GRU: augru (the paper's choice), aigru or agru (its variants), augru-released (the code's gate), gru (no gate; attention
    over its states)."""
    attention: Literal["bilinear", "unit"] = "bilinear"
    """bilinear: the paper's h W e; unit: the released code's small net."""
    weights: Literal["softmax", "sigmoid"] = "softmax"
    """Attention normalised over the history (the paper), or each event by itself."""
    unit_widths: tuple[int, ...] = (16,)
    """Hidden widths of the unit attention."""
    auxiliary: float = 1.0
    """Weight of the auxiliary loss; 0 = none."""
    auxiliary_form: Literal["inner", "network"] = "inner"
    """inner: the paper's inner product; network: the released code's net on state and item."""
    auxiliary_power: float = 1.0
    """Auxiliary negatives come with a chance proportional to (number of events) ** this; 0 = uniform."""
    head: HeadConfig = HeadConfig()  # noqa: RUF009  (frozen)
    """The tower."""
    max_history: int = 50
    """Newest events read per request."""
    use_ids: bool = True
    """Read the items' own id rows; False leaves only their fields."""
    id_dropout: float = 0.05
    """Share of item id rows replaced by the unknown row in training, so that new items have one that is trained."""
    pairs_at_once: int = 200_000
    """(candidate, event) pairs in memory at a time when scoring; training holds all of a batch's for its gradient."""
    table: TableChoice = TableChoice()  # noqa: RUF009  (frozen)
    """Which table holds the id rows."""

    def __post_init__(self) -> None:
        for name, least in (("dim", 1), ("hidden", 1), ("max_history", 1), ("pairs_at_once", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"dien: {name} must be at least {least}, got {getattr(self, name)}")
        for name in ("auxiliary", "auxiliary_power"):
            if getattr(self, name) < 0:
                raise ConfigError(f"dien: {name} must be 0 or above, got {getattr(self, name)}")
        if self.evolution not in EVOLUTIONS:
            raise ConfigError(f"dien: evolution must be one of {', '.join(EVOLUTIONS)}, got {self.evolution!r}")
        for name, choices in (
            ("attention", ("bilinear", "unit")),
            ("weights", ("softmax", "sigmoid")),
            ("auxiliary_form", ("inner", "network")),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"dien: {name} must be {' or '.join(choices)}, got {getattr(self, name)!r}")
        if self.attention == "unit" and not self.unit_widths:
            raise ConfigError("dien: unit_widths must name at least one hidden width")
        if self.auxiliary and self.auxiliary_form == "inner" and self.hidden != self.dim:
            raise ConfigError(
                f"dien: an inner product needs hidden equal to dim, got {self.hidden} and {self.dim}; "
                'set auxiliary_form = "network" for other widths'
            )
        if not 0 <= self.id_dropout < 1:
            raise ConfigError(f"dien: id_dropout must be from 0 to below 1, got {self.id_dropout}")
        self.head.check("dien")


class GatedGRU(nn.Module):
    """A GRU whose update is steered by one weight per step (section 4.4); the last gate's map is left out where it is not read.

    Args:
        width: H of inputs and states.
        evolution: how the weight steers it.
    """

    def __init__(self, width: int, evolution: Evolution) -> None:
        super().__init__()
        self.width = width
        self.evolution = evolution
        gates = width * (2 if evolution == "agru" else 3)
        self.input = nn.Linear(width, gates)
        self.recurrent = nn.Linear(width, gates, bias=False)

    def forward(self, input_EG: Tensor, event_p: Tensor, weight_p: Tensor, pairs: Jagged) -> Tensor:
        """Last states of all sequences: float [n, H], 0 for an empty one.

        Args:
            input_EG: `self.input` of the events; it depends on no candidate.
            event_p: int64 [p], the event of each step.
            weight_p: float [p], the steering weight of each step.
            pairs: n sequences, p steps of them end to end; values are not read.
        """
        layout = TimeMajor.of(pairs)
        steer_p1 = weight_p.index_select(0, layout.order)[:, None]
        # One gather for all steps: each gather's backward pass would clear and add a tensor of all events.
        input_pG = input_EG.index_select(0, event_p.index_select(0, layout.order))
        if self.evolution == "aigru":
            input_pG = torch.lerp(self.input.bias, input_pG, steer_p1)
        state_nH, ended = input_EG.new_zeros(layout.sizes[0] if layout.sizes else 0, self.width), []
        for x_nG, steer_n1 in zip(input_pG.split(layout.sizes), steer_p1.split(layout.sizes)):
            if len(x_nG) < len(state_nH):
                ended.append(state_nH[len(x_nG) :])
                state_nH = state_nH[: len(x_nG)]
            state_nH = self.step(x_nG, state_nH, steer_n1)
        never_nH = state_nH.new_zeros(pairs.num_rows - (layout.sizes[0] if layout.sizes else 0), self.width)
        return torch.cat([state_nH, *ended[::-1], never_nH]).index_select(0, layout.row_place)

    def step(self, x_nG: Tensor, state_nH: Tensor, steer_n1: Tensor) -> Tensor:
        """States [n, H] after one step from inputs [n, G] (already weighted for AIGRU), states and weights [n, 1]."""
        y_nG = self.recurrent(state_nH)
        x, y = x_nG.chunk(x_nG.shape[1] // self.width, 1), y_nG.chunk(x_nG.shape[1] // self.width, 1)
        fresh_nH = torch.tanh(x[1] + torch.sigmoid(x[0] + y[0]) * y[1])
        match self.evolution:
            case "agru":
                update = steer_n1.expand_as(state_nH)
            case "augru":
                update = steer_n1 * torch.sigmoid(x[2] + y[2])
            case "augru-released":
                update = 1 - (1 - steer_n1) * torch.sigmoid(-x[2] - y[2])
            case _:
                update = torch.sigmoid(x[2] + y[2])
        return torch.lerp(state_nH, fresh_nH, update)


class DIENState(NamedTuple):
    """The request's side, made once."""

    interest_EH: Tensor
    """The extractor's state after each event."""
    input_EG: Tensor
    """What the second GRU reads of each event, for evolution "gru" its states [E, H]."""
    offsets: Tensor
    """int64 [B + 1]: whose events they are."""
    pooled_BD: Tensor
    """Mean of the past events' vectors."""
    request_BW: Tensor
    """The request's part of the tower's first layer."""


@system(
    "dien",
    stage="ranking",
    paper="Zhou et al., AAAI 2019",
    needs={"history", "order"},
    cold_users=True,
    cold_items=True,
    tiny={"dim": 8, "hidden": 8, "max_history": 10, "head": HeadConfig(widths=(16,), dropout=0.0)},
)
class DIEN(Ranker):
    """A GRU over the past with a loss on the next behaviour, and per candidate a second one that its attention steers."""

    Config = DIENConfig

    popular_N: Tensor

    def __init__(self, config: DIENConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.max_history
        D, H = config.dim, config.hidden
        readable = space if config.use_ids else replace(space, known_items=torch.zeros_like(space.known_items))
        self.items = ItemEncoder(readable, D, id_dropout=config.id_dropout, table=config.table)
        self.marks = EventMarks(space, D)
        self.extractor = nn.GRU(D, H)
        self.evolution = nn.GRU(H, H) if config.evolution == "gru" else GatedGRU(H, config.evolution)
        if config.attention == "unit":
            self.query = nn.Sequential(nn.Linear(D, H), PReLU(H))
            self.unit = ActivationUnit(H, config.unit_widths, "dice")
        else:
            self.query = nn.Sequential(nn.Linear(D, H, bias=False))
        if config.auxiliary_form == "network":
            self.teller = nn.Sequential(RowNorm(H + D), MLP(H + D, AUXILIARY_WIDTHS, 1, activation="prelu"))
        self.head = CandidateHead(space, D, 3 * D + H, config.head, table=config.table)
        self.buffer("popular_N", space.known_items.to(torch.float64))

    def prepare(self, view: View) -> None:
        """Count the events of each item, for the auxiliary negatives: float64 [n + 1]."""
        counts_N = torch.bincount(torch.from_numpy(view.histories.item.copy()), minlength=view.space.num_items + 1)
        self.buffer("popular_N", counts_N.to(self.popular_N))

    def user_state(self, batch: Batch) -> DIENState:
        """See DIENState: states of E events (E, H) and the request's side (B, W)."""
        history = batch.history.last(self.max_history)
        return self._state(batch, history, self.items(history.items.values))

    def _state(self, batch: Batch, history: History, item_ED: Tensor) -> DIENState:
        past = history.items.with_values(self.marks(item_ED, history, batch.time))
        total_BD = segment_sum(past.values, past.row_of_value, batch.size)
        return self._state_of(batch, history.items, run_recurrent(self.extractor, past), total_BD)

    def _state_of(self, batch: Batch, events: Jagged, interest_EH: Tensor, total_BD: Tensor) -> DIENState:
        if isinstance(self.evolution, GatedGRU):
            input_EG = self.evolution.input(interest_EH)
        else:
            input_EG = run_recurrent(self.evolution, events.with_values(interest_EH))
        pooled_BD = total_BD / events.lengths.clamp(min=1)[:, None]
        return DIENState(interest_EH, input_EG, events.offsets, pooled_BD, self.head.request_side(batch))

    def recall(self, batch: Batch, memories: Sequence[Memory | None]) -> tuple[DIENState, list[Memory | None]]:
        """See Remembering.recall: the extractor steps through new events alone, from the last state that is remembered."""
        history = batch.history.last(self.max_history)
        events = history.items
        fits_B = _fits(history, memories)
        kept = [m for m, fits in zip(memories, fits_B.tolist()) if m is not None and fits]
        known_B = torch.zeros_like(events.lengths)
        start_BH = torch.zeros(batch.size, self.config.hidden, device=events.offsets.device)
        total_BD = start_BH.new_zeros(batch.size, self.config.dim)
        if kept:
            known_B[fits_B] = torch.tensor([len(m["item"]) for m in kept], device=known_B.device)
            start_BH[fits_B] = torch.stack([m["interest"][-1] for m in kept])
            total_BD[fits_B] = torch.stack([m["total"] for m in kept])
        is_new_E = events.position_of_value >= known_B[events.row_of_value]
        fresh = History(
            items=Jagged.from_lengths(events.values[is_new_E], events.lengths - known_B),
            **{name: getattr(history, name)[is_new_E] for name in ("time", "action", "value", "group")},
        )
        past = fresh.items.with_values(self.marks(self.items(fresh.items.values), fresh, batch.time))
        interest_EH = start_BH.new_empty(len(events.values), self.config.hidden)
        interest_EH[is_new_E] = run_recurrent(self.extractor, past, start_BH)
        if kept:
            interest_EH[~is_new_E] = torch.cat([m["interest"] for m in kept])
        total_BD = total_BD + segment_sum(past.values, past.row_of_value, batch.size)
        columns = {"item": events.values, "time": history.time, "action": history.action, "interest": interest_EH}
        parts = {name: column.split(events.lengths.tolist()) for name, column in columns.items()}
        # Clones: a view would keep the whole batch alive.
        memory: list[Memory | None] = [
            {**{name: part[b].clone() for name, part in parts.items()}, "total": total_BD[b].clone()}
            if len(parts["item"][b])
            else None
            for b in range(batch.size)
        ]
        return self._state_of(batch, events, interest_EH, total_BD), memory

    def score_candidates(self, state: DIENState, candidates: Candidates) -> Scores:
        """Logits [t] per task."""
        rows = candidates.rows
        item_tD = self.items(rows.values)
        pooled_tD = state.pooled_BD[rows.row_of_value]
        evolved_tH = self.evolved(state, rows.with_values(item_tD))
        side_tV = torch.cat([item_tD, pooled_tD, item_tD * pooled_tD, evolved_tH], dim=1)
        return self.head(state.request_BW, candidates, side_tV)

    def evolved(self, state: DIENState, items: Jagged) -> Tensor:
        """The interest as it evolved towards each candidate, float32 [t, H]; 0 where there is no history.

        Scoring takes the candidates in slices, so that B x C x L is no more than `pairs_at_once` at a time (with at least one
        candidate of every request).
        """
        query_BCH, is_item_BC = items.with_values(self.query(items.values)).padded()
        state_BLH, is_real_BL = Jagged(state.interest_EH, state.offsets).padded()
        C = is_item_BC.shape[1]
        step = C if self.training else max(self.config.pairs_at_once // max(is_real_BL.numel(), 1), 1)
        slices = zip(query_BCH.split(step, dim=1), is_item_BC.split(step, dim=1))
        found = [self._evolved(state, state_BLH, is_real_BL, *each) for each in slices]
        return torch.cat(found, dim=1)[is_item_BC]

    def _evolved(
        self, state: DIENState, state_BLH: Tensor, is_real_BL: Tensor, query_BCH: Tensor, is_item_BC: Tensor
    ) -> Tensor:
        """[B, C, H] for a slice of the candidates."""
        weight_BCL = self._attention(query_BCH, state_BLH, is_real_BL, is_item_BC)
        if not isinstance(self.evolution, GatedGRU):
            second_BLH, _ = Jagged(state.input_EG, state.offsets).padded()
            return weight_BCL @ second_BLH
        events = Jagged(state.input_EG, state.offsets)
        row_n = is_item_BC.nonzero()[:, 0]
        event_p, length_n = events.where(row_n)
        weight_p = weight_BCL[is_item_BC[:, :, None] & is_real_BL[:, None, :]]
        final_nH = self.evolution(state.input_EG, event_p, weight_p, Jagged.from_lengths(event_p, length_n))
        return final_nH.new_zeros(*is_item_BC.shape, final_nH.shape[1]).masked_scatter(is_item_BC[:, :, None], final_nH)

    def _attention(self, query_BCH: Tensor, state_BLH: Tensor, is_real_BL: Tensor, is_item_BC: Tensor) -> Tensor:
        """Weights [B, C, L] of the events for each candidate (equation 10); 0 at padding."""
        is_pair_BCL = is_item_BC[:, :, None] & is_real_BL[:, None, :]
        if self.config.attention == "unit":
            logit_BCL = self.unit(query_BCH, state_BLH, is_pair_BCL.transpose(1, 2)).transpose(1, 2)
        else:
            logit_BCL = query_BCH @ state_BLH.transpose(1, 2)
        if self.config.weights == "sigmoid":
            return logit_BCL.sigmoid().masked_fill(~is_pair_BCL, 0)
        # The lowest finite number, not -inf: a request without history must not make NaN.
        lowest = torch.finfo(logit_BCL.dtype).min
        return logit_BCL.masked_fill(~is_pair_BCL, lowest).softmax(2).masked_fill(~is_pair_BCL, 0)

    def plain_evolved(self, state: DIENState, items: Jagged) -> Tensor:
        """As `evolved`, candidate by candidate and step by step: the reference of tests and benchmarks."""
        finals = []
        for item_D, row in zip(items.values, items.row_of_value.tolist()):
            first, stop = state.offsets[row : row + 2].tolist()
            states_LH, inputs_LG = state.interest_EH[first:stop], state.input_EG[first:stop]
            query_H = self.query(item_D[None])[0]
            is_unit = self.config.attention == "unit"
            logit_L = self.unit.plain(query_H.expand_as(states_LH), states_LH) if is_unit else states_LH @ query_H
            weight_L = logit_L.softmax(0) if self.config.weights == "softmax" else logit_L.sigmoid()
            final_H = states_LH.new_zeros(self.config.hidden)
            if not isinstance(self.evolution, GatedGRU):
                final_H = weight_L @ inputs_LG
            else:
                for x_G, a in zip(inputs_LG, weight_L):
                    if self.config.evolution == "aigru":
                        x_G = a * (x_G - self.evolution.input.bias) + self.evolution.input.bias
                    final_H = self.evolution.step(x_G[None], final_H[None], a.view(1, 1))[0]
            finals.append(final_H)
        return torch.stack(finals)

    def losses(self, batch: Batch) -> Losses:
        """By task as the head's settings say, and "auxiliary", already weighted."""
        history = batch.history.last(self.max_history)
        item_ED = self.items(history.items.values)
        state = self._state(batch, history, item_ED)
        assert batch.candidates is not None
        losses = self.head.losses(self.score_candidates(state, batch.candidates), batch)
        if self.config.auxiliary:
            losses["auxiliary"] = self.config.auxiliary * self.auxiliary_loss(history, item_ED, state.interest_EH)
        return losses

    def auxiliary_loss(self, history: History, item_ED: Tensor, interest_EH: Tensor) -> Tensor:
        """Equation 6 over the supervised positions: scalar, 0 where there is none.

        Args:
            history: E events.
            item_ED: vectors of their items, float [E, D].
            interest_EH: states after them, float [E, H].
        """
        position_P = next_positions(history)
        sampler = PopularitySampler.of_counts(self.popular_N, self.config.auxiliary_power)
        negative_P = draw_negatives(sampler, history.items.values[position_P + 1])
        live_P = negative_P > 0
        position_P, negative_P = position_P[live_P], negative_P[live_P]
        if not len(position_P):
            return item_ED.sum() * 0
        state_PH = interest_EH[position_P]
        next_P = self._tell(state_PH, item_ED[position_P + 1])
        other_P = self._tell(state_PH, self.items(negative_P))
        return (softplus(-next_P) + softplus(other_P)).mean()

    def _tell(self, state_PH: Tensor, item_PD: Tensor) -> Tensor:
        """Logits [P] that the item comes after the state."""
        if self.config.auxiliary_form == "inner":
            return (state_PH * item_PD).sum(1)
        return self.teller(torch.cat([state_PH, item_PD], dim=1)).squeeze(1)

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Once: both GRUs' maps of the past. Per candidate: its vector, one weight and one recurrent step per event, the tower.

        `cached` is a request without new events since the last one; the maps into the second GRU are made anew.
        """
        D, H = self.config.dim, self.config.hidden
        num_past, item = min(shape.num_history, self.max_history), linear_flops(self.items)
        extract = item + 6 * H * (D + H)
        attend, step = 2 * H, 2 * H
        if isinstance(self.evolution, GatedGRU):
            again, step = linear_flops(self.evolution.input), linear_flops(self.evolution.recurrent)
        else:
            again = 12 * H * H
        per_query = linear_flops(self.query)
        if self.config.attention == "unit":
            attend, per_query = self.unit.pair_flops, per_query + 2 * self.unit.query_flops
        once = num_past * (extract + again) + self.head.request_flops
        return Cost(
            user_flops=float(num_past * again + self.head.request_flops) if cached else float(once),
            item_flops=float(item + per_query + num_past * (attend + step) + self.head.candidate_flops),
            bytes=dense_bytes(self) + 4.0 * (D * (shape.num_candidates + num_past) + H * num_past),
        )


def next_positions(history: History) -> Tensor:
    """int64 [P]: events that end a group and have another event of the same request after them, which is their next behaviour."""
    row_E, group_E = history.items.row_of_value, history.group
    is_followed = (row_E[1:] == row_E[:-1]) & (group_E[1:] != group_E[:-1])
    return is_followed.nonzero()[:, 0]


def draw_negatives(sampler: PopularitySampler, next_P: Tensor) -> Tensor:
    """int64 [P]: for each next item another one; 0 where the draws always hit it."""
    own = torch.arange(len(next_P) + 1, device=next_P.device)
    return draw_outside(sampler, Jagged(next_P, own), own[:-1], 1)[:, 0]


def _fits(history: History, memories: Sequence[Memory | None]) -> Tensor:
    """bool [B]: the remembered events are the first ones of the request's history, one for one."""
    events = history.items
    length_B = torch.tensor([0 if m is None else len(m["item"]) for m in memories], device=events.offsets.device)
    fits_B = (length_B > 0) & (length_B <= events.lengths)
    remembered = [m for m, fits in zip(memories, fits_B.tolist()) if m is not None and fits]
    if not remembered:
        return fits_B
    known = Jagged.from_lengths(torch.cat([m["item"] for m in remembered]), length_B[fits_B])
    row_m = fits_B.nonzero()[:, 0][known.row_of_value]
    event_m = events.offsets[row_m] + known.position_of_value
    columns = {"item": events.values, "time": history.time, "action": history.action}
    differs_m = torch.zeros_like(row_m, dtype=torch.bool)
    for name, column in columns.items():
        differs_m |= torch.cat([m[name] for m in remembered]) != column[event_m]
    fits_B[row_m[differs_m]] = False
    return fits_B
