"""HSTU as a ranker: what was met and what was done with it as one sequence, each candidate a further token of it.

"Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for Generative Recommendations", Zhai et al., ICML 2024:
ranking as transduction (section 2.2, table 1), generative training (2.3), M-FALCON (appendix H). The layer is in layers/hstu.py, the
tokens in layers/hstu_tokens.py.

M-FALCON: candidates see the history and themselves, not each other, and share one place and one time, so any number of them can be scored
in one pass, in micro-batches over the same keys and values of the history, with the scores that each would get alone. Between requests
of a user the keys and values of all events but the last are kept: the last one's bias looks ahead to the time of the request.

Generative training, a first phase where it is chosen, learns at all positions of one sequence per user: the outcome at each item where
actions name it ("actions", interleaved tokens: exactly what scoring a candidate at that moment would compute), else the next item
("next").

Differences from the paper:
1. The candidate's output goes through the tower of the other rankers, with pair fields; beside it stand the item, and the products
   of item with output and with the user's last output. A learned part of the score that the "next" objective gives the item is
   added: what the first phase learned need not be learned again. Losses are per task; the weighting of tasks is the trainer's.
2. One item stands once in a group, with all that was done to it; in "actions" only the first item of a group is asked about, since the
   others were met together with it.
3. An item's outcome is asked at its own time, an action's token at the next event's: both are known when they are asked.
4. The research code ranks nothing; the layer's forms are `layers.variant`, and PRODUCTION is the authors' ranking example. A context field
   is one table or map per field; the weights of an action's bits are shared by all layers.

B requests, E events, T tokens of histories, S of them new, t candidates, F prefix tokens, k tokens of an event, A actions, L layers,
H heads, D width, W first hidden layer of the tower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from shortlist.data.batches import Batch, Candidates, NextTargets
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Space
from shortlist.embeddings.base import TableChoice
from shortlist.errors import ConfigError
from shortlist.kernels.hstu_attention import Sequences
from shortlist.layers.fields import FieldEmbeddings, ItemEncoder
from shortlist.layers.hstu import HSTUBlockConfig, HSTUStack, KeysValues
from shortlist.layers.hstu_memory import Kept, kept_of, memories_of
from shortlist.layers.hstu_tokens import (
    EventTokens,
    Layout,
    Past,
    RequestMarks,
    TimeOfDay,
    TokenLayout,
    content_token,
    joined,
    layout_of,
    past_of,
    sequences_of,
    unknown_columns,
)
from shortlist.layers.losses import binary_loss
from shortlist.layers.next_item import NextItemConfig, NextItemLoss
from shortlist.layers.scoring import CandidateHead, HeadConfig, dense_bytes, linear_flops
from shortlist.models.base import Cost, Losses, Memory, Phase, Ranker, RequestShape, Scores
from shortlist.registry import system

Learning = Literal["both", "candidates", "generative"]
Generative = Literal["auto", "next", "actions"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HSTURankerConfig:
    """Settings of the HSTU ranker."""

    dim: int = 64
    """Width D of tokens."""
    tokens: TokenLayout = "merged"
    """merged: item and action are one token, half the length. interleaved: item, action, item, action: a past item's output can be
    asked for its outcome."""
    max_history: int = 200
    """Newest events read per request."""
    layers: HSTUBlockConfig = HSTUBlockConfig()  # noqa: RUF009  (frozen)
    """The layers."""
    dropout: float = 0.2
    """Share of token values dropped in training."""
    micro_batch: int = 128
    """Candidates of a request in one pass; the scores do not depend on it."""
    learning: Learning = "candidates"
    """candidates: what earlier stages let through, all of a request in one sequence. both: first the generative phase, which reads far
    more events, but costs time and did not help where we tried it in a cascade. generative: that phase alone; wants tasks that actions
    name, and reads no pair fields."""
    generative: Generative = "auto"
    """What the generative phase predicts: the outcome of every item (actions), the next item (next), or actions where they can be."""
    positive_actions: tuple[str, ...] = ()
    """Actions that are a positive outcome of the first task; an action with a task's own name always is one of that task."""
    generative_epochs: int | None = None
    """Epochs of the generative phase; None = as the trainer's settings say. Nothing stops it early: its goal is another one."""
    objective: NextItemConfig = NextItemConfig(  # noqa: RUF009  (frozen)
        loss="sampled_softmax", num_negatives=128, normalise=True, temperature=0.05
    )
    """How the next item is asked for."""
    prefix: bool = False
    """Put user and context fields before the events, one token each. A field that changes between requests empties the memory."""
    value_buckets: int = 0
    """Doublings of an event's worth that are told apart; 0 = the worth is not read."""
    places_from_end: bool = False
    """Add each token's place counted back from the candidates. Keys and values can then not be kept between requests."""
    time_to_request: bool = False
    """Add each token's time up to the request, in 2,048 buckets. Keys and values can then not be kept between requests."""
    time_of_day: bool = False
    """Add hour and weekday of the request to the candidate's output."""
    use_ids: bool = True
    """Read the items' own id rows; False leaves only their fields."""
    id_dropout: float = 0.05
    """Share of id rows replaced by the unknown row in training, so that new items have one that is trained."""
    head: HeadConfig = HeadConfig()  # noqa: RUF009  (frozen)
    """The tower."""
    table: TableChoice = TableChoice()  # noqa: RUF009  (frozen)
    """Which table holds the id rows."""

    def __post_init__(self) -> None:
        for name, least in (("dim", 1), ("max_history", 1), ("micro_batch", 1), ("value_buckets", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"hstu-ranker: {name} must be at least {least}, got {getattr(self, name)}")
        for name in ("dropout", "id_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"hstu-ranker: {name} must be from 0 to below 1, got {getattr(self, name)}")
        choices = {"tokens": TokenLayout, "learning": Learning, "generative": Generative}
        for name, options in choices.items():
            if getattr(self, name) not in options.__args__:  # type: ignore[attr-defined]
                known = ", ".join(options.__args__)  # type: ignore[attr-defined]
                raise ConfigError(f"hstu-ranker: {name} must be one of {known}, got {getattr(self, name)!r}")
        if self.generative == "actions" and self.tokens == "merged":
            raise ConfigError(
                'hstu-ranker: generative = "actions" needs tokens = "interleaved": merged ones show the outcome'
            )
        if self.learning != "candidates" and (self.places_from_end or self.time_to_request):
            raise ConfigError(
                "hstu-ranker: places_from_end and time_to_request count from one request, a generative phase has many; "
                'set learning = "candidates"'
            )
        self.layers.check("hstu-ranker", self.dim)
        self.head.check("hstu-ranker")
        self.objective.check_objective("hstu-ranker", sparse=self.table.sparse)


PRODUCTION: Mapping[str, Any] = {
    "dim": 512,
    "tokens": "merged",
    "learning": "candidates",
    "prefix": True,
    "places_from_end": True,
    "time_to_request": True,
    "time_of_day": True,
    "dropout": 0.2,
    "layers": HSTUBlockConfig(
        variant="production",
        num_blocks=5,
        num_heads=4,
        qk_dim=128,
        v_dim=128,
        position_bias=False,
        time_bias=False,
        block_dropout=0.1,
    ),
    "head": HeadConfig(widths=(512,), activation="relu", loss="bce"),
}
"""The authors' ranking example as settings; its own losses weigh 0.2 each, and it learns from at most 10 targets per sequence."""


class HSTUState(NamedTuple):
    """The request's side, made once."""

    known: list[KeysValues]
    """Per layer keys and values of all history tokens, [T, H, ...]."""
    offsets_B1: Tensor
    """int64: cuts of the tokens."""
    position_T: Tensor
    key_time_T: Tensor
    time_B: Tensor
    """int64 seconds of the requests."""
    user_BD: Tensor
    """Output at the last token; 0 where there is none."""
    request_BW: Tensor
    """The request's part of the tower's first layer."""


@system(
    "hstu-ranker",
    stage="ranking",
    paper="Zhai et al., ICML 2024",
    needs={"order", "history"},
    cold_users=True,
    cold_items=True,
    tiny={
        "dim": 8,
        "max_history": 10,
        "dropout": 0.0,
        "micro_batch": 4,
        "layers": HSTUBlockConfig(num_blocks=1, block_dropout=0.0),
        "head": HeadConfig(widths=(16,), dropout=0.0),
    },
)
class HSTURanker(Ranker):
    """The user's events and actions as one causal sequence, candidates as tokens behind it that do not see each other."""

    Config = HSTURankerConfig
    config: HSTURankerConfig

    def __init__(self, config: HSTURankerConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.max_history
        dim = config.dim
        readable = space if config.use_ids else replace(space, known_items=torch.zeros_like(space.known_items))
        self.items = ItemEncoder(readable, dim, id_dropout=config.id_dropout, table=config.table)
        self.tokens = EventTokens(len(space.actions), dim, config.tokens, config.value_buckets)
        self.user_prefix = FieldEmbeddings(space.user_fields if config.prefix else (), dim)
        self.context_prefix = FieldEmbeddings(space.context_fields if config.prefix else (), dim)
        self.num_prefix = len(self.user_prefix.fields) + len(self.context_prefix.fields)
        length = self.num_prefix + self.tokens.per_event * config.max_history + 1
        self.dropout = nn.Dropout(config.dropout)
        self.stack = HSTUStack(dim, length, config.layers, has_clock=space.has_clock)
        if not space.has_clock and (config.time_to_request or config.time_of_day):
            raise ConfigError("hstu-ranker: time_to_request and time_of_day need times, which this log lacks")
        self.marks = RequestMarks(dim, length if config.places_from_end else 0, reads_time=config.time_to_request)
        self.norm = nn.LayerNorm(dim)
        self.time_of_day = TimeOfDay(dim) if config.time_of_day else None
        self.objective = NextItemLoss(config.objective, space, has_fields=bool(self.items.num_fields))
        seen = space.with_pairs(()) if config.learning == "generative" else space
        self.head = CandidateHead(seen, dim, 4 * dim, config.head, table=config.table)
        self.outcomes = _outcomes(config, space)
        self.predicts = _predicts(config, space, self.outcomes)
        # Among candidates of a softmax the next item is what is asked for; a probability of an outcome is something else.
        starts_from_match = config.learning == "both" and self.predicts == "next" and config.head.loss == "softmax"
        self.match_gain = nn.Parameter(torch.full((len(space.tasks),), float(starts_from_match)))

    @property
    def reads_time(self) -> bool:
        """Whether any part of the model depends on times."""
        config = self.config
        return self.space.has_clock and (config.layers.time_bias or config.time_to_request or config.time_of_day)

    @property
    def remembers(self) -> bool:
        """Whether keys and values of a history stay what they are when a later request comes."""
        return not (self.config.places_from_end or self.config.time_to_request)

    # -- the history -------------------------------------------------------------------------------------------------

    def user_state(self, batch: Batch) -> HSTUState:
        """See HSTUState: keys and values of T events (T, H, d) and the request's side (B, W)."""
        past = self._past(batch)
        return self._encode(batch, past, self._layout(past), self._prefix(batch))[0]

    def _past(self, batch: Batch) -> Past:
        history = batch.history.last(self.max_history)
        return past_of(history, batch.time, len(self.space.actions), reads_time=self.reads_time)

    def _layout(self, past: Past) -> Layout:
        return layout_of(past, self.tokens.per_event, self.num_prefix)

    def _prefix(self, batch: Batch) -> Tensor:
        """float32 [B, F, D]."""
        parts = [
            self.user_prefix(batch.user_fields, batch.size),
            self.context_prefix(batch.context, batch.size),
        ]
        return torch.cat(parts, dim=1)

    def _encode(
        self,
        batch: Batch,
        past: Past,
        layout: Layout,
        prefix_BFD: Tensor,
        kept: Kept | None = None,
        *,
        only_newest: bool = True,
    ) -> tuple[HSTUState, Tensor]:
        """The state, and the output of the tokens that were not kept [S, D], or of each history's newest token alone [R, D]."""
        kept_B = torch.zeros_like(batch.time) if kept is None else kept.num_events_B
        new_E = past.items.position_of_value >= kept_B[past.items.row_of_value]
        event_SD = self.tokens.events(self.items(past.items.values[new_E]), past.acted_EA[new_E], past.value_E[new_E])
        new_T = torch.cat([new_E, new_E[:0].new_ones(1)])[layout.event_T]
        if self.num_prefix:
            new_T = torch.where(layout.event_T < 0, kept_B[layout.row_T] == 0, new_T)
        is_event_S = layout.event_T[new_T] >= 0
        x_SD = event_SD.new_empty(len(is_event_S), self.config.dim)
        x_SD[is_event_S] = event_SD
        x_SD[~is_event_S] = prefix_BFD[kept_B == 0].flatten(0, 1)
        if not self.remembers:
            places_T = layout.lengths_B[layout.row_T] - layout.position_T
            x_SD = self.marks(x_SD, places_T, batch.time[layout.row_T] - layout.key_time_T)
        sequences = sequences_of(layout, new_T)
        before = None if kept is None else kept.before
        y_SD, known = self.stack(self.dropout(x_SD), sequences, before, only_newest=only_newest)
        y_SD, has_any_B = self.norm(y_SD), layout.lengths_B > 0
        user_BD = y_SD.new_zeros(batch.size, self.config.dim)
        user_BD[has_any_B] = y_SD if only_newest else y_SD[sequences.query_offsets[1:][has_any_B] - 1]
        state = HSTUState(
            known=known,
            offsets_B1=layout.offsets_B1,
            position_T=layout.position_T,
            key_time_T=layout.key_time_T,
            time_B=batch.time if self.reads_time else torch.zeros_like(batch.time),
            user_BD=user_BD,
            request_BW=self.head.request_side(batch),
        )
        return state, y_SD

    # -- candidates --------------------------------------------------------------------------------------------------

    def score_candidates(self, state: HSTUState, candidates: Candidates) -> Scores:
        """Logits [t] per task: M-FALCON, then the tower."""
        rows = candidates.rows
        item_tD = self.items(rows.values)
        output_tD = self.outputs(state, rows.with_values(self.tokens.candidates(item_tD)))
        request_t = rows.row_of_value
        user_tD, time_t = state.user_BD[request_t], state.time_B[request_t]
        return self._logits(state.request_BW, candidates, item_tD, output_tD, user_tD, time_t)

    def outputs(self, state: HSTUState, token: Jagged) -> Tensor:
        """The stack's output [t, D] at tokens behind each history that do not see each other, `micro_batch` per request at a time."""
        longest = int(token.lengths.max()) if len(token.values) else 0
        step = max(longest, 1) if self.training else self.config.micro_batch
        if longest <= step:
            return self._micro_batch(state, token)
        output_tD, place_t = torch.empty_like(token.values), token.position_of_value
        for first in range(0, longest, step):
            index = ((place_t >= first) & (place_t < first + step)).nonzero()[:, 0]
            lengths_B = (token.lengths - first).clamp(min=0, max=step)
            output_tD[index] = self._micro_batch(state, Jagged.from_lengths(token.values[index], lengths_B))
        return output_tD

    def _micro_batch(self, state: HSTUState, token: Jagged) -> Tensor:
        if not len(token.values):
            return self.norm(token.values)
        request_t, x_tD = token.row_of_value, token.values
        num_history_B = state.offsets_B1.diff()
        time_t = state.time_B[request_t]
        position = joined(Jagged(state.position_T, state.offsets_B1), token.with_values(num_history_B[request_t]))
        key_time = joined(Jagged(state.key_time_T, state.offsets_B1), token.with_values(time_t))
        sequences = Sequences(
            offsets=position.offsets,
            query_offsets=token.offsets,
            num_history=num_history_B,
            position=position.values,
            key_time=key_time.values,
            query_time=time_t,
        )
        if not self.remembers:
            x_tD = self.marks(x_tD, torch.zeros_like(request_t), torch.zeros_like(request_t))
        y_tD, _ = self.stack(self.dropout(x_tD), sequences, state.known)
        return self.norm(y_tD)

    def _logits(
        self,
        request_BW: Tensor,
        candidates: Candidates,
        item_tD: Tensor,
        output_tD: Tensor,
        user_tD: Tensor,
        time_t: Tensor,
    ) -> Scores:
        """Logits [t] per task: the tower's, and a learned part of the score that the next-item objective gives."""
        if self.time_of_day is not None:
            output_tD = self.time_of_day(output_tD, time_t)
        side_tV = torch.cat([item_tD, output_tD, item_tD * output_tD, item_tD * user_tD], dim=1)
        logits = self.head(request_BW, candidates, side_tV)
        match_t = (self.objective.query(user_tD) * self.objective.vectors(item_tD)).sum(1)
        return {task: logits[task] + gain * match_t for task, gain in zip(logits, self.match_gain, strict=True)}

    # -- learning ----------------------------------------------------------------------------------------------------

    def phases(self) -> tuple[Phase, ...]:
        """The generative phase, the candidates' phase, or both in this order."""
        generative = Phase(
            name="generative",
            feed="next_event",
            losses=self.generative_losses,
            epochs=self.config.generative_epochs,
        )
        candidates = Phase(name="candidates", feed="candidates", losses=self.losses)
        return {
            "both": (generative, candidates),
            "generative": (generative,),
            "candidates": (candidates,),
        }[self.config.learning]

    def losses(self, batch: Batch) -> Losses:
        """By task, for a batch of candidates: all of a request in one sequence, blind to each other."""
        return self.head.losses(self.score(batch), batch)

    def generative_losses(self, batch: Batch) -> Losses:
        """Of a next-event batch: by task at every item, or {"next": loss} at every end of a group."""
        if self.predicts == "next":
            return {"next": self._next_loss(batch)}
        logits, labels = self.outcomes_at_all(batch)
        return {task: binary_loss(logits[task], label) for task, label in labels.items()}

    def _at_all_tokens(self, batch: Batch) -> tuple[Past, HSTUState, Tensor, Tensor]:
        """Events and state of a next-event batch, the token of each event's item [E], and the output at all tokens [T, D].

        What the context of a past moment was is not known.
        """
        context = {**unknown_columns(self.space.context_fields, batch.size, batch.user.device), **batch.context}
        batch = replace(batch, context=context)
        past = self._past(batch)
        layout = self._layout(past)
        state, y_TD = self._encode(batch, past, layout, self._prefix(batch), only_newest=False)
        return past, state, content_token(past, layout, self.tokens.per_event, self.num_prefix), y_TD

    def outcomes_at_all(self, batch: Batch) -> tuple[Scores, dict[str, Tensor]]:
        """Logits [t] per task, and float32 labels [t] of those that actions name, at every event that can be asked about.

        Those open a group, and their action is known. Wants interleaved tokens; the batch's targets are not read.
        """
        past, state, content_E, y_TD = self._at_all_tokens(batch)
        # An event of unknown action says nothing of its outcome: it is read, but not asked about.
        asked_E = past.opens_group_E & past.acted_EA.any(1)
        asked = asked_E.nonzero()[:, 0]
        token_t, row_t = content_E[asked], past.items.row_of_value[asked]
        item_tD = self.items(past.items.values[asked])
        before_tD = y_TD[(token_t - 1).clamp(min=0)]
        starts_t = token_t == state.offsets_B1[row_t]
        before_tD = before_tD.masked_fill(starts_t[:, None], 0)
        rows = Jagged.from_lengths(past.items.values[asked], torch.bincount(row_t, minlength=past.num_requests))
        nothing = item_tD.new_zeros(len(asked))
        pair = {field.name: nothing for field in self.space.pair_fields}
        labels = {
            task: past.acted_EA[asked][:, list(actions)].any(1).to(y_TD.dtype)
            for task, actions in self.outcomes.items()
            if actions
        }
        candidates = Candidates(rows=rows, pair=pair)
        logits = self._logits(state.request_BW, candidates, item_tD, y_TD[token_t], before_tD, past.time_E[asked])
        return logits, labels

    def _next_loss(self, batch: Batch) -> Tensor:
        targets = batch.targets
        if targets is None:
            raise ValueError("hstu-ranker's generative phase learns from next-event batches; this one has no targets")
        past, _, content_E, y_TD = self._at_all_tokens(batch)
        rows = batch.history.items
        # Positions before the newest max_history events are cut off with them.
        cut_B = (rows.lengths - self.max_history).clamp(min=0)
        row_P = rows.row_of_value[targets.position]
        inside = (targets.position - rows.offsets[row_P] >= cut_B[row_P]).nonzero()[:, 0]
        position = targets.position[inside] - cut_B.cumsum(0)[row_P[inside]]
        event_P = past.last_of_group_h[position]
        kept = NextTargets(
            position=event_P,
            items=targets.items.select(inside),
            weight=targets.weight[targets.items.value_index(inside)],
        )
        query_PD = y_TD[content_E[event_P] + self.tokens.per_event - 1]
        return self.objective(self.items, query_PD, kept, past.items)

    # -- memories ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def recall(self, batch: Batch, memories: Sequence[Memory | None]) -> tuple[HSTUState, list[Memory | None]]:
        """See Remembering; equal to `user_state` to rounding.

        Of a memory the longest part is used that the new history begins with, so events that are gone or changed cost only what came
        after them; a window that slid changes the first event and costs all.
        """
        if not self.remembers:
            return self.user_state(batch), [None] * batch.size
        past, prefix_BFD = self._past(batch), self._prefix(batch)
        kept = kept_of(past, prefix_BFD, memories, self.tokens.per_event)
        state, _ = self._encode(batch, past, self._layout(past), prefix_BFD, kept)
        return state, list(memories_of(state.known, past, prefix_BFD, self.tokens.per_event))

    # -- cost --------------------------------------------------------------------------------------------------------

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Once: the layers over all history tokens; `cached`: over the last event's, the only ones that a memory lacks. Per candidate:
        one token through the layers, over all keys of the history, and the tower. Norms, biases and look-ups are not counted.
        """
        config, block = self.config, self.config.layers
        num_past, k = min(shape.num_history, config.max_history), self.tokens.per_event
        length = self.num_prefix + k * num_past
        item, action = linear_flops(self.items), linear_flops(self.tokens.actions)
        is_cached = cached and self.remembers and num_past > 0
        num_new = 1 if is_cached else num_past
        new_tokens = k if is_cached else length
        layers = self.stack.flops(new_tokens, length - new_tokens, only_newest=True)
        user = num_new * (item + action) + layers + self.head.request_flops
        after = 0 if self.time_of_day is None else linear_flops(self.time_of_day)
        per_candidate = item + self.stack.flops(1, length) + after + self.head.candidate_flops
        num_passes = -(-shape.num_candidates // config.micro_batch)
        d, e = block.qk_dim or config.dim // block.num_heads, block.v_dim or config.dim // block.num_heads
        kept = 4.0 * length * block.num_blocks * block.num_heads * (d + e) * num_passes
        rows = 4.0 * config.dim * (shape.num_candidates + num_new)
        return Cost(user_flops=float(user), item_flops=float(per_candidate), bytes=dense_bytes(self) + kept + rows)


def _outcomes(config: HSTURankerConfig, space: Space) -> dict[str, tuple[int, ...]]:
    """By task the places of the actions that are its positive outcome; ConfigError for an action that the log lacks."""
    unknown = [name for name in config.positive_actions if name not in space.actions]
    if unknown:
        raise ConfigError(
            f"hstu-ranker: positive_actions names {unknown[0]!r}; the log's actions are {', '.join(space.actions)}"
        )
    named = {task: {task} for task in space.tasks}
    named[space.tasks[0]] |= set(config.positive_actions)
    return {task: tuple(i for i, a in enumerate(space.actions) if a in names) for task, names in named.items()}


def _predicts(
    config: HSTURankerConfig, space: Space, outcomes: Mapping[str, tuple[int, ...]]
) -> Literal["next", "actions"]:
    """What the generative phase predicts; ConfigError where that can not be learned."""
    lacking = [task for task, actions in outcomes.items() if not actions]
    can_ask = config.tokens == "interleaved" and len(lacking) < len(outcomes) and len(space.actions) > 1
    predicts: Literal["next", "actions"] = "next"
    if config.generative == "actions" or (config.generative == "auto" and can_ask):
        predicts = "actions"
    if predicts == "actions" and not can_ask:
        raise ConfigError(
            f"hstu-ranker: no action of the log ({', '.join(space.actions)}) is an outcome of {', '.join(lacking)}; "
            'name some in positive_actions, or set generative = "next"'
        )
    if config.learning == "generative" and (predicts == "next" or lacking):
        raise ConfigError(
            'hstu-ranker: learning = "generative" must learn every task from actions; set tokens = "interleaved" and name '
            f'positive_actions, or set learning = "both" (tasks without an action: {", ".join(lacking) or "none"})'
        )
    return predicts
