"""SDIM: attention to a long past without search, by which of its events share hashes with the candidate.

"Sampling Is All You Need on Modeling Long-Term User Behaviors for CTR Prediction", Cao et al., CIKM 2022.

    h(x) = sign(R x), R [m, D] drawn once from N(0, 1)                                        equation 5
    G = m / tau signatures: tau consecutive signs each
    p_gj = 1 where signature g of candidate and event j agree                                 equation 6
    Attn(q, S) = 1 / G sum_g l2(sum_j p_gj s_j)                                               equation 9

E p = (1 - arccos(cos(q, s)) / pi) ** tau (equation 11): attention with that kernel in place of a softmax.

A user's side is a table: per signature and value the sum of the events that have it, G * 2 ** tau vectors whatever the length of the past
(the paper's server of encoded sequences). A candidate looks up G of them. The table is kept between requests (`recall`): new events are
added and those that left the window taken away, in double precision and with counts, so that it equals one made anew to rounding.

Differences from the paper:
1. Hashes read the items' vectors alone; what is summed are the vectors with the mark of the event's action. Ages change with every request
   and would forbid a table that is kept: only the short past is marked with them.
2. The newest events are read by multi-head target attention. The long past includes them.
3. The loss is a softmax over a request's candidates unless "bce", the paper's, is chosen.
4. The tower reads the products of candidate and interests as well (see DIN), and user-item pair fields.
5. Candidates are hashed by a plain product, once per item and kept, not by a fast transform.

B requests, t candidates end to end, E past events end to end, D width of a vector, m signs, G signatures, U = 2 ** tau values of one,
W width of the tower's first layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from shortlist.data.batches import Batch, Candidates, History
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Space
from shortlist.errors import ConfigError
from shortlist.layers.losses import unit
from shortlist.layers.scoring import CandidateHead, EventMarks, HeadConfig, dense_bytes
from shortlist.layers.search import (
    KeptRows,
    LongHistoryConfig,
    Past,
    PastEncoder,
    TargetAttention,
    attend,
    continued,
    crossed,
    crossed_width,
    planes,
    signatures,
    window_of,
)
from shortlist.models.base import Cost, Losses, Memory, Ranker, RequestShape, Scores
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class SDIMConfig(LongHistoryConfig):
    """Settings of SDIM, beside those of all rankers of long pasts."""

    num_bits: int = 48
    """Signs of a hash, m; a multiple of signature_bits."""
    signature_bits: int = 3
    """Signs that must agree together, tau: more is a sharper attention."""
    hash_seed: int = 0
    """Of the planes; they are saved with the weights."""

    def __post_init__(self) -> None:
        self.check("sdim", {"num_bits": 1, "signature_bits": 1, "hash_seed": 0})
        if self.num_bits % self.signature_bits or self.signature_bits > 16:
            raise ConfigError(
                "sdim: num_bits must be a multiple of signature_bits, which is at most 16, "
                f"got num_bits {self.num_bits} and signature_bits {self.signature_bits}"
            )


class Buckets(NamedTuple):
    """Sums of events by signature and its value."""

    sum_BGUD: Tensor
    count_BGU: Tensor
    """int64; where it is 0 the sum is 0 but for rounding."""

    @classmethod
    def of(cls, signature_EG: Tensor, event_ED: Tensor, row_E: Tensor, num_rows: int, num_values: int) -> Buckets:
        """Of events [E] that belong to rows 0 .. num_rows - 1."""
        num_groups = signature_EG.shape[1]
        cell_EG = (row_E[:, None] * num_groups + torch.arange(num_groups, device=row_E.device)) * num_values
        cell_EG = cell_EG + signature_EG
        shape = (num_rows, num_groups, num_values)
        num_cells = num_rows * num_groups * num_values
        sum_xD = event_ED.new_zeros(num_cells, event_ED.shape[1])
        for cell_E in cell_EG.unbind(1):  # one signature at a time: all at once would hold [E, G, D]
            sum_xD = sum_xD.index_add(0, cell_E, event_ED)
        count_x = torch.bincount(cell_EG.flatten(), minlength=num_cells)
        return cls(sum_xD.view(*shape, -1), count_x.view(shape))

    def plus(self, other: Buckets, sign: int = 1) -> Buckets:
        """With the events of the other added, or taken away."""
        return Buckets(self.sum_BGUD + sign * other.sum_BGUD, self.count_BGU + sign * other.count_BGU)

    def unit(self) -> Tensor:
        """Directions of the sums [B, G, U, D] float32; 0 where there is no event."""
        return unit(self.sum_BGUD.masked_fill((self.count_BGU == 0)[..., None], 0)).float()


class SDIMState(NamedTuple):
    """The request's side, made once."""

    bucket_BGUD: Tensor
    """Directions of the sums of events by signature and value."""
    newest: Past
    """The newest events."""
    request_BW: Tensor
    """The request's part of the tower's first layer."""


