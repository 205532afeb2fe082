"""TWIN: two stages over a long past that measure relevance alike, so that the exact one sees what it would have ranked first.

"TWIN: TWo-stage Interest Network for Lifelong User Behavior Modeling in CTR Prediction at Kuaishou", Chang et al., KDD 2023.

    alpha = (K_h W^h)(W^q q) / sqrt(d) + (K_c W^c) beta                 one number per event and head, equation 5
    stage 1: the num_found events with the highest alpha; heads take turns, best first, each event once
    stage 2: head = softmax(alpha) K W^v over the chosen, heads end to end, W^o                 equations 6 and 7

K_h holds what is inherent to an item and the same for everybody, K_c what stands between user and event: how long ago it was, its action,
how often the item stands in the past. The candidate has no such features, so the second term is a bias per event. K_h W^h is made once
per item and looked up. Both stages read the same alpha with the same parameters; the gradient passes through the second.

Differences from the paper:
1. Each cross feature is a vector of `cross_dim`; the vectors of an event are added and one map makes the bias of all heads of them.
2. W^v and W^o stand one behind the other and are one map here.
3. The newest events are read by multi-head target attention. The long past includes them.
4. The loss is a softmax over a request's candidates unless "bce", the paper's, is chosen.
5. The tower reads the products of candidate and interests as well (see DIN), and user-item pair fields.

B requests, C most candidates of a request, t candidates end to end, E past events end to end, L most of a request, K chosen events per
candidate, D width of a vector, H heads, d = D / H, X width of a cross feature, W width of the tower's first layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shortlist.data.batches import Batch, Candidates
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Space
from shortlist.layers.scoring import NUM_RECENCY_BUCKETS, CandidateHead, EventMarks, HeadConfig, dense_bytes
from shortlist.layers.search import (
    Chosen,
    KeptRows,
    LongHistoryConfig,
    Past,
    PastEncoder,
    TargetAttention,
    attend,
    crossed,
    crossed_width,
    gathered,
    masked_softmax,
    search,
    sort_keys,
)
from shortlist.models.base import Cost, Losses, Ranker, RequestShape, Scores
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class TWINConfig(LongHistoryConfig):
    """Settings of TWIN, beside those of all rankers of long pasts."""

    cross_dim: int = 8
    """Width of a cross feature's vector."""
    num_found: int = 50
    """Events that the first stage hands to the second."""

    def __post_init__(self) -> None:
        self.check("twin", {"cross_dim": 1, "num_found": 1})


