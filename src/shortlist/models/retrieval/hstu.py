"""HSTU: one causal stack of pointwise attention over a user's events, with relative position and time (Zhai et al., ICML 2024).

The retriever of the authors' public code: the last position's vector asks for the next item. The layer is in
`layers/hstu.py`, its attention in `kernels/hstu_attention.py`, the objective in `layers/next_item.py`.

B users, T = all history events of the batch end to end, P supervised positions, n items (matrices have n + 1 rows), D width.

Differences from the public code, each a setting or stated here:
- the loss is a full softmax of inner products, which ranked better; the public code's, sampled softmax of cosines / 0.05, is a setting,
  and so is that one draw of distinct negatives per step serves all positions (`negatives`);
- only positions that end a group are supervised, by all items of the next group;
- item fields, and actions where the log has several, are added to the item's vector (one merged token per event; the public code
  reads neither, the authors' ranking example adds them so);
- without cosine a layer norm stands before the scores;
- Stochastic Length, which the public code lacks: `stochastic_length`. Kept events keep their place, their time and their target, so
  that training on a part asks what serving asks of the whole;
- a user without known history gets the ranking by popularity, through one extra column of the vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from shortlist.data.batches import Batch, NextTargets
from shortlist.data.histories import View
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Space
from shortlist.errors import ConfigError
from shortlist.kernels.hstu_attention import Sequences
from shortlist.layers.counting import popularity_order
from shortlist.layers.dropout import Dropout
from shortlist.layers.factors import beside_popularity
from shortlist.layers.hstu import HSTUBlock, HSTUBlockConfig, HSTUStack, KeysValues
from shortlist.layers.item_sequences import (
    SequenceConfig,
    item_encoder,
    readable_rows,
    user_vectors,
)
from shortlist.layers.next_item import NextItemLoss
from shortlist.models.base import Cost, Losses, Memory, RequestShape, VectorRetriever
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class HSTUConfig(SequenceConfig):
    """Settings of HSTU beside those of the objective.

    The public code's objective is loss = "sampled_softmax", num_negatives = 128, negatives = "own", normalise = true and temperature
    = 0.05; where all items can be scored, a full softmax ranks better (`evidence/hstu_ml100k.py`), so that is the default.
    """

    dim: int = 64
    """Width D of item vectors and of the whole network."""
    max_history: int = 200
    """Newest events read per user; also the constant that attention sums are divided by, in training and serving alike."""
    layers: HSTUBlockConfig = field(default_factory=HSTUBlockConfig)
    """The stack. variant = "production" with position_bias and time_bias off is the authors' ranking example."""
    dropout: float = 0.2
    """Share of the input dropped in training; `layers.block_dropout` is that inside the layers."""
    query_time: Literal["next", "own"] = "next"
    """Which time an event's time bias looks back from. next: that of the next event, and of the last one the request's, as published;
    own: the event's own, which knows nothing of when the user comes back."""
    use_actions: bool = True
    """Add the action's vector to the item's where the log has more than one action."""
    stochastic_length: float | None = None
    """alpha in (1, 2] of Stochastic Length: in training most histories longer than max_history ^ (alpha / 2) are thinned to so many
    events, which makes attention cost max_history ^ alpha; None = off. Serving always reads the whole history."""

    def __post_init__(self) -> None:
        self.check("hstu", positive=("dim", "max_history"), shares=("dropout",))
        if self.stochastic_length is not None and not 1 < self.stochastic_length <= 2:
            raise ConfigError(f"hstu: stochastic_length must be above 1 and at most 2, got {self.stochastic_length}")
        self.layers.check("hstu", self.dim)


