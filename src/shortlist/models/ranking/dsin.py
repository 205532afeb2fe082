"""DSIN: a log falls into visits, alike within and different between; attention inside visits, a Bi-LSTM over them.

"Deep Session Interest Network for Click-Through Rate Prediction", Feng et al., IJCAI 2019. A visit ends where the next event comes more
than 30 minutes later. For the newest K visits Q_k of at most T events each:

    Q_k <- Q_k + BE,  BE(k, t, c) = w^K_k + w^T_t + w^C_c                           bias encoding, equation 2
    I_k = mean_t FFN(MultiHead(Q_k))                                              visit interest, equations 3 to 6
    H_k = forward LSTM_k(I) + backward LSTM_k(I)                                  how interests change, equation 8
    U_I = sum_k softmax_k(I_k W_I x) I_k,  U_H = sum_k softmax_k(H_k W_H x) H_k         activation by the candidate x, equations 9 and 10
    score = tower([x; U_I; U_H; user; context])

Nothing but the two activations and the tower knows the candidate: all the rest is made once per request.

Rebuilt from the paper and descriptions of its public implementation. Differences and what is not known:
1. Residuals and layer norms stand after attention and after the feed-forward part, as in the transformer; the paper names them without
   their place. Visits and places are numbered from the newest visit back, and from a visit's oldest kept event on.
2. Forward and backward states are added, as the paper writes; some implementations join them.
3. `session_by="count"` cuts every T events, counted from the newest, where a log has no clock: then nothing is known of visits, and the
   model is one of blocks.
4. `cross` gives the tower x * U_I and x * U_H as well, as DIN here has it. It reads pair fields, and the loss is a softmax over a
   request's candidates unless "bce", the paper's, is chosen.

B requests, E history events end to end, S visits of all requests end to end, K most visits of a request, T most events of a visit, C most
candidates of a request, t candidates end to end, D width, h heads, d = D / h, W first layer of the tower.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from shortlist.data.batches import Batch, Candidates, History
from shortlist.data.jagged import Jagged, segment_mean
from shortlist.data.schema import Space
from shortlist.embeddings.base import TableChoice
from shortlist.errors import ConfigError
from shortlist.layers.fields import ItemEncoder
from shortlist.layers.scoring import CandidateHead, EventMarks, HeadConfig, dense_bytes, linear_flops
from shortlist.layers.time_major import run_recurrent
from shortlist.models.base import Cost, Losses, Ranker, RequestShape, Scores
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class DSINConfig:
    """Settings of DSIN."""

    dim: int = 32
    """Width of one embedding and of a visit's interest."""
    num_heads: int = 2
    """Of the attention inside visits; must divide dim."""
    ffn_width: int = 64
    """Inner width of the feed-forward part."""
    dropout: float = 0.1
    """Of what attention and feed-forward add, in training."""
    session_by: Literal["gap", "count"] = "gap"
    """gap: a visit ends before a pause (the paper; needs a clock); count: blocks of session_length events."""
    gap_minutes: float = 30.0
    """A longer pause ends a visit."""
    num_sessions: int = 5
    """K: newest visits read."""
    session_length: int = 10
    """T: newest events read of each."""
    cross: bool = True
    """Give the tower the products of the candidate with both interests beside them."""
    head: HeadConfig = HeadConfig()  # noqa: RUF009  (frozen)
    """The tower."""
    max_history: int = 50
    """Newest events among which visits are sought."""
    use_ids: bool = True
    """Read the items' own id rows; False leaves only their fields."""
    id_dropout: float = 0.05
    """Share of item id rows replaced by the unknown row in training, so that new items have one that is trained."""
    table: TableChoice = TableChoice()  # noqa: RUF009  (frozen)
    """Which table holds the id rows."""

    def __post_init__(self) -> None:
        for name in ("dim", "num_heads", "ffn_width", "num_sessions", "session_length", "max_history"):
            if getattr(self, name) < 1:
                raise ConfigError(f"dsin: {name} must be at least 1, got {getattr(self, name)}")
        if self.dim % self.num_heads:
            raise ConfigError(f"dsin: num_heads must divide dim, got {self.num_heads} and {self.dim}")
        if self.session_by not in ("gap", "count"):
            raise ConfigError(f"dsin: session_by must be gap or count, got {self.session_by!r}")
        if not self.gap_minutes > 0:
            raise ConfigError(f"dsin: gap_minutes must be above 0, got {self.gap_minutes}")
        for name in ("dropout", "id_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"dsin: {name} must be from 0 to below 1, got {getattr(self, name)}")
        self.head.check("dsin")


class Sessions(NamedTuple):
    """Which events are read, and how they fall into visits."""

    is_read_E: Tensor
    """bool [E]."""
    events: Jagged
    """S visits, oldest first within a request; values are the catalogue rows of the events that are read."""
    visits: Jagged
    """B requests; values, int64 [S], number each visit from the newest (0) back."""


def cut_sessions(history: History, *, gap_seconds: float | None, num_sessions: int, session_length: int) -> Sessions:
    """The newest visits of each request, each with its newest events.

    Args:
        gap_seconds: an event that comes more than this after the one before it opens a visit; None = `session_length` events make one,
            counted from the newest.
    """
    rows = history.items
    position_E, row_E = rows.position_of_value, rows.row_of_value
    if gap_seconds is None:
        from_end_E = rows.lengths[row_E] - 1 - position_E
        opens_E = (from_end_E + 1) % session_length == 0
    else:
        opens_E = history.time.diff(prepend=history.time[:1]) > gap_seconds
    opens_E = opens_E | (position_E == 0)
    session_E = opens_E.cumsum(0) - 1
    all_events = Jagged.from_lengths(rows.values, torch.bincount(session_E))
    all_visits = Jagged.from_lengths(session_E[opens_E], torch.bincount(row_E[opens_E], minlength=rows.num_rows))
    back_S = all_visits.lengths[all_visits.row_of_value] - 1 - all_visits.position_of_value
    is_read_S = back_S < num_sessions
    from_end_E = all_events.lengths[session_E] - 1 - all_events.position_of_value
    is_read_E = is_read_S[session_E] & (from_end_E < session_length)
    kept_S = all_events.lengths.clamp(max=session_length)[is_read_S]
    return Sessions(
        is_read_E,
        Jagged.from_lengths(rows.values[is_read_E], kept_S),
        Jagged.from_lengths(back_S[is_read_S], all_visits.lengths.clamp(max=num_sessions)),
    )


class DSINState(NamedTuple):
    """The request's side, made once."""

    interest_SD: Tensor
    """Interest of each visit."""
    moving_SD: Tensor
    """The same in the light of the visits before and after it."""
    offsets: Tensor
    """int64 [B + 1]: whose visits they are."""
    request_BW: Tensor
    """The request's part of the tower's first layer."""


@system(
    "dsin",
    stage="ranking",
    paper="Feng et al., IJCAI 2019",
    needs={"history", "order"},
    cold_users=True,
    cold_items=True,
    tiny={"dim": 8, "ffn_width": 8, "dropout": 0.0, "session_length": 4, "head": HeadConfig(widths=(16,), dropout=0.0)},
)
class DSIN(Ranker):
    """Attention inside visits, a Bi-LSTM over them, and activation of both by the candidate."""

    Config = DSINConfig

    def __init__(self, config: DSINConfig, space: Space) -> None:
        super().__init__(config, space)
        if config.session_by == "gap" and not space.has_clock:
            raise ConfigError(
                'dsin: visits are cut by pauses, and this log has no times; set session_by = "count" for blocks of equal length'
            )
        self.max_history = config.max_history
        D = config.dim
        readable = space if config.use_ids else replace(space, known_items=torch.zeros_like(space.known_items))
        self.items = ItemEncoder(readable, D, id_dropout=config.id_dropout, table=config.table)
        self.marks = EventMarks(space, D)
        self.visit_bias = nn.Parameter(torch.zeros(config.num_sessions))
        self.place_bias = nn.Parameter(torch.zeros(config.session_length))
        self.unit_bias = nn.Parameter(torch.zeros(D))
        self.query_key_value = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.ffn = nn.Sequential(nn.Linear(D, config.ffn_width), nn.ReLU(), nn.Linear(config.ffn_width, D))
        self.norm_attention, self.norm_ffn = nn.LayerNorm(D), nn.LayerNorm(D)
        self.dropout = nn.Dropout(config.dropout)
        self.moving = nn.LSTM(D, D, bidirectional=True)
        self.ask_interest, self.ask_moving = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        self.head = CandidateHead(space, D, (5 if config.cross else 3) * D, config.head, table=config.table)

    def sessions(self, history: History) -> Sessions:
        """The visits that this system reads of a history."""
        config = self.config
        gap = 60 * config.gap_minutes if config.session_by == "gap" else None
        return cut_sessions(
            history, gap_seconds=gap, num_sessions=config.num_sessions, session_length=config.session_length
        )

    def user_state(self, batch: Batch) -> DSINState:
        """See DSINState."""
        history = batch.history.last(self.max_history)
        sessions = self.sessions(history)
        past_ED = self.marks(self.items(history.items.values), history, batch.time)[sessions.is_read_E]
        events = sessions.events
        bias_E = (
            self.visit_bias[sessions.visits.values][events.row_of_value] + self.place_bias[events.position_of_value]
        )
        interest_SD = self._interests(events.with_values(past_ED + bias_E[:, None] + self.unit_bias))
        both_S2D = run_recurrent(self.moving, sessions.visits.with_values(interest_SD))
        forward_SD, backward_SD = both_S2D.chunk(2, dim=1)
        return DSINState(interest_SD, forward_SD + backward_SD, sessions.visits.offsets, self.head.request_side(batch))

    def _interests(self, events: Jagged) -> Tensor:
        """[S, D]: attention inside each visit, and the mean of what comes out."""
        x_STD, is_real_ST = events.padded()
        heads = (self.config.num_heads, -1)
        q, k, v = (m.unflatten(2, heads).transpose(1, 2) for m in self.query_key_value(x_STD).chunk(3, dim=2))
        mixed_ShTd = scaled_dot_product_attention(q, k, v, attn_mask=is_real_ST[:, None, None, :])
        mixed_ED = mixed_ShTd.transpose(1, 2).flatten(2)[is_real_ST]
        x_ED = self.norm_attention(events.values + self.dropout(self.out(mixed_ED)))
        x_ED = self.norm_ffn(x_ED + self.dropout(self.ffn(x_ED)))
        return segment_mean(x_ED, events.row_of_value, events.num_rows)

    def score_candidates(self, state: DSINState, candidates: Candidates) -> Scores:
        """Logits [t] per task."""
        rows = candidates.rows
        item_tD = self.items(rows.values)
        still_tD, moving_tD = self.activated(state, rows.with_values(item_tD))
        parts = [item_tD, still_tD, moving_tD]
        if self.config.cross:
            parts += [item_tD * still_tD, item_tD * moving_tD]
        return self.head(state.request_BW, candidates, torch.cat(parts, dim=1))

    def activated(self, state: DSINState, items: Jagged) -> tuple[Tensor, Tensor]:
        """U_I and U_H of each candidate, float32 [t, D] each; 0 where there is no visit."""
        both = ((self.ask_interest, state.interest_SD), (self.ask_moving, state.moving_SD))
        found = []
        for ask, value_SD in both:
            query_BCD, is_item_BC = items.with_values(ask(items.values)).padded()
            value_BKD, is_real_BK = Jagged(value_SD, state.offsets).padded()
            logit_BCK = query_BCD @ value_BKD.transpose(1, 2)
            # The lowest finite number, not -inf: a request without history must not make NaN.
            lowest = torch.finfo(logit_BCK.dtype).min
            weight_BCK = logit_BCK.masked_fill(~is_real_BK[:, None, :], lowest).softmax(2)
            found.append(((weight_BCK * is_real_BK[:, None, :]) @ value_BKD)[is_item_BC])
        return found[0], found[1]

    def plain_activated(self, state: DSINState, items: Jagged) -> tuple[Tensor, Tensor]:
        """As `activated`, candidate by candidate: the reference of tests and benchmarks."""
        still, moving = [], []
        for item_D, row in zip(items.values, items.row_of_value.tolist()):
            interest_KD, moving_KD = (x[state.offsets[row] : state.offsets[row + 1]] for x in state[:2])
            still.append((interest_KD @ self.ask_interest(item_D)).softmax(0) @ interest_KD)
            moving.append((moving_KD @ self.ask_moving(item_D)).softmax(0) @ moving_KD)
        return torch.stack(still), torch.stack(moving)

    def losses(self, batch: Batch) -> Losses:
        """By task, as the head's settings say."""
        return self.head.losses(self.score(batch), batch)

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Once: the visits' attention and the Bi-LSTM, for full visits. Per candidate: its vector, two activations, the tower."""
        config, D = self.config, self.config.dim
        num_read = min(shape.num_history, self.max_history, config.num_sessions * config.session_length)
        num_visits = -(-num_read // config.session_length)
        item = linear_flops(self.items)
        within = linear_flops(self.query_key_value, self.out, self.ffn) + 4 * D * config.session_length
        user = min(shape.num_history, self.max_history) * item + num_read * within + num_visits * 32 * D * D
        return Cost(
            user_flops=0.0 if cached else float(user + self.head.request_flops),
            item_flops=float(item + 4 * D * D + 8 * D * num_visits + self.head.candidate_flops),
            bytes=dense_bytes(self) + 4.0 * D * (shape.num_candidates + 2 * num_visits),
        )
