"""SIM: search a long past for the few events that matter to a candidate, then attend to those exactly.

"Search-based User Interest Modeling with Lifelong Sequential Behavior Data for Click-Through Rate Prediction", Qi et al., CIKM 2020.

General search unit (section 3.2), the K events with the highest r_i:

    hard    r_i = 1 where event and candidate have the same attribute, newest first     equation 1
    soft    r_i = (W_b e_i) . (W_a e_a)                                                 equation 1
            learned by an auxiliary task on U_r = sum_i r_i e_i                         equation 2

Exact search unit (3.3): z_j = event with its age, att_h = softmax_j(W_b z_j . W_a e_a), head_h = sum_j att_h z_j, heads end to end
(equations 3 to 5). Loss = search_loss * L_search + L (equation 6); hard search has no L_search.

Differences from the paper:
1. The hard search is a look-up in an index of the past by attribute, made once per request; `store/behaviours.py` is the same index over
   all users, on disk: the paper's tree of user and category.
2. The soft search is exact: no approximate inner product index.
3. U_r is a mean, not a sum, so that it does not grow with the past, and is computed without any r_i: (mean_i e_i (W_b e_i)') W_a e_a. It
   costs so little that no random part of the past needs to stand for the whole.
4. Item and age are added, not put end to end; without a clock the age is the place from the end.
5. The short past is read by the same kind of attention, not by DIEN. The long past includes it.
6. The loss is a softmax over a request's candidates unless "bce", the paper's, is chosen; so is L_search.
7. The tower reads the products of candidate and interests as well (see DIN), and user-item pair fields.

B requests, C most candidates of a request, t candidates end to end, E past events end to end, L most of a request, K chosen events per
candidate, D width of a vector, S of a search key, H heads, W width of the tower's first layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from shortlist.data.batches import Batch, Candidates
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Space
from shortlist.errors import ConfigError
from shortlist.layers.scoring import CandidateHead, HeadConfig, dense_bytes, linear_flops, task_losses
from shortlist.layers.search import (
    BehaviourIndex,
    Chosen,
    KeptRows,
    LongHistoryConfig,
    Past,
    PastEncoder,
    TargetAttention,
    attend,
    crossed,
    crossed_width,
    item_attribute,
    search,
)
from shortlist.layers.towers import MLP
from shortlist.models.base import Cost, Losses, Ranker, RequestShape, Scores
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class SIMConfig(LongHistoryConfig):
    """Settings of SIM, beside those of all rankers of long pasts."""

    search: Literal["hard", "soft"] = "hard"
    """By an attribute that event and candidate share, or by inner product of learned vectors."""
    attribute: str = "auto"
    """What the hard search compares: a categorical field of items, a sequence field (its first entry), "item" for the item itself, "auto"
    for the first categorical field, else the first sequence field, else the item."""
    search_dim: int = 16
    """Width of a key of the soft search."""
    num_found: int = 50
    """Events chosen per candidate."""
    search_loss: float = 1.0
    """Weight of the soft search's own loss, without which it does not learn."""

    def __post_init__(self) -> None:
        self.check("sim", {"search_dim": 1, "num_found": 1, "search_loss": 0})
        if self.search not in ("hard", "soft"):
            raise ConfigError(f"sim: search must be hard or soft, got {self.search!r}")


class SoftSearch(nn.Module):
    """Relevance as an inner product in a space of its own, and the auxiliary task that shapes it (equations 1 and 2)."""

    def __init__(self, space: Space, dim: int, search_dim: int, head: HeadConfig) -> None:
        super().__init__()
        self.tasks = space.tasks
        self.event = nn.Linear(dim, search_dim, bias=False)
        self.item = nn.Linear(dim, search_dim, bias=False)
        for linear in (self.event, self.item):
            nn.init.eye_(linear.weight)  # begins as likeness of the vectors themselves
        self.tower = MLP(3 * dim, head.widths, len(space.tasks), activation=head.activation, dropout=head.dropout)
        self.kept = KeptRows(space.num_items + 1)

    def keys(self, encoder: PastEncoder, past: Past) -> Tensor:
        """float32 [E, S] of past events; they depend on the item alone."""
        if self.training:
            return self.event(past.item_ED)
        return self.kept(past.items.values, lambda rows: self.event(encoder(rows)))

    def relevance(self, key_ED: Tensor, past: Jagged, item_tD: Tensor, rows: Jagged, k: int, pairs: int) -> Chosen:
        """The k most relevant events of each candidate. In double precision, so that equal items tie whatever the batch."""
        with torch.no_grad():
            key_BLS, _ = past.with_values(key_ED.double()).padded()
            query_BCS, _ = rows.with_values(self.item(item_tD).double()).padded()

        def product(first: int, stop: int) -> Tensor:
            return query_BCS[:, first:stop] @ key_BLS.transpose(1, 2)

        return search(product, past, rows, k, pairs_at_once=pairs)

    def summary(self, key_ES: Tensor, past: Past, item_tD: Tensor, row_t: Tensor) -> Tensor:
        """U_r [t, D]: the mean of all events by relevance, without a single relevance (difference 3)."""
        item_BLD, _ = past.items.with_values(past.item_ED).padded()
        key_BLS, _ = past.items.with_values(key_ES).padded()
        mean_BDS = item_BLD.transpose(1, 2) @ key_BLS / past.items.lengths.clamp(min=1)[:, None, None]
        return torch.einsum("tDS,tS->tD", mean_BDS[row_t], self.item(item_tD))

    def scores(self, key_ES: Tensor, past: Past, item_tD: Tensor, row_t: Tensor) -> Scores:
        """Logits [t] per task of the auxiliary click model."""
        summary_tD = self.summary(key_ES, past, item_tD, row_t)
        logit_tT = self.tower(torch.cat([summary_tD, item_tD, summary_tD * item_tD], dim=1))
        return dict(zip(self.tasks, logit_tT.unbind(1), strict=True))