class Events(NamedTuple):
    """What the network reads of the histories of a batch, T events of all users end to end."""

    rows: Jagged
    """int64 catalogue rows."""
    action_T: Tensor
    """int64 action ids."""
    time_T: Tensor
    """int64 seconds."""
    query_time_T: Tensor
    """int64 seconds: the time that each event asks about."""
    place_T: Tensor
    """int64: 0 for the oldest event of a user's window."""

    def only(self, keep_T: Tensor) -> Events:
        """The events where the mask [T] bool is True; they keep their times and places."""
        rows = self.rows.keep(keep_T)
        times = self.time_T[keep_T], self.query_time_T[keep_T]
        return Events(rows, self.action_T[keep_T], *times, self.place_T[keep_T])

    def marks(self) -> Tensor:
        """int64 [T, 4]: all that is read of an event, to tell whether a memory is of the same events."""
        return torch.stack([self.rows.values, self.action_T, self.time_T, self.query_time_T], dim=1)


@system(
    "hstu",
    stage="retrieval",
    paper="Zhai et al., ICML 2024",
    needs={"order", "history"},
    cold_users=True,
    cold_items=True,
    tiny={"dim": 8, "max_history": 10, "dropout": 0.0, "layers": HSTUBlockConfig(num_blocks=1, block_dropout=0.0)},
)
class HSTU(VectorRetriever):
    """Pointwise attention over the user's events with relative time; the last position's vector asks for the next item."""

    Config = HSTUConfig
    feed = "next_event"
    config: HSTUConfig
    popularity_N: Tensor

    def __init__(self, config: HSTUConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.max_history
        self.items = item_encoder(space, config.dim, config)
        has_actions = config.use_actions and len(space.actions) > 1
        self.actions = nn.Embedding(len(space.actions) + 1, config.dim) if has_actions else None
        self.places = nn.Embedding(config.max_history, config.dim)
        self.dropout = Dropout(config.dropout)
        self.stack = HSTUStack(config.dim, config.max_history, config.layers, has_clock=space.has_clock)
        # Cosine has its own norm.
        self.norm = nn.Identity() if config.normalise else nn.LayerNorm(config.dim)
        self.objective = NextItemLoss(config, space, has_fields=bool(self.items.num_fields))
        nn.init.trunc_normal_(self.places.weight, std=config.dim**-0.5)
        if self.actions is not None:
            nn.init.normal_(self.actions.weight, std=config.table.init_std)
        self.register_buffer("popularity_N", torch.zeros(space.num_items + 1))

    def prepare(self, view: View) -> None:
        """What to show to users without history."""
        self.buffer("popularity_N", popularity_order(view, self.config.window_days).to(self.space_device()))

    def losses(self, batch: Batch) -> Losses:
        """{"next": loss} of a next-event batch; 0 where no position is supervised."""
        targets = batch.targets
        if targets is None:
            raise ValueError("hstu learns from next-event batches; this one has no targets")
        events = self._events(batch)
        if self.config.stochastic_length is not None and self.training:
            keep_T = stochastic_length(events, self.config.stochastic_length, self.max_history, self.space.has_clock)
            events, targets = events.only(keep_T), kept_targets(targets, keep_T)
        rows = events.rows
        all_items_ND = self.items.all() if self.config.loss == "full_softmax" else None
        item_TD = (
            self.items(rows.values) if all_items_ND is None else nn.functional.embedding(rows.values, all_items_ND)
        )
        query_PD = self._query(events, item_TD).index_select(0, targets.position)
        return {"next": self.objective(self.items, query_PD, targets, rows, all_items_ND)}

    def _events(self, batch: Batch, keep_T: Tensor | None = None) -> Events:
        """The batch's events; with `keep_T` [T] bool only those, and of them the newest `max_history`."""
        history = batch.history
        time_T, action_T, rows = history.time, history.action, history.items
        if keep_T is not None:
            window_T = newest(rows, keep_T, self.max_history)
            time_T, action_T = time_T[window_T], action_T[window_T]
            rows = rows.keep(window_T)
        query_time_T = next_times(time_T, batch.time, rows) if self.config.query_time == "next" else time_T
        return Events(rows, action_T, time_T, query_time_T, rows.position_of_value)

    def _query(self, events: Events, item_TD: Tensor) -> Tensor:
        """float [T, D]: what each event asks for, from it and the events before it, and the time of the one after it."""
        x_TD, _ = self.stack(self._input(events, item_TD), sequences_of(events, events.rows, events.query_time_T))
        return self.norm(x_TD)

    def _input(self, events: Events, item_TD: Tensor) -> Tensor:
        """float [T, D]: the tokens, from the items' vectors."""
        if self.actions is not None:
            item_TD = item_TD + self.actions(events.action_T)
        place_TD = self.places(events.place_T.clamp(max=self.max_history - 1))
        return self.dropout(item_TD * self.config.dim**0.5 + place_TD)

    def encode_user(self, batch: Batch) -> Tensor:
        """float32 [B, D + 1]: the last position's vector and 0; for users without a known event zeros and 1 (popularity)."""
        events = self._events(batch, readable_rows(self.items, batch.history.items))
        rows = events.rows
        sequences = sequences_of(events, rows, events.query_time_T)
        x_RD, _ = self.stack(self._input(events, self.items(rows.values)), sequences, only_newest=True)
        return self._user(x_RD, rows)

    def _user(self, x_RD: Tensor, rows: Jagged) -> Tensor:
        """float32 [B, D + 1] from the output at the newest event of each of R users with events, who have their events in `rows`."""
        has_history_B = rows.lengths > 0
        user_BD = x_RD.new_zeros(rows.num_rows, self.config.dim)
        user_BD[has_history_B] = self.objective.query(self.norm(x_RD))
        return user_vectors(user_BD, rows)

    @torch.no_grad()
    def recall(self, batch: Batch, memories: Sequence[Memory | None]) -> tuple[Tensor, list[Memory | None]]:
        """See Remembering: only events after those of the memory pass through the layers.

        A memory holds each layer's keys and values of all events but the last, whose question knew the time of that request alone. It
        is passed over where the history does not begin with its events, as when the window slid.
        """
        events = self._events(batch, readable_rows(self.items, batch.history.items))
        rows, mark_T4 = events.rows, events.marks()
        parts_B = mark_T4.split(rows.lengths.tolist())
        fits = [
            m if m is not None and begins_with(p, m["marks"]) else None for p, m in zip(parts_B, memories, strict=True)
        ]
        num_known_B = torch.tensor([0 if m is None else len(m["marks"]) for m in fits], device=rows.offsets.device)
        is_new_T = rows.position_of_value >= num_known_B[rows.row_of_value]
        fresh = events.only(is_new_T)
        before = [self._remembered(fits, layer) for layer in range(len(self.stack.blocks))]
        sequences = sequences_of(events, fresh.rows, fresh.query_time_T)
        tokens_SD = self._input(fresh, self.items(fresh.rows.values))
        x_RD, known = self.stack(tokens_SD, sequences, before, only_newest=True)
        user_BX = self._user(x_RD, fresh.rows)
        columns: dict[str, Tensor] = {"marks": mark_T4}
        for layer, (k_THd, v_THe) in enumerate(known):
            columns[f"k{layer}"], columns[f"v{layer}"] = k_THd, v_THe
        cut = {name: column.split(rows.lengths.tolist()) for name, column in columns.items()}
        # Clones: a view would keep the whole batch alive.
        kept: list[Memory | None] = [
            {name: part[b][:-1].clone() for name, part in cut.items()} if len(parts_B[b]) > 1 else None
            for b in range(batch.size)
        ]
        return user_BX, kept

    def _remembered(self, memories: Sequence[Memory | None], layer: int) -> KeysValues:
        """Keys and values of a layer, of all memories end to end."""
        block = self.stack.blocks[layer]
        assert isinstance(block, HSTUBlock)
        found = [m for m in memories if m is not None]
        nothing = self.places.weight.new_zeros(0, block.heads, 1)
        if not found:
            return KeysValues(nothing.expand(0, -1, block.d), nothing.expand(0, -1, block.e))
        return KeysValues(*(torch.cat([m[f"{name}{layer}"] for m in found]) for name in "kv"))

    def encode_items(self, rows: Tensor) -> Tensor:
        """float32 [n, D + 1]: the item's vector and its popularity in 0..1, which only users without history read."""
        return beside_popularity(self.objective.vectors(self.items(rows)), self.popularity_N[rows]).float()

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Layers over the history once, then one inner product per item; norms, gates, biases and look-ups are not counted."""
        config = self.config
        length = min(shape.num_history, config.max_history)
        layers = self.stack.flops(length, only_newest=True)
        fields = 2 * length * self.items.num_fields * config.dim * config.dim
        weights = sum(p.numel() for p in self.stack.parameters())
        return Cost(
            user_flops=0.0 if cached else layers + fields,
            item_flops=2.0 * (config.dim + 1),
            bytes=4.0 * (0 if cached else weights + 2 * length * config.dim) + 4.0 * shape.num_items * (config.dim + 1),
        )


def sequences_of(events: Events, fresh: Jagged, query_time_S: Tensor) -> Sequences:
    """For attention of the newest events of each user, `fresh`, over all its events."""
    rows = events.rows
    return Sequences(
        offsets=rows.offsets,
        query_offsets=fresh.offsets,
        num_history=rows.lengths,
        position=events.place_T,
        key_time=events.time_T,
        query_time=query_time_S,
    )


def begins_with(mark_t4: Tensor, first_m4: Tensor) -> bool:
    """Whether a user's events begin with those of a memory and go on after them."""
    return len(mark_t4) > len(first_m4) and torch.equal(mark_t4[: len(first_m4)], first_m4)


def next_times(time_T: Tensor, request_time_B: Tensor, rows: Jagged) -> Tensor:
    """int64 [T] seconds: the time of each user's next event, and after the last one that of the request.

    Args:
        time_T: of the events; request_time_B of the requests.
        rows: only its offsets are read.
    """
    next_T = time_T.roll(-1)
    has_any_B = rows.lengths > 0
    next_T[rows.offsets[1:][has_any_B] - 1] = request_time_B[has_any_B]
    return next_T


def stochastic_length(events: Events, alpha: float, max_length: int, has_clock: bool) -> Tensor:
    """bool [T]: the events that training keeps (section 3.1 of the paper, "Stochastic Length").

    A history of n > N^(alpha / 2) events keeps them all with chance N^alpha / n^2, else a random choice of N^(alpha / 2) of them,
    drawn without replacement by weights 1 - f / sum f, f = an event's age before the newest one (in places without a clock).
    """
    rows, most = events.rows, max_length ** (alpha / 2)
    n_B = rows.lengths.double()
    thinned_B = (n_B > most) & (torch.rand_like(n_B) >= most**2 / n_B.clamp(min=1).square())
    when_T = events.time_T if has_clock else events.place_T
    row_T = rows.row_of_value
    newest_B = torch.zeros_like(rows.lengths).scatter_reduce(0, row_T, when_T, "amax", include_self=False)
    age_T = (newest_B[row_T] - when_T).double()
    sum_B = torch.zeros_like(n_B).index_add(0, row_T, age_T).clamp(min=1)
    # The smallest of exponential waiting times with these rates are a weighted draw without replacement.
    wait_T = torch.empty_like(age_T).exponential_() / (1 - age_T / sum_B[row_T]).clamp(min=1e-12)
    order = wait_T.argsort()
    order = order[row_T[order].argsort(stable=True)]
    rank_T = torch.empty_like(order)
    rank_T[order] = rows.position_of_value
    return ~thinned_B[row_T] | (rank_T < int(most))


def kept_targets(targets: NextTargets, keep_T: Tensor) -> NextTargets:
    """The supervision of the events that are kept, counted among them; their targets stay what they were."""
    chosen = keep_T[targets.position].nonzero()[:, 0]
    index, lengths = targets.items.where(chosen)
    return NextTargets(
        position=(keep_T.cumsum(0) - 1)[targets.position[chosen]],
        items=Jagged.from_lengths(targets.items.values[index], lengths),
        weight=targets.weight[index],
    )


def newest(rows: Jagged, keep_T: Tensor, most: int) -> Tensor:
    """bool [T]: the newest `most` of each row's values among those where `keep_T` [T] is True."""
    seen_T = keep_T.cumsum(0)
    total_B = torch.cat([seen_T.new_zeros(1), seen_T])[rows.offsets[1:]]
    return keep_T & (total_B[rows.row_of_value] - seen_T < most)
