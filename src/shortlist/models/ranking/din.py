"""DIN: a user vector that depends on the candidate, by attention from the candidate over past behaviours.

"Deep Interest Network for Click-Through Rate Prediction", Zhou et al., KDD 2018: the local activation unit (section 4.3), Dice
(5.3, in layers/towers.py) and mini-batch aware regularisation (5.2).

Differences from the paper:
1. Weights are normalised by a softmax over the history, scaled by sqrt(D), as in the authors' released code, from which the
   public figures come; `weights="none"` is the paper's sum, which keeps the intensity of an interest, `"sigmoid"` lies between.
2. The activation unit reads [q, k, q - k, q * k], as the released code, for the paper's outer product.
3. `cross` gives the tower q * v(q) as well, the product of candidate and interest, as the authors' later code does with
   the pooled history: without it the tower must learn from scratch to compare the two.
4. User-item pair fields are read, and the loss is a softmax over a request's candidates unless "bce", the paper's, is chosen.
5. In the regulariser, n_j counts the events of item j in the training log: the paper's count over training samples is not known
   before the samples are drawn. The unknown row is left out.

B requests, t candidates end to end, E history events end to end, L longest history, p (candidate, event) pairs end to end, D width of
a vector, P first hidden width of the activation unit, R of the request's side, V of a candidate's side, W first hidden layer of the
tower, T tasks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from shortlist.data.batches import Batch, Candidates
from shortlist.data.histories import View
from shortlist.data.jagged import segment_sum
from shortlist.data.schema import Space
from shortlist.embeddings.base import TableChoice
from shortlist.errors import ConfigError
from shortlist.layers.fields import ItemEncoder
from shortlist.layers.scoring import (
    EventMarks,
    PairFeatures,
    RankingLoss,
    Recency,
    RequestEncoder,
    SplitMLP,
    dense_bytes,
    linear_flops,
    task_losses,
)
from shortlist.layers.towers import MLP, Activation, Norm
from shortlist.models.base import Cost, Losses, Ranker, RequestShape, Scores
from shortlist.registry import system

Weights = Literal["softmax", "none", "sigmoid"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DINConfig:
    """Settings of DIN."""

    dim: int = 32
    """Width of one embedding."""
    unit_widths: tuple[int, ...] = (36,)
    """Hidden widths of the activation unit, which weighs one past event against the candidate."""
    widths: tuple[int, ...] = (128, 64)
    """Hidden widths of the tower."""
    weights: Weights = "softmax"
    """How the units' outputs become weights: softmax over the history (released code), none (the paper), or sigmoid each."""
    activation: Activation = "dice"
    """Of the tower and of the activation unit."""
    dropout: float = 0.1
    """Share of the tower's hidden units set to 0 in training."""
    norm: Norm = "none"
    """Of the tower's hidden layers."""
    cross: bool = True
    """Give the tower the product of candidate and interest beside the two."""
    recency: Recency = "none"
    """Mark past events by hours since (gap) or place from the end (position); none as in the paper."""
    max_history: int = 50
    """Newest events read per request."""
    loss: RankingLoss = "softmax"
    """softmax over a request's candidates; bce gives scores that are logits of a probability. Rows with one candidate use bce."""
    mba: float = 0.01
    """Strength of the mini-batch aware L2 on item rows; 0 = none."""
    use_ids: bool = True
    """Read the items' own id rows; False leaves only their fields."""
    use_user_ids: bool = False
    """Read the user's own id row; unknown users read the unknown row."""
    id_dropout: float = 0.05
    """Share of id rows replaced by the unknown row in training, so that new items and users have one that is trained."""
    pair_bins: int = 8
    """Bins of the piecewise-linear curve that each pair field may take; 0 = linear."""
    pairs_at_once: int = 1_000_000
    """(candidate, event) pairs in memory at a time when scoring; training holds all pairs of a batch, for its gradient."""
    table: TableChoice = TableChoice()  # noqa: RUF009  (frozen)
    """Which table holds the id rows."""

    def __post_init__(self) -> None:
        for name, least in (("dim", 1), ("max_history", 1), ("pairs_at_once", 1), ("pair_bins", 0), ("mba", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"din: {name} must be at least {least}, got {getattr(self, name)}")
        if not self.unit_widths:
            raise ConfigError("din: unit_widths must name at least one hidden width")
        if not 0 <= self.id_dropout < 1:
            raise ConfigError(f"din: id_dropout must be from 0 to below 1, got {self.id_dropout}")
        if self.weights not in ("softmax", "none", "sigmoid") or self.loss not in ("softmax", "bce"):
            raise ConfigError(
                "din: weights must be softmax, none or sigmoid and loss softmax or bce, "
                f"got weights={self.weights!r}, loss={self.loss!r}"
            )


class ActivationUnit(nn.Module):
    """a(k, q): how much the past event k matters for the candidate q, one number, from MLP([q, k, q - k, q * k]).

    The first linear map is taken apart: W [q, k, q - k, q * k] = (W1 + W3) q + (W2 - W3) k + W4 (q * k). The first part is computed
    once per candidate and the second once per event, so that a pair costs a quarter of the work and no [p, 4 D] is made.
    """

    def __init__(self, dim: int, widths: tuple[int, ...], activation: Activation) -> None:
        super().__init__()
        self.dim = dim
        self.mlp = MLP(4 * dim, widths, 1, activation=activation)
        self.project_flops = 2 * dim * widths[0]
        self.pair_flops = self.mlp.flops_per_row - 3 * self.project_flops

    def plain(self, query_pD: Tensor, key_pD: Tensor) -> Tensor:
        """[p] for pairs of candidate and event, by the formula as it stands."""
        return self.mlp(torch.cat([query_pD, key_pD, query_pD - key_pD, query_pD * key_pD], dim=1)).squeeze(1)

    def queries(self, query_tD: Tensor) -> Tensor:
        """The candidates' part of the first layer, bias included: [t, P]."""
        first = self._first
        w1, _, w3, _ = first.weight.split(self.dim, dim=1)
        return linear(query_tD, w1 + w3, first.bias)

    def keys(self, key_ED: Tensor) -> Tensor:
        """The events' part of the first layer: [E, P]."""
        _, w2, w3, _ = self._first.weight.split(self.dim, dim=1)
        return linear(key_ED, w2 - w3)

    def forward(self, query_pD: Tensor, key_pD: Tensor, parts_pP: Tensor) -> Tensor:
        """[p], as `plain`, given the sum of both parts for each pair."""
        hidden_pP = linear(query_pD * key_pD, self._first.weight[:, 3 * self.dim :]) + parts_pP
        return self.mlp.layers[1:](hidden_pP).squeeze(1)

    @property
    def _first(self) -> nn.Linear:
        first = self.mlp.layers[0]
        assert isinstance(first, nn.Linear)
        return first


class DINState(NamedTuple):
    """The request's side, made once."""

    past_BLD: Tensor
    """Vectors of the past events, oldest first, then 0."""
    past_BLP: Tensor
    """Their part of the activation unit's first layer."""
    is_real_BL: Tensor
    """True where there is an event."""
    request_BW: Tensor
    """The request's part of the tower's first layer."""


@system(
    "din",
    stage="ranking",
    paper="Zhou et al., KDD 2018",
    needs={"history"},
    cold_users=True,
    cold_items=True,
    tiny={"dim": 8, "unit_widths": (8,), "widths": (16,), "max_history": 10, "dropout": 0.0},
)
class DIN(Ranker):
    """Attention from each candidate over the past, then a tower with user, context and pair fields."""

    Config = DINConfig

    num_events: Tensor

    def __init__(self, config: DINConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.max_history
        readable = space if config.use_ids else replace(space, known_items=torch.zeros_like(space.known_items))
        self.items = ItemEncoder(readable, config.dim, id_dropout=config.id_dropout, table=config.table)
        self.marks = EventMarks(space, config.dim, config.recency)
        self.request = RequestEncoder(
            space, config.dim, use_user_ids=config.use_user_ids, id_dropout=config.id_dropout, table=config.table
        )
        self.pair = PairFeatures(space.pair_fields, config.pair_bins)
        self.unit = ActivationUnit(config.dim, config.unit_widths, config.activation)
        self.head = SplitMLP(
            self.request.width,
            (3 if config.cross else 2) * config.dim + self.pair.width,
            config.widths,
            len(space.tasks),
            activation=config.activation,
            dropout=config.dropout,
            norm=config.norm,
        )
        self.buffer("num_events", torch.ones(space.num_items + 1))

    def prepare(self, view: View) -> None:
        """Count the events of each item, for the regulariser: float32 [n + 1], at least 1."""
        item = torch.from_numpy(view.histories.item.copy())
        counts = torch.bincount(item, minlength=view.space.num_items + 1).clamp(min=1)
        self.buffer("num_events", counts.float().to(self.num_events.device))

    def user_state(self, batch: Batch) -> DINState:
        """See DINState."""
        history = batch.history.last(self.max_history)
        past_ED = self.marks(self.items(history.items.values), history, batch.time)
        past_BLD, is_real_BL = history.items.with_values(past_ED).padded()
        return DINState(past_BLD, self.unit.keys(past_BLD), is_real_BL, self.head.request_side(self.request(batch)))

    def score_candidates(self, state: DINState, candidates: Candidates) -> Scores:
        """Logits [t] per task."""
        rows = candidates.rows
        item_tD = self.items(rows.values)
        interest_tD = self.interest(state, item_tD, rows.row_of_value)
        parts = [item_tD, interest_tD, self.pair(candidates.pair, len(item_tD))]
        if self.config.cross:
            parts.append(item_tD * interest_tD)
        logit_tT = self.head(state.request_BW, torch.cat(parts, dim=1), rows.row_of_value)
        return dict(zip(self.space.tasks, logit_tT.unbind(1)))

    def interest(self, state: DINState, item_tD: Tensor, row_of_t: Tensor) -> Tensor:
        """The user as each candidate sees them (equation 3), float32 [t, D]; 0 where there is no history.

        Works on the real (candidate, event) pairs alone, `pairs_at_once` of them at a time when scoring.
        """
        longest = state.is_real_BL.shape[1]
        step = len(item_tD) if self.training else self.config.pairs_at_once // longest
        step = max(step, 1)
        chunks = zip(item_tD.split(step), row_of_t.split(step))
        return torch.cat([self._interest(state, item_cD, row_of_c) for item_cD, row_of_c in chunks])

    def _interest(self, state: DINState, item_tD: Tensor, row_of_t: Tensor) -> Tensor:
        is_real_tL = state.is_real_BL[row_of_t]
        t_of_p, place_of_p = is_real_tL.nonzero(as_tuple=True)
        event_of_p = row_of_t[t_of_p] * is_real_tL.shape[1] + place_of_p
        past_pD = state.past_BLD.flatten(0, 1)[event_of_p]
        parts_pP = state.past_BLP.flatten(0, 1)[event_of_p] + self.unit.queries(item_tD)[t_of_p]
        output_p = self.unit(item_tD[t_of_p], past_pD, parts_pP)
        weight_p = self._weights(output_p, is_real_tL)
        return segment_sum(weight_p[:, None] * past_pD, t_of_p, len(item_tD))

    def _weights(self, output_p: Tensor, is_real_tL: Tensor) -> Tensor:
        """Weights [p] from outputs [p] of the pairs where the mask [t, L] is True, in its order."""
        match self.config.weights:
            case "none":
                return output_p
            case "sigmoid":
                return output_p.sigmoid()
            case _:
                # The lowest finite number, not -inf: a candidate without history must not make NaN.
                logit_tL = output_p.new_full(is_real_tL.shape, torch.finfo(output_p.dtype).min)
                logit_tL = logit_tL.masked_scatter(is_real_tL, output_p / self.config.dim**0.5)
                return logit_tL.softmax(1)[is_real_tL]

    def plain_interest(self, state: DINState, item_tD: Tensor, row_of_t: Tensor) -> Tensor:
        """As `interest`, candidate by candidate and by the formula as it stands: the reference of tests and benchmarks."""
        interests = []
        for item_D, row in zip(item_tD, row_of_t.tolist()):
            past_LD = state.past_BLD[row, state.is_real_BL[row]]
            output_L = self.unit.plain(item_D.expand_as(past_LD), past_LD)
            weight_L = self._weights(output_L, torch.ones(1, len(output_L), dtype=torch.bool, device=item_D.device))
            interests.append(weight_L @ past_LD)
        return torch.stack(interests)

    def losses(self, batch: Batch) -> Losses:
        """By task, as `config.loss` says; the regulariser is added to the first."""
        losses = task_losses(self.score(batch), batch, self.config.loss)
        if self.config.mba:
            losses[self.space.tasks[0]] = losses[self.space.tasks[0]] + self.regulariser(batch)
        return losses

    def regulariser(self, batch: Batch) -> Tensor:
        """Mini-batch aware L2 (equations 7 and 8): mba / 2 * sum of |w_j|^2 / n_j over the item rows j that the batch reads.

        Its gradient is mba / n_j * w_j on those rows and none on others: a frequent item is decayed less per touch, a rare one more.
        """
        read = torch.cat([batch.candidate_rows.values, batch.history.last(self.max_history).items.values]).unique()
        read = read[self.items.known_items[read]]
        squares = self.items.ids(read).square().sum(1)
        return self.config.mba / 2 * (squares / self.num_events[read]).sum()

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Once: vectors and first-layer parts of the past, and the request's layer. Per candidate: one activation unit per event."""
        num_past = min(shape.num_history, self.max_history)
        item = linear_flops(self.items)
        user = num_past * (item + self.unit.project_flops) + linear_flops(self.request) + self.head.request_flops
        attend = self.unit.project_flops + num_past * (self.unit.pair_flops + 2 * self.config.dim)
        num_rows = shape.num_candidates + (0 if cached else num_past)
        state = num_past * (self.config.dim + self.config.unit_widths[0]) if cached else 0
        return Cost(
            user_flops=0.0 if cached else float(user),
            item_flops=float(item + attend + self.head.candidate_flops),
            bytes=dense_bytes(self) + 4.0 * (self.config.dim * num_rows + state),
        )