class SIMState(NamedTuple):
    """The request's side, made once."""

    past: Past
    behaviours: BehaviourIndex | None
    """Of the past by attribute: hard search."""
    key_ES: Tensor | None
    """Search keys of the past: soft search."""
    request_BW: Tensor
    """The request's part of the tower's first layer."""


@system(
    "sim",
    stage="ranking",
    paper="Qi et al., CIKM 2020",
    needs={"history"},
    cold_users=True,
    cold_items=True,
    tiny={"dim": 8, "search_dim": 4, "num_found": 4, "short_history": 3, "max_history": 10, "id_dropout": 0.0}
    | {"head": HeadConfig(widths=(16,), dropout=0.0)},
)
class SIM(Ranker):
    """Search of a long past by attribute or by learned vectors, then exact attention to what was found."""

    Config = SIMConfig

    attribute_N: Tensor

    def __init__(self, config: SIMConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.max_history
        self.encoder = PastEncoder(space, config)
        self.long = TargetAttention(config.dim, config.num_heads, value_map=False)
        self.short = TargetAttention(config.dim, config.num_heads, value_map=False)
        width = crossed_width(config.dim, self.long.out_width, self.short.out_width)
        self.head = CandidateHead(space, config.dim, width, config.head, table=config.table)
        self.soft = SoftSearch(space, config.dim, config.search_dim, config.head) if config.search == "soft" else None
        attribute_N, self.num_attributes = item_attribute(space, "item" if self.soft else config.attribute)
        self.register_buffer("attribute_N", attribute_N, persistent=False)  # of the catalogue, not of the weights

    def user_state(self, batch: Batch) -> SIMState:
        """See SIMState."""
        past = self.encoder.past(batch, self.max_history)
        behaviours = key_ES = None
        if self.soft is None:
            attribute_E = self.attribute_N[past.items.values]
            behaviours = BehaviourIndex.of(past.items.row_of_value, attribute_E, self.num_attributes)
        else:
            key_ES = self.soft.keys(self.encoder, past)
        return SIMState(past, behaviours, key_ES, self.head.request_side(batch))

    def found(self, state: SIMState, rows: Jagged, item_tD: Tensor) -> Chosen:
        """The general search unit: at most `num_found` events per candidate."""
        if self.soft is None:
            assert state.behaviours is not None
            return state.behaviours.newest(rows.row_of_value, self.attribute_N[rows.values], self.config.num_found)
        assert state.key_ES is not None
        config = self.config
        return self.soft.relevance(
            state.key_ES, state.past.items, item_tD, rows, config.num_found, config.pairs_at_once
        )

    def score_candidates(self, state: SIMState, candidates: Candidates) -> Scores:
        """Logits [t] per task."""
        return self._scores(state, candidates, self.encoder(candidates.rows.values))

    def _scores(self, state: SIMState, candidates: Candidates, item_tD: Tensor) -> Scores:
        rows, event_ED = candidates.rows, state.past.event_ED
        pairs = None if self.training else self.config.pairs_at_once
        long_tX = attend(self.long, item_tD, event_ED, self.found(state, rows, item_tD), pairs)
        newest = state.past.newest(self.config.short_history).select(rows.row_of_value)
        short_tX = attend(self.short, item_tD, event_ED, newest, pairs)
        return self.head(state.request_BW, candidates, crossed(item_tD, long_tX, short_tX))

    def losses(self, batch: Batch) -> Losses:
        """By task, as `config.head.loss` says, with the soft search's own loss."""
        state, rows = self.user_state(batch), batch.candidate_rows
        assert batch.candidates is not None
        item_tD = self.encoder(rows.values)
        losses = self.head.losses(self._scores(state, batch.candidates, item_tD), batch)
        if self.soft is None or not self.config.search_loss:
            return losses
        assert state.key_ES is not None
        searched = self.soft.scores(state.key_ES, state.past, item_tD, rows.row_of_value)
        own = task_losses(searched, batch, self.config.head.loss)
        return {task: loss + self.config.search_loss * own[task] for task, loss in losses.items()}

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Once: the request's layer; item vectors and keys are kept and only looked up. Per candidate: the search (soft: a product with
        every event; hard: look-ups alone), attention to the chosen and to the newest, the tower."""
        config, num_past = self.config, min(shape.num_history, self.max_history)
        attended = min(config.num_found, num_past) + min(config.short_history, num_past)
        item = 2 * self.long.candidate_flops + attended * self.long.pair_flops + self.head.candidate_flops
        if self.soft is not None:
            item += linear_flops(self.soft.item) + 2 * num_past * config.search_dim
        read = config.dim + (config.search_dim if self.soft else 2)
        return Cost(
            user_flops=0.0 if cached else float(self.head.request_flops),
            item_flops=float(item),
            bytes=dense_bytes(self) + 4.0 * read * (shape.num_candidates + num_past),
        )
