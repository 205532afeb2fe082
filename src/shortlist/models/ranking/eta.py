"""ETA: the search of a long past by hashes of the very embeddings that the ranker trains.

"End-to-End User Behavior Retrieval in Click-Through Rate Prediction Model", Chen et al., arXiv 2108.04468 (2022: 2209.12212).

    code(e) = 1[e H > 0], H [D, m] drawn once from N(0, 1), without gradient          SimHash
    r_i = -popcount(code(e_i) XOR code(e_a))                                          Hamming distance, m / pi times the angle on average
    U   = MHTA(e_a, the K events with the highest r_i)                                multi-head target attention with value map

The newest events are read by a second such attention. No loss of its own: what the ranking loss makes of the embeddings defines the
search. In training codes are made anew in every batch. Outside it an item's code is made once for the whole catalogue and looked up, so
the user side of a request is a look-up of 8 bytes per event and 64 bits: there is nothing to keep from one request to the next.

Differences from the paper:
1. Events are marked with action and age for the attention; the hash reads the items' vectors alone, as the candidate has no such marks.
2. Of events at equal distance the newest come first: with few bits and many events ties are many.
3. The loss is a softmax over a request's candidates unless "bce", the paper's, is chosen.
4. The tower reads the products of candidate and interests as well (see DIN), and user-item pair fields.

B requests, t candidates end to end, E past events end to end, L most of a request, K chosen events per candidate, D width of a vector,
m bits, w 64-bit words that hold them, W width of the tower's first layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from shortlist.data.batches import Batch, Candidates
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Space
from shortlist.layers.scoring import CandidateHead, HeadConfig, dense_bytes
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
    hamming,
    packed,
    planes,
    search,
    sign_bits,
)
from shortlist.models.base import Cost, Losses, Ranker, RequestShape, Scores
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class ETAConfig(LongHistoryConfig):
    """Settings of ETA, beside those of all rankers of long pasts."""

    num_bits: int = 64
    """Bits of a hash; 32 are coarse for thousands of events."""
    num_found: int = 50
    """Events chosen per candidate."""
    hash_seed: int = 0
    """Of the planes; they are saved with the weights."""

    def __post_init__(self) -> None:
        self.check("eta", {"num_bits": 1, "num_found": 1, "hash_seed": 0})


class ETAState(NamedTuple):
    """The request's side, made once."""

    past: Past
    code_Ew: Tensor
    """int64 [E, w]: hashes of the past's items."""
    request_BW: Tensor
    """The request's part of the tower's first layer."""


@system(
    "eta",
    stage="ranking",
    paper="Chen et al., 2021",
    needs={"history"},
    cold_users=True,
    cold_items=True,
    tiny={"dim": 8, "num_bits": 16, "num_found": 4, "short_history": 3, "max_history": 10, "id_dropout": 0.0}
    | {"head": HeadConfig(widths=(16,), dropout=0.0)},
)
class ETA(Ranker):
    """Search of a long past by hashes of the trained embeddings, then attention to what was found."""

    Config = ETAConfig

    planes_Dm: Tensor

    def __init__(self, config: ETAConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.max_history
        self.encoder = PastEncoder(space, config)
        self.long = TargetAttention(config.dim, config.num_heads)
        self.short = TargetAttention(config.dim, config.num_heads)
        width = crossed_width(config.dim, self.long.out_width, self.short.out_width)
        self.head = CandidateHead(space, config.dim, width, config.head, table=config.table)
        self.kept = KeptRows(space.num_items + 1)
        self.buffer("planes_Dm", planes(config.dim, config.num_bits, config.hash_seed))

    def codes(self, rows: Tensor, item_nD: Tensor) -> Tensor:
        """int64 [n, w]: hashes of items [n] whose vectors are given; looked up outside training."""
        if self.training:
            return self.hash(item_nD)
        return self.kept(rows, lambda rows: self.hash(self.encoder(rows)))

    def hash(self, item_nD: Tensor) -> Tensor:
        """int64 [n, w] of vectors [n, D]."""
        return packed(sign_bits(item_nD, self.planes_Dm))

    def user_state(self, batch: Batch) -> ETAState:
        """See ETAState."""
        past = self.encoder.past(batch, self.max_history)
        return ETAState(past, self.codes(past.items.values, past.item_ED), self.head.request_side(batch))

    def found(self, state: ETAState, rows: Jagged, item_tD: Tensor) -> Chosen:
        """The `num_found` events of each candidate's request whose hashes are nearest."""
        code_BLw, _ = state.past.items.with_values(state.code_Ew).padded()
        code_BCw, _ = rows.with_values(self.codes(rows.values, item_tD)).padded()

        def nearness(first: int, stop: int) -> Tensor:
            return -hamming(code_BCw[:, first:stop, None], code_BLw[:, None])

        return search(nearness, state.past.items, rows, self.config.num_found, pairs_at_once=self.config.pairs_at_once)

    def score_candidates(self, state: ETAState, candidates: Candidates) -> Scores:
        """Logits [t] per task."""
        rows, event_ED = candidates.rows, state.past.event_ED
        item_tD = self.encoder(rows.values)
        pairs = None if self.training else self.config.pairs_at_once
        long_tD = attend(self.long, item_tD, event_ED, self.found(state, rows, item_tD), pairs)
        newest = state.past.newest(self.config.short_history).select(rows.row_of_value)
        short_tD = attend(self.short, item_tD, event_ED, newest, pairs)
        return self.head(state.request_BW, candidates, crossed(item_tD, long_tD, short_tD))

    def losses(self, batch: Batch) -> Losses:
        """By task, as `config.head.loss` says."""
        return self.head.losses(self.score(batch), batch)

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Once: the request's layer; item vectors and hashes are kept and only looked up. Per candidate: m bits compared with every event
        (each word's XOR and count as 2 operations), attention to the chosen and to the newest, the tower."""
        config, num_past = self.config, min(shape.num_history, self.max_history)
        num_words = -(-config.num_bits // 64)
        attended = min(config.num_found, num_past) + min(config.short_history, num_past)
        attention = 2 * self.long.candidate_flops + attended * self.long.pair_flops
        return Cost(
            user_flops=0.0 if cached else float(self.head.request_flops),
            item_flops=float(2 * num_words * num_past + attention + self.head.candidate_flops),
            bytes=dense_bytes(self) + (4.0 * config.dim + 8.0 * num_words) * (shape.num_candidates + num_past),
        )
