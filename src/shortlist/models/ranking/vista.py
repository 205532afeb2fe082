"""VISTA: a history of any length becomes a few summary tokens, kept between requests; candidates attend over those alone.

"Massive Memorization with Hundreds of Trillions of Parameters for Sequential Transducer Generative Recommenders", Chen et al.,
ICLR 2026, arXiv 2510.22049 (no public code; read through its appendices, its abstract and reading notes).

    H = item + action + age embeddings of the events             [events, D]
    Z = norm(layers([H ; G]) at the seeds G)                     [K, D]     layers/quasi_linear.py; made when events come, not when asked
    x = c + W_o softmax(q_c [k_Z ; k_R ; k_c]' / sqrt(d)) [v_Z ; v_R ; v_c];   y = x + FFN(x)          per candidate c
    logits = tower(user, context, pair fields, c, y, c * y)
    L = L_task + weight * L_rec;   L_rec = sum |v_i - sg(u_{i+1})|^2 / sum |sg(u_{i+1})|^2    causal decoder over [Z ; u_1 .. u_M]

Differences from the paper, and what is reconstructed:
1. R, the newest `num_recent` events as raw tokens beside the summary, is ours: the remedy for summaries that lag behind. In training a
   summary leaves out up to `max_lag` newest events at random, so that stage 2 knows such summaries. `num_recent=0, max_lag=0` is the paper.
2. The reconstruction error is divided by the size of its targets, and no gradient goes through the decoder's events (the paper's text is
   not known to say): shrinking the embeddings gains nothing. On that scale a weight of 1 drowns the task, so it is 0.1, where the
   paper has 1 on the plain square. M events are a window at a random place of the history.
3. Norms, gates, the sum divided by n, depth of the decoder (one block) and where norms stand are reconstructed.
4. User-item pair fields are read, and the loss is a softmax over a request's candidates unless `head.loss = "bce"`, the paper's.
5. The age of an event, if marked, is counted from the newest event of its summary: a kept summary can not know when it will be read.

A summary is made of events before its request alone, one per request: the encoder is bidirectional, which only this cut makes right.

How stale an answer may be (`Remembering`): with a memory at hand the request's history is not encoded. Events newer than the summary are
read as raw tokens as far as `num_recent` reaches; older missing ones are not seen. A summary that misses more than `max_stale_events`, or
lacks something for longer than `max_stale_days`, is used and remarked on (`when_stale="use"`) or made again from what the request
brings (`"encode"`). For a user whom no refresh has seen, the summary is made at the first request, and again whenever the raw tokens
no longer reach back to it.

B requests, C most candidates of a request, t candidates end to end, E events end to end, K summary tokens, R recent events, T tokens
in all, M events to be reconstructed, D width, H heads, d = D / H, N blocks of L events, W first hidden width of the tower.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from shortlist.data.batches import Batch, Candidates, History
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Space
from shortlist.embeddings.base import TableChoice
from shortlist.errors import ConfigError
from shortlist.layers.fields import ItemEncoder
from shortlist.layers.quasi_linear import Blocks, Phi, SummaryEncoder
from shortlist.layers.scoring import (
    CandidateHead,
    EventMarks,
    HeadConfig,
    Recency,
    dense_bytes,
    linear_flops,
)
from shortlist.models.base import Cost, Losses, Memory, Phase, Ranker, RequestShape, Scores
from shortlist.registry import system

DAY = 86_400
QUANTA = 127
"""Steps of an int8 code on either side of 0."""
OWN = "own"
"""Part of a memory whose summary was made at a request, from what the request brought, and not by a refresh."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VISTAConfig:
    """Settings of VISTA."""

    dim: int = 32
    """Width of one embedding and of a summary token (paper: 256)."""
    num_heads: int = 1
    """Of the encoder; divides dim. What it sums up of a history is dim * dim / num_heads numbers, so fewer heads hold more."""
    num_target_heads: int = 4
    """Of stage 2, where candidates read the tokens, and of the decoder; divides dim (paper: 4)."""
    num_seeds: int = 16
    """Summary tokens per user (paper: 128)."""
    num_layers: int = 1
    """Quasi-linear layers of the encoder; streaming a history reads it once per layer."""
    phi: Phi = "silu"
    """Nonlinearity of keys, queries and state: silu, or the shifted elu."""
    max_history: int = 500
    """Newest events read where no summary is kept: in training, and for users that no refresh has seen. A refresh reads all."""
    num_recent: int = 16
    """Newest events that candidates attend to as they are, beside the summary; 0 = none, as in the paper."""
    max_lag: int = 16
    """Newest events that a summary may lack in training: 0 up to this many, drawn per request; 0 = none, as in the paper."""
    recency: Recency = "position"
    """Mark past events by place from the end (position) or hours before the newest (gap) of what is summarised; or not at all (none)."""
    reconstruction: float = 0.1
    """Weight of the reconstruction loss, which is 1 for a decoder that says nothing; 0 = none."""
    num_reconstructed: int = 32
    """Consecutive events per request that the decoder must tell from the summary; at least 2."""
    head_epochs: int = 0
    """Epochs of a second phase, in which the encoder stands still and stage 2 learns from int8 summaries; 0 = no such phase."""
    max_stale_events: int = 200
    """Events a kept summary may lack before it counts as stale."""
    max_stale_days: float = 7.0
    """Days for which a kept summary may have lacked something before it counts as stale."""
    when_stale: Literal["use", "encode"] = "use"
    """A stale summary is used and remarked on, or made again from the newest max_history events at the cost of encoding them."""
    dropout: float = 0.1
    """Share of stage 2's outputs set to 0 in training; the tower has its own."""
    use_ids: bool = True
    """Read the items' own id rows; False leaves only their fields."""
    id_dropout: float = 0.05
    """Share of item id rows replaced by the unknown row in training, so that new items have one that is trained."""
    events_at_once: int = 16_384
    """Events embedded at a time when a history is streamed."""
    head: HeadConfig = HeadConfig()  # noqa: RUF009  (frozen)
    """The tower."""
    table: TableChoice = TableChoice()  # noqa: RUF009  (frozen)
    """Which table holds the id rows."""

    def __post_init__(self) -> None:
        least = {"dim": 1, "num_seeds": 1, "num_layers": 1, "max_history": 1, "num_recent": 0, "max_lag": 0}
        least |= {"reconstruction": 0, "num_reconstructed": 2, "head_epochs": 0, "events_at_once": 1}
        least |= {"max_stale_events": 0, "max_stale_days": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"vista: {name} must be at least {bound}, got {getattr(self, name)}")
        for name in ("dropout", "id_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"vista: {name} must be from 0 to below 1, got {getattr(self, name)}")
        for name, choices in (("phi", ("silu", "elu")), ("when_stale", ("use", "encode"))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"vista: {name} must be {' or '.join(choices)}, got {getattr(self, name)!r}")
        self.head.check("vista")


class Summary(NamedTuple):
    """Summaries of B users as they are kept: int8 with one scale per token."""

    code: Tensor
    """int8 [B, K, D]."""
    scale: Tensor
    """float32 [B, K]."""
    time: Tensor
    """int64 [B] seconds: the newest event that was summarised; 0 where there was none."""
    num_events: Tensor
    """int64 [B]: events summarised."""

    def tokens(self) -> Tensor:
        """float32 [B, K, D]."""
        return self.code.to(self.scale.dtype) * self.scale[..., None]


class Tokens(NamedTuple):
    """What candidates attend to, mapped once per request."""

    key_BHTd: Tensor
    value_BHTd: Tensor
    is_real_BT: Tensor
    """False for filling."""


class VISTAState(NamedTuple):
    """The request's side, made once."""

    tokens: Tokens
    request_BW: Tensor
    """The request's part of the tower's first layer."""
    is_stale_B: Tensor
    """True where a kept summary was used that lacks more than the settings allow."""


def quantise(z_BKD: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [B, K, D] and float32 scales [B, K]: the largest number of each token becomes 127."""
    scale_BK = z_BKD.abs().amax(-1) / QUANTA
    code_BKD = (z_BKD / scale_BK.clamp(min=torch.finfo(scale_BK.dtype).tiny)[..., None]).round()
    return code_BKD.to(torch.int8), scale_BK


class TargetAttention(nn.Module):
    """One Transformer block for candidates, each over a request's tokens and itself, never over another candidate."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise ConfigError(f"dim must be a multiple of num_target_heads, got dim {width} and {num_heads} heads")
        self.num_heads = num_heads
        self.norm, self.norm_ffn = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.dropout = nn.Dropout(dropout)
        self.candidate_flops = linear_flops(self)
        self.token_flops = linear_flops(self.key_value)

    def tokens(self, token_BTD: Tensor, is_real_BT: Tensor) -> Tokens:
        """Keys and values of a request's tokens [B, T, D]."""
        key_BTD, value_BTD = self.key_value(self.norm(token_BTD)).chunk(2, dim=-1)
        return Tokens(self._heads(key_BTD), self._heads(value_BTD), is_real_BT)

    def forward(self, item_BCD: Tensor, tokens: Tokens) -> Tensor:
        """float32 [B, C, D] for candidates [B, C, D]."""
        u_BCD = self.norm(item_BCD)
        q_BHCd = self._heads(self.query(u_BCD))
        k_BHCd, v_BHCd = (self._heads(x) for x in self.key_value(u_BCD).chunk(2, dim=-1))
        logit_BHCT = q_BHCd @ tokens.key_BHTd.transpose(2, 3)
        logit_BHCT = logit_BHCT.masked_fill(~tokens.is_real_BT[:, None, None], -torch.inf)
        own_BHC1 = (q_BHCd * k_BHCd).sum(-1, keepdim=True)  # always finite, so a request without tokens gives no NaN
        weight_BHCx = (torch.cat([logit_BHCT, own_BHC1], -1) / q_BHCd.shape[-1] ** 0.5).softmax(-1)
        mixed_BHCd = weight_BHCx[..., :-1] @ tokens.value_BHTd + weight_BHCx[..., -1:] * v_BHCd
        x_BCD = item_BCD + self.dropout(self.out(mixed_BHCd.transpose(1, 2).reshape(item_BCD.shape)))
        return x_BCD + self.dropout(self.ffn(self.norm_ffn(x_BCD)))

    def plain(self, item_D: Tensor, token_TD: Tensor) -> Tensor:
        """[D] for one candidate and the tokens there are, head by head: the reference of tests."""
        sequence = self.norm(torch.cat([token_TD, item_D[None]]))
        width = len(item_D) // self.num_heads
        key, value = self.key_value(sequence).chunk(2, dim=-1)
        query = self.query(sequence[-1])
        heads = []
        for at in range(0, len(item_D), width):
            part = slice(at, at + width)
            heads.append((key[:, part] @ query[part] / width**0.5).softmax(0) @ value[:, part])
        x_D = item_D + self.out(torch.cat(heads))
        return x_D + self.ffn(self.norm_ffn(x_D))

    def _heads(self, x_BTD: Tensor) -> Tensor:
        """[B, H, T, d]."""
        return x_BTD.view(*x_BTD.shape[:2], self.num_heads, x_BTD.shape[2] // self.num_heads).transpose(1, 2)


class Decoder(nn.Module):
    """Tells the next event of a window from the summary and the window up to here: one causal block, used in training alone."""

    def __init__(self, width: int, num_heads: int, num_events: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.places = nn.Embedding(num_events, width)
        nn.init.normal_(self.places.weight, std=0.02)
        self.norm, self.norm_ffn, self.norm_out = (nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.predict = nn.Linear(width, width)
        for p in self.predict.parameters():
            nn.init.zeros_(p)  # embeddings begin small: any other start would be wrong by hundreds of times their size

    def forward(self, z_BKD: Tensor, event_BMD: Tensor, is_real_BM: Tensor) -> Tensor:
        """The loss, a scalar: squared error of events 2..M over their own squares, so 1 is what zeros would get.

        Args:
            event_BMD: input vectors of consecutive events, real ones first.
            is_real_BM: False for filling.
        """
        num_tokens, M = z_BKD.shape[1], event_BMD.shape[1]
        event_BMD = event_BMD.detach()  # the loss is to shape summaries, not what they are made of
        x_BTD = torch.cat([z_BKD, event_BMD + self.places.weight[:M]], dim=1)
        q, k, v = (
            x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)
            for x in self.qkv(self.norm(x_BTD)).chunk(3, dim=-1)
        )
        mixed_BHTd = scaled_dot_product_attention(q, k, v, is_causal=True)  # filling stands last, so nobody sees it
        x_BTD = x_BTD + self.out(mixed_BHTd.transpose(1, 2).reshape(x_BTD.shape))
        x_BTD = x_BTD + self.ffn(self.norm_ffn(x_BTD))
        told_BMD = self.predict(self.norm_out(x_BTD[:, num_tokens:-1]))
        is_next_BM1, next_BMD = is_real_BM[:, 1:, None], event_BMD[:, 1:]
        error = ((told_BMD - next_BMD).square() * is_next_BM1).sum()
        return error / (next_BMD.square() * is_next_BM1).sum().clamp(min=1e-12)


@system(
    "vista",
    stage="ranking",
    paper="Chen et al., ICLR 2026",
    needs={"history"},
    cold_users=True,
    cold_items=True,
    tiny={
        "dim": 8,
        "num_seeds": 4,
        "max_history": 10,
        "num_recent": 2,
        "max_lag": 2,
        "num_reconstructed": 4,
        "dropout": 0.0,
        "id_dropout": 0.0,
        "head": HeadConfig(widths=(16,), dropout=0.0),
    },
)
class VISTA(Ranker):
    """Attention from each candidate over a few tokens that sum up a history of any length, read from a cache when serving."""

    Config = VISTAConfig

    def __init__(self, config: VISTAConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.max_history
        D = config.dim
        readable = space if config.use_ids else replace(space, known_items=torch.zeros_like(space.known_items))
        self.items = ItemEncoder(readable, D, id_dropout=config.id_dropout, table=config.table)
        self.marks = EventMarks(space, D, config.recency)
        self.encoder = SummaryEncoder(config.num_seeds, D, config.num_heads, config.num_layers, config.phi)
        self.attention = TargetAttention(D, config.num_target_heads, config.dropout)
        self.head = CandidateHead(space, D, 3 * D, config.head, table=config.table)
        self.decoder = Decoder(D, config.num_target_heads, config.num_reconstructed) if config.reconstruction else None

    @property
    def summary_shape(self) -> tuple[int, int]:
        """K and D of a kept summary."""
        return self.config.num_seeds, self.config.dim

    # -- stage 1: events become summaries ----------------------------------------------------------------------------

    def encode(self, history: History) -> Tensor:
        """Summaries float32 [B, K, D] of all the events given, as a whole; carries gradients."""
        blocks = Blocks.of(history.items)
        event_ED = self._vectors(history.items.values, history.action, self._ages(history))
        if not len(event_ED):
            return self.encoder(event_ED.view(0, 1, self.config.dim), blocks, history.items.lengths)
        return self.encoder(event_ED[blocks.index_NL], blocks, history.items.lengths)

    @torch.no_grad()
    def stream(self, history: History, item_ND: Tensor | None = None) -> Tensor:
        """The same to rounding, `events_at_once` events at a time: memory does not grow with the histories.

        Args:
            item_ND: vectors of all items, by a caller who streams much; None = made for the events that are read.
        """
        blocks, age_E = Blocks.of(history.items), self._ages(history)

        def parts() -> Iterator[tuple[Tensor, Blocks]]:
            for part in blocks.split(self.config.events_at_once):
                at = part.index_NL
                age = None if age_E is None else age_E[at]
                yield self._vectors(history.items.values[at], history.action[at], age, item_ND), part

        return self.encoder.stream(parts, history.items.lengths)

    def summaries(self, batch: Batch, item_ND: Tensor | None = None) -> Summary:
        """What is kept of the batch's users: the summaries of their histories as they stand in the batch, uncut.

        Args:
            item_ND: as in `stream`.
        """
        history = batch.history
        return Summary(*quantise(self.stream(history, item_ND)), _newest_time(history), history.items.lengths)

    @torch.no_grad()
    def item_vectors(self) -> Tensor:
        """float32 [n + 1, D]: what `stream` and `summaries` read of items, for those who call them often."""
        return self.items.all()

    def _vectors(self, rows: Tensor, action: Tensor, age: Tensor | None, item_ND: Tensor | None = None) -> Tensor:
        """float32 [..., D]: input vectors of events, given by tensors of any one shape."""
        item = self.items(rows) if item_ND is None else item_ND[rows]
        return self.marks.add(item, action, age)

    def _ages(self, history: History) -> Tensor | None:
        """int64 [E] buckets, counted from the newest event given."""
        return self.marks.buckets(history, _newest_time(history))

    # -- stage 2: candidates read summaries --------------------------------------------------------------------------

    def user_state(self, batch: Batch) -> VISTAState:
        """Summary tokens (B, K, D) of the request's own history: its newest max_history events, in training without the newest few."""
        history = batch.history.last(self.max_history)
        if not self.training:
            return self.state(self.stream(history), batch)
        return self.state(self.encode(self._lagging(history)), batch)

    def state(self, z_BKD: Tensor, batch: Batch, is_stale_B: Tensor | None = None) -> VISTAState:
        """The request's side from summaries [B, K, D], by whatever way they came; of the history only the newest events are read."""
        if is_stale_B is None:
            is_stale_B = torch.zeros(batch.size, dtype=torch.bool, device=z_BKD.device)
        token_BTD, is_real_BT = z_BKD, torch.ones(z_BKD.shape[:2], dtype=torch.bool, device=z_BKD.device)
        if self.config.num_recent:
            recent = batch.history.last(self.config.num_recent)
            recent_BRD, is_real_BR = recent.items.with_values(
                self.marks(self.items(recent.items.values), recent, batch.time)
            ).padded()
            token_BTD, is_real_BT = torch.cat([token_BTD, recent_BRD], 1), torch.cat([is_real_BT, is_real_BR], 1)
        return VISTAState(self.attention.tokens(token_BTD, is_real_BT), self.head.request_side(batch), is_stale_B)

    def full_state(self, batch: Batch) -> VISTAState:
        """Full target attention: every event of the newest max_history is a token and nothing is summed up.

        What VISTA is measured against, with the same embeddings and the same stage 2.
        """
        history = batch.history.last(self.max_history)
        event_ED = self._vectors(history.items.values, history.action, self._ages(history))
        event_BTD, is_real_BT = history.items.with_values(event_ED).padded()
        fresh_B = torch.zeros(batch.size, dtype=torch.bool, device=event_ED.device)
        return VISTAState(self.attention.tokens(event_BTD, is_real_BT), self.head.request_side(batch), fresh_B)

    def score_candidates(self, state: VISTAState, candidates: Candidates) -> Scores:
        """Logits [t] per task."""
        rows = candidates.rows
        item_tD = self.items(rows.values)
        item_BCD, is_item_BC = rows.with_values(item_tD).padded()
        seen_tD = self.attention(item_BCD, state.tokens)[is_item_BC]
        return self.head(state.request_BW, candidates, torch.cat([item_tD, seen_tD, item_tD * seen_tD], dim=1))

    def recall(self, batch: Batch, memories: Sequence[Memory | None]) -> tuple[VISTAState, list[Memory | None]]:
        """The state from kept summaries; histories are encoded for users without one alone. See Remembering and the top of this file."""
        kept: list[Memory | None] = [
            memory if memory is not None and memory["code"].shape == self.summary_shape else None for memory in memories
        ]
        time_B = torch.tensor([0 if m is None else int(m["time"]) for m in kept], device=batch.time.device)
        has_B = torch.tensor([m is not None for m in kept], device=batch.time.device)
        has_B &= (time_B <= batch.time) & (batch.history.items.lengths > 0)  # of the future, or of events that are gone
        lacks_B, is_stale_B = self._lacks(batch, time_B)
        own_B = torch.tensor([m is not None and OWN in m for m in kept], device=batch.time.device)
        has_B &= ~(own_B & (lacks_B > self.config.num_recent))
        if self.config.when_stale == "encode":
            has_B &= ~is_stale_B
        missing = (~has_B).nonzero()[:, 0].tolist()
        if missing:
            rows = torch.tensor(missing, device=batch.time.device)
            history = _of(batch.history.last(self.max_history), rows)
            made = Summary(*quantise(self.stream(history)), _newest_time(history), history.items.lengths)
            columns = made._asdict()
            for place, row in enumerate(missing):
                kept[row] = {name: column[place].cpu() for name, column in columns.items()} | {OWN: torch.tensor(True)}
        whole = [memory for memory in kept if memory is not None]
        code_BKD = torch.stack([memory["code"] for memory in whole]).to(batch.time.device)
        scale_BK = torch.stack([memory["scale"] for memory in whole]).to(batch.time.device)
        # What a refresh made is not kept a second time: it is read again where it stands, newer after the next refresh.
        own = [memory if memory is not None and OWN in memory else None for memory in kept]
        return self.state(code_BKD * scale_BK[..., None], batch, has_B & is_stale_B), own

    def remarks(self, state: VISTAState) -> list[tuple[Tensor, str]]:
        """Which requests bool [B] read a summary that is staler than the settings allow, and how to say it."""
        if not bool(state.is_stale_B.any()):
            return []
        allowed = f"{self.config.max_stale_events:,} events or {self.config.max_stale_days:g} days"
        return [(state.is_stale_B, f"read a summary that lacks more than {allowed}; run `shortlist refresh`")]

    def _lacks(self, batch: Batch, time_B: Tensor) -> tuple[Tensor, Tensor]:
        """How many events of the batch come after `time_B`, int64 [B], and whether they are too many or the first too long ago."""
        rows, time_E = batch.history.items, batch.history.time
        row_E = rows.row_of_value
        count_B = torch.zeros_like(time_B).index_add(0, row_E, (time_E > time_B[row_E]).long())
        late_B = torch.zeros_like(count_B, dtype=torch.bool)
        if self.space.has_clock and len(time_E):
            first_B = time_E[
                (rows.offsets[1:] - count_B).clamp(max=len(time_E) - 1)
            ]  # times rise, so the new ones stand last
            late_B = (count_B > 0) & (batch.time - first_B > self.config.max_stale_days * DAY)
        return count_B, (count_B > self.config.max_stale_events) | late_B

    # -- training ----------------------------------------------------------------------------------------------------

    def phases(self) -> tuple[Phase, ...]:
        """All parts jointly; then, if wanted, stage 2 on the summaries it will be served, the encoder standing still."""
        joint = Phase(name="joint", feed="candidates", losses=self.losses)
        if not self.config.head_epochs:
            return (joint,)
        stage_2 = [*self.attention.parameters(), *self.head.parameters()]
        frozen = Phase(
            name="head",
            feed="candidates",
            losses=self.head_losses,
            parameters=lambda: stage_2,
            epochs=self.config.head_epochs,
        )
        return joint, frozen

    def losses(self, batch: Batch) -> Losses:
        """By task, and "reconstruction", weighed."""
        history = self._lagging(batch.history.last(self.max_history))
        z_BKD = self.encode(history)
        if batch.candidates is None:
            raise ValueError("this batch has no candidates to learn from; build it with candidates=...")
        losses = self.head.losses(self.score_candidates(self.state(z_BKD, batch), batch.candidates), batch)
        if self.decoder is not None and len(history.items.values):
            losses["reconstruction"] = self.config.reconstruction * self.decoder(z_BKD, *self._window(history))
        return losses

    def head_losses(self, batch: Batch) -> Losses:
        """By task, from int8 summaries without a gradient."""
        if batch.candidates is None:
            raise ValueError("this batch has no candidates to learn from; build it with candidates=...")
        z_BKD = self.summaries(replace(batch, history=self._lagging(batch.history.last(self.max_history)))).tokens()
        return self.head.losses(self.score_candidates(self.state(z_BKD, batch), batch.candidates), batch)

    def _lagging(self, history: History) -> History:
        """The history without its newest 0 to max_lag events, drawn per request, of which at least one stays."""
        if not self.config.max_lag or not self.training:
            return history
        lengths_B = history.items.lengths
        lag_B = torch.randint(self.config.max_lag + 1, lengths_B.shape, device=lengths_B.device)
        return without_newest(history, torch.minimum(lag_B, (lengths_B - 1).clamp(min=0)))

    def _window(self, history: History) -> tuple[Tensor, Tensor]:
        """Vectors [B, M, D] of up to M consecutive events at a random place of each history, and which are real [B, M]."""
        M, rows = self.config.num_reconstructed, history.items
        room_B = (rows.lengths - M + 1).clamp(min=1)
        start_B = rows.offsets[:-1] + (torch.rand(room_B.shape, device=room_B.device) * room_B).long()
        at_BM = start_B[:, None] + torch.arange(M, device=room_B.device)
        is_real_BM = at_BM < rows.offsets[1:, None]
        at_BM = at_BM.clamp(max=len(rows.values) - 1)
        ages_E = self._ages(history)
        age_BM = None if ages_E is None else ages_E[at_BM]
        return self._vectors(rows.values[at_BM], history.action[at_BM], age_BM), is_real_BM

    # -- cost --------------------------------------------------------------------------------------------------------

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Once: the summary (uncached: of the newest max_history events), tokens' keys and values, the request's layer.

        `cached` is a summary at hand: tokens and request side are still made, and K tokens of D bytes with their scales are read.
        """
        D, K = self.config.dim, self.config.num_seeds
        num_past = min(shape.num_history, self.max_history)
        num_recent = min(num_past, self.config.num_recent)
        item = linear_flops(self.items)
        user = num_recent * item + (K + num_recent) * self.attention.token_flops + self.head.request_flops
        read = K * (D + 4.0)
        if not cached:
            user += num_past * item + self.encoder.flops(num_past)
            read = 4.0 * D * num_past
        attend = self.attention.candidate_flops + 4 * D * (K + num_recent + 1)
        return Cost(
            user_flops=float(user),
            item_flops=float(item + attend + self.head.candidate_flops),
            bytes=dense_bytes(self) + read + 4.0 * D * (shape.num_candidates + num_recent),
        )


def without_newest(history: History, count_B: Tensor) -> History:
    """The history without the newest `count_B` [B] int64 events of each request: a summary that lags behind."""
    rows = history.items
    keep_E = rows.position_of_value < (rows.lengths - count_B)[rows.row_of_value]
    return _kept(history, keep_E.nonzero()[:, 0], (rows.lengths - count_B).clamp(min=0))


def _of(history: History, rows: Tensor) -> History:
    """The histories of some requests, [n] int64."""
    index, lengths = history.items.where(rows)
    return _kept(history, index, lengths)


def _kept(history: History, index: Tensor, lengths: Tensor) -> History:
    return History(
        items=Jagged.from_lengths(history.items.values[index], lengths),
        time=history.time[index],
        action=history.action[index],
        value=history.value[index],
        group=history.group[index],
    )


def _newest_time(history: History) -> Tensor:
    """int64 [B] seconds of each newest event; 0 without one."""
    last_B = history.items.offsets[1:] - 1
    if not len(history.time):
        return torch.zeros_like(last_B)
    return torch.where(history.items.lengths > 0, history.time[last_B.clamp(min=0)], 0)