class Relevance(nn.Module):
    """alpha: what both stages read (equation 5)."""

    def __init__(self, space: Space, dim: int, num_heads: int, cross_dim: int, *, ages: bool) -> None:
        super().__init__()
        self.shape = (num_heads, dim // num_heads)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        for linear in (self.query, self.key):
            nn.init.eye_(linear.weight)  # begins as likeness of the vectors themselves
        self.marks = EventMarks(space, cross_dim, ("gap" if space.has_clock else "position") if ages else "none")
        self.times = nn.Embedding(NUM_RECENCY_BUCKETS, cross_dim)
        nn.init.normal_(self.times.weight, std=0.02)
        self.bias = nn.Linear(cross_dim, num_heads, bias=False)
        self.kept = KeptRows(space.num_items + 1)

    def keys(self, encoder: PastEncoder, past: Past) -> Tensor:
        """K_h W^h [E, D]; it depends on the item alone."""
        if self.training:
            return self.key(past.item_ED)
        return self.kept(past.items.values, lambda rows: self.key(encoder(rows)))

    def biases(self, batch: Batch, past: Past, max_history: int) -> Tensor:
        """(K_c W^c) beta [E, H]: from action, age, and powers of two of how often the past holds the item."""
        key_E = past.items.row_of_value * self.kept.num_rows + past.items.values
        _, which_E, count = key_E.unique(return_inverse=True, return_counts=True)
        times_E = torch.log2(count[which_E].float()).long().clamp(max=NUM_RECENCY_BUCKETS - 1)
        return self.bias(self.marks(self.times(times_E), batch.history.last(max_history), batch.time))

    def of_chosen(self, item_tD: Tensor, key_ED: Tensor, bias_EH: Tensor, chosen: Chosen) -> Tensor:
        """alpha [t, H, K] of the events chosen for each candidate."""
        query_tHd = self.query(item_tD).unflatten(1, self.shape)
        key_tKHd = gathered(key_ED, chosen).unflatten(2, self.shape)
        product_tHK = query_tHd[:, :, None] @ key_tKHd.permute(0, 2, 3, 1)
        return product_tHK[:, :, 0] / self.shape[1] ** 0.5 + gathered(bias_EH, chosen).transpose(1, 2)


class TWINState(NamedTuple):
    """The request's side, made once."""

    past: Past
    key_ED: Tensor
    """K_h W^h of the past events, all heads end to end."""
    bias_EH: Tensor
    """Bias of each event for each head."""
    request_BW: Tensor
    """The request's part of the tower's first layer."""


@system(
    "twin",
    stage="ranking",
    paper="Chang et al., KDD 2023",
    needs={"history"},
    cold_users=True,
    cold_items=True,
    tiny={"dim": 8, "cross_dim": 4, "num_found": 4, "short_history": 3, "max_history": 10, "id_dropout": 0.0}
    | {"head": HeadConfig(widths=(16,), dropout=0.0)},
)
class TWIN(Ranker):
    """Search of a long past and attention to what was found, by one and the same relevance."""

    Config = TWINConfig

    def __init__(self, config: TWINConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.max_history
        self.encoder = PastEncoder(space, config)
        self.relevance = Relevance(space, config.dim, config.num_heads, config.cross_dim, ages=config.ages)
        self.value = nn.Linear(config.num_heads * config.dim, config.dim, bias=False)
        self.short = TargetAttention(config.dim, config.num_heads)
        width = crossed_width(config.dim, config.dim, self.short.out_width)
        self.head = CandidateHead(space, config.dim, width, config.head, table=config.table)
        # Begins as the mean of the heads' mixes.
        with torch.no_grad():
            self.value.weight.copy_(torch.eye(config.dim).repeat(1, config.num_heads) / config.num_heads)

    def user_state(self, batch: Batch) -> TWINState:
        """See TWINState."""
        past = self.encoder.past(batch, self.max_history)
        key_ED = self.relevance.keys(self.encoder, past)
        bias_EH = self.relevance.biases(batch, past, self.max_history)
        return TWINState(past, key_ED, bias_EH, self.head.request_side(batch))

    def found(self, state: TWINState, rows: Jagged, item_tD: Tensor) -> Chosen:
        """The first stage. In double precision, so that equal events tie whatever stands beside them in the batch."""
        heads, past = self.relevance.shape, state.past.items
        with torch.no_grad():
            key_BLD, _ = past.with_values(state.key_ED.double()).padded()
            bias_BLH, _ = past.with_values(state.bias_EH.double()).padded()
            query_BCD, _ = rows.with_values(self.relevance.query(item_tD).double()).padded()
        key_BHdL = key_BLD.unflatten(2, heads).permute(0, 2, 3, 1)

        def alpha(first: int, stop: int) -> Tensor:
            query_BHcd = query_BCD[:, first:stop].unflatten(2, heads).transpose(1, 2)
            alpha_BHcL = query_BHcd @ key_BHdL / heads[1] ** 0.5 + bias_BLH.transpose(1, 2)[:, :, None]
            return alpha_BHcL.transpose(1, 2)

        pairs = max(self.config.pairs_at_once // heads[0], 1)
        return search(alpha, past, rows, self.config.num_found, pairs_at_once=pairs, pick=take_turns)

    def exact(self, state: TWINState, item_tD: Tensor, chosen: Chosen) -> Tensor:
        """The second stage [t, D]: attention to the chosen; 0 where there is none."""
        alpha_tHK = self.relevance.of_chosen(item_tD, state.key_ED, state.bias_EH, chosen)
        weight_tHK = masked_softmax(alpha_tHK, chosen.is_real[:, None])
        return self.value((weight_tHK @ gathered(state.past.event_ED, chosen)).flatten(1))

    def score_candidates(self, state: TWINState, candidates: Candidates) -> Scores:
        """Logits [t] per task."""
        rows = candidates.rows
        item_tD = self.encoder(rows.values)
        pairs = None if self.training else self.config.pairs_at_once
        found = self.found(state, rows, item_tD)
        long_tD = attend(
            lambda item, _, chosen: self.exact(state, item, chosen), item_tD, state.past.event_ED, found, pairs
        )
        newest = state.past.newest(self.config.short_history).select(rows.row_of_value)
        short_tD = attend(self.short, item_tD, state.past.event_ED, newest, pairs)
        return self.head(state.request_BW, candidates, crossed(item_tD, long_tD, short_tD))

    def losses(self, batch: Batch) -> Losses:
        """By task, as `config.head.loss` says."""
        return self.head.losses(self.score(batch), batch)

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Once: the events' biases and the request's layer; item vectors and K_h W^h are kept and only looked up. Per candidate: alpha of
        every event for each head, then of the chosen again with their mix, attention to the newest, the tower."""
        config, num_past = self.config, min(shape.num_history, self.max_history)
        newest, found = min(config.short_history, num_past), min(config.num_found, num_past)
        dim, heads = config.dim, config.num_heads
        first = 2 * dim * dim + 2 * dim * num_past
        second = 2 * dim * dim + found * (2 * dim + 2 * heads * dim) + 2 * heads * dim * dim
        short = self.short.candidate_flops + newest * self.short.pair_flops
        return Cost(
            user_flops=0.0 if cached else float(2 * config.cross_dim * heads * num_past + self.head.request_flops),
            item_flops=float(first + second + short + self.head.candidate_flops),
            bytes=dense_bytes(self) + 4.0 * (2 * dim + heads) * (shape.num_candidates + num_past),
        )


def take_turns(alpha_BcHL: Tensor, is_real_B1L: Tensor, k: int) -> Tensor:
    """Places [B, c, k] of events, the heads naming their best in turn, until k different ones are named.

    Head h names its r-th best as call number r H + h; an event counts by its first call. So the k with the earliest first calls are
    chosen, and no head need name more than k.
    """
    num_heads, longest = alpha_BcHL.shape[2:]
    named_BcHk = sort_keys(alpha_BcHL, is_real_B1L[:, :, None]).topk(k, dim=-1).indices
    call_Hk = torch.arange(k, device=named_BcHk.device) * num_heads
    call_Hk = (call_Hk + torch.arange(num_heads, device=named_BcHk.device)[:, None]).expand_as(named_BcHk)
    never = k * num_heads
    first_BcL = torch.full(
        (*alpha_BcHL.shape[:2], longest), never, dtype=torch.int64, device=named_BcHk.device
    ).scatter_reduce(2, named_BcHk.flatten(2), call_Hk.flatten(2), "amin")
    return first_BcL.masked_fill(~is_real_B1L, never + 1).topk(k, dim=-1, largest=False).indices