@system(
    "sdim",
    stage="ranking",
    paper="Cao et al., CIKM 2022",
    needs={"history"},
    cold_users=True,
    cold_items=True,
    tiny={"dim": 8, "num_bits": 12, "short_history": 3, "max_history": 10, "id_dropout": 0.0}
    | {"head": HeadConfig(widths=(16,), dropout=0.0)},
)
class SDIM(Ranker):
    """Attention to a long past by hash collisions, from a table per user that new events are added to."""

    Config = SDIMConfig

    planes_Dm: Tensor

    def __init__(self, config: SDIMConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.max_history
        self.num_values = 2**config.signature_bits
        self.encoder = PastEncoder(space, config)
        self.marks = EventMarks(space, config.dim)
        self.short = TargetAttention(config.dim, config.num_heads)
        width = crossed_width(config.dim, config.dim, self.short.out_width)
        self.head = CandidateHead(space, config.dim, width, config.head, table=config.table)
        self.kept = KeptRows(space.num_items + 1)
        self.buffer("planes_Dm", planes(config.dim, config.num_bits, config.hash_seed))

    def signatures(self, rows: Tensor, item_nD: Tensor) -> Tensor:
        """int64 [n, G] of items [n] whose vectors are given; looked up outside training."""
        if self.training:
            return self.hash(item_nD)
        return self.kept(rows, lambda rows: self.hash(self.encoder(rows)))

    def hash(self, item_nD: Tensor) -> Tensor:
        """int64 [n, G] of vectors [n, D]."""
        return signatures(item_nD, self.planes_Dm, self.config.signature_bits)

    def buckets(self, history: History, time_B: Tensor, *, dtype: torch.dtype = torch.float32) -> Buckets:
        """Of all events given."""
        rows = history.items
        item_ED = self.encoder(rows.values)
        event_ED = self.marks(item_ED, history, time_B).to(dtype)
        signature_EG = self.signatures(rows.values, item_ED)
        return Buckets.of(signature_EG, event_ED, rows.row_of_value, rows.num_rows, self.num_values)

    def user_state(self, batch: Batch) -> SDIMState:
        """See SDIMState: sums per bucket (B, G, U, D) and the request's side (B, W)."""
        return self._state(batch, self.buckets(batch.history.last(self.max_history), batch.time))

    def _state(self, batch: Batch, buckets: Buckets) -> SDIMState:
        newest = self.encoder.past(batch, min(self.config.short_history, self.max_history))
        return SDIMState(buckets.unit(), newest, self.head.request_side(batch))

    def recall(self, batch: Batch, memories: Sequence[Memory | None]) -> tuple[SDIMState, list[Memory | None]]:
        """See Remembering: the table goes on from the kept one."""
        history = batch.history.last(self.max_history)
        step = continued(history, memories)
        kept = self._kept_buckets(memories, step.fits_B)
        # In double precision: what is added and taken away again must leave nothing behind.
        kept = kept.plus(self.buckets(step.dropped, batch.time, dtype=torch.float64), -1)
        kept = kept.plus(self.buckets(step.added, batch.time, dtype=torch.float64))
        window = window_of(history)
        memory: list[Memory | None] = [
            {**events, "sum": kept.sum_BGUD[b].clone(), "count": kept.count_BGU[b].clone()}
            for b, events in enumerate(window)
        ]
        return self._state(batch, kept), memory

    def _kept_buckets(self, memories: Sequence[Memory | None], fits_B: Tensor) -> Buckets:
        """What was kept of each request's user, 0 where it does not fit."""
        shape = (self.planes_Dm.shape[1] // self.config.signature_bits, self.num_values)
        zero = torch.zeros(*shape, self.config.dim, dtype=torch.float64, device=fits_B.device)
        none = torch.zeros(shape, dtype=torch.int64, device=fits_B.device)
        fitting = [m if fits else None for m, fits in zip(memories, fits_B.tolist(), strict=True)]
        return Buckets(
            torch.stack([zero if m is None else m["sum"].to(zero.device) for m in fitting]),
            torch.stack([none if m is None else m["count"].to(none.device) for m in fitting]),
        )

    def score_candidates(self, state: SDIMState, candidates: Candidates) -> Scores:
        """Logits [t] per task."""
        rows = candidates.rows
        item_tD = self.encoder(rows.values)
        long_tD = self.interest(state.bucket_BGUD, rows, item_tD)
        newest = state.newest.newest(self.config.short_history).select(rows.row_of_value)
        pairs = None if self.training else self.config.pairs_at_once
        short_tD = attend(self.short, item_tD, state.newest.event_ED, newest, pairs)
        return self.head(state.request_BW, candidates, crossed(item_tD, long_tD, short_tD))

    def interest(self, bucket_BGUD: Tensor, rows: Jagged, item_tD: Tensor) -> Tensor:
        """Attn(q, S) [t, D] by look-up: the mean of the candidate's G cells."""
        num_groups, num_values = bucket_BGUD.shape[1:3]
        signature_tG = self.signatures(rows.values, item_tD)
        group_G = torch.arange(num_groups, device=signature_tG.device)
        cell_tG = (rows.row_of_value[:, None] * num_groups + group_G) * num_values + signature_tG
        return embedding_bag(cell_tG, bucket_BGUD.flatten(0, 2), mode="mean")

    def plain_interest(self, batch: Batch) -> Tensor:
        """The same by equations 6 and 9, candidate by candidate and event by event: the reference of tests."""
        history, rows = batch.history.last(self.max_history), batch.candidate_rows
        item_ED = self.encoder(history.items.values)
        event_ED = self.marks(item_ED, history, batch.time)
        interests = []
        for item_D, row in zip(self.encoder(rows.values), rows.row_of_value.tolist()):
            a, b = history.items.offsets[row : row + 2].tolist()
            agrees_LG = (self.hash(item_ED[a:b]) == self.hash(item_D[None])).float()
            interests.append(unit(agrees_LG.T @ event_ED[a:b]).mean(0))
        return torch.stack(interests)

    def losses(self, batch: Batch) -> Losses:
        """By task, as `config.head.loss` says."""
        return self.head.losses(self.score(batch), batch)

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Once: each event added to G cells and the cells' lengths; nothing of it where the table is kept. Per candidate: the mean of G
        cells, attention to the newest, the tower. Item vectors and signatures are kept and only looked up."""
        config, num_past = self.config, min(shape.num_history, self.max_history)
        num_groups = config.num_bits // config.signature_bits
        num_cells = num_groups * self.num_values
        table = num_past * num_groups * config.dim + 3 * num_cells * config.dim
        newest = min(config.short_history, num_past)
        item = num_groups * config.dim + self.short.candidate_flops + newest * self.short.pair_flops
        read = newest if cached else num_past
        return Cost(
            user_flops=0.0 if cached else float(table + self.head.request_flops),
            item_flops=float(item + self.head.candidate_flops),
            bytes=dense_bytes(self) + 4.0 * config.dim * (shape.num_candidates + read + num_cells),
        )
