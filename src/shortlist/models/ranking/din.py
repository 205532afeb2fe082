"""DIN: a user vector that depends on the candidate, by attention from the candidate over past behaviours.

"Deep Interest Network for Click-Through Rate Prediction", Zhou et al., KDD 2018: the local activation unit (section
4.3, in layers/activation_unit.py), Dice (5.3, in layers/towers.py) and mini-batch aware regularisation (5.2).

Differences from the paper:
1. Weights are normalised by a softmax over the history, scaled by sqrt(D), as in the authors' released code, from which the
   public figures come; `weights="none"` is the paper's sum, which keeps the intensity of an interest, `"sigmoid"` lies between.
2. The activation unit reads [q, k, q - k, q * k], as the released code, for the paper's outer product. That code's unit is
   `unit_widths=(80, 40)` with `unit_activation="sigmoid"`.
3. `cross` gives the tower q * v(q) as well, the product of candidate and interest, as the authors' later code does with
   the pooled history: without it the tower must learn from scratch to compare the two.
4. User-item pair fields are read, and the loss is a softmax over a request's candidates unless "bce", the paper's, is chosen.
5. In the regulariser, n_j counts the events of item j in the training log: the paper's count over training samples is not known
   before the samples are drawn. The unknown row is left out. Only rows of the batch get a gradient, but dense Adam also moves
   rows that it saw before: `table.sparse` gives the paper's update, which leaves all others as they are. `l2` is the usual decay of the
   rows read, whatever their counts, to compare with.
6. One hidden layer of 16 in the activation unit by default (36 in the paper's figure): its width is what a step and a request cost.

B requests, C most candidates of a request, t candidates end to end, E history events end to end, L longest history, D width of a vector,
W first layer of the tower, T tasks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from shortlist.data.batches import Batch, Candidates
from shortlist.data.histories import View
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Space
from shortlist.embeddings.base import TableChoice
from shortlist.errors import ConfigError
from shortlist.layers.activation_unit import ActivationUnit as ActivationUnit
from shortlist.layers.activation_unit import mixed_past
from shortlist.layers.adaptive import APGConfig
from shortlist.layers.fields import ItemEncoder
from shortlist.layers.gates import GateConfig
from shortlist.layers.scoring import (
    CandidateHead,
    EventMarks,
    HeadConfig,
    RankingLoss,
    Recency,
    dense_bytes,
    linear_flops,
)
from shortlist.layers.towers import Activation, Norm
from shortlist.models.base import Cost, Losses, Ranker, RequestShape, Scores
from shortlist.registry import system

Weights = Literal["softmax", "none", "sigmoid", "uniform"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DINConfig:
    """Settings of DIN."""

    dim: int = 32
    """Width of one embedding."""
    unit_widths: tuple[int, ...] = (16,)
    """Hidden widths of the activation unit, which weighs one past event against the candidate."""
    widths: tuple[int, ...] = (128, 64)
    """Hidden widths of the tower."""
    weights: Weights = "softmax"
    """How the units' outputs become weights: softmax over the history (released code), none (the paper), or sigmoid each. uniform is the
    mean of the past, without attention: what to compare with, everything else being equal."""
    activation: Activation = "dice"
    """Of the tower and, where it has none of its own, of the activation unit."""
    unit_activation: Activation | None = None
    """Of the activation unit; None = as the tower."""
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
    l2: float = 0.0
    """Strength of a plain L2 on the same rows, not weighed by their counts; 0 = none."""
    use_ids: bool = True
    """Read the items' own id rows; False leaves only their fields."""
    use_user_ids: bool = False
    """Read the user's own id row; unknown users read the unknown row."""
    id_dropout: float = 0.05
    """Share of id rows replaced by the unknown row in training, so that new items and users have one that is trained."""
    pair_bins: int = 8
    """Bins of the piecewise-linear curve that each pair field may take; 0 = linear."""
    pairs_at_once: int = 1_000_000
    """(candidate, event) pairs, padding included, in memory at a time when scoring; training holds all of a batch's for its gradient."""
    table: TableChoice = TableChoice()  # noqa: RUF009  (frozen)
    """Which table holds the id rows."""
    gates: GateConfig = GateConfig()  # noqa: RUF009  (frozen)
    """Gates on the tower's input and hidden units: SENet, EPNet, PPNet, LHUC."""
    apg: APGConfig = APGConfig()  # noqa: RUF009  (frozen)
    """The tower's hidden layers with weights made per row."""

    def head(self) -> HeadConfig:
        """Settings of the tower."""
        return HeadConfig(
            widths=self.widths,
            activation=self.activation,
            dropout=self.dropout,
            norm=self.norm,
            use_user_ids=self.use_user_ids,
            id_dropout=self.id_dropout,
            pair_bins=self.pair_bins,
            loss=self.loss,
            gates=self.gates,
            apg=self.apg,
        )

    def __post_init__(self) -> None:
        for name, least in (
            ("dim", 1),
            ("max_history", 1),
            ("pairs_at_once", 1),
            ("pair_bins", 0),
            ("mba", 0),
            ("l2", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"din: {name} must be at least {least}, got {getattr(self, name)}")
        if not self.unit_widths:
            raise ConfigError("din: unit_widths must name at least one hidden width")
        if not 0 <= self.id_dropout < 1:
            raise ConfigError(f"din: id_dropout must be from 0 to below 1, got {self.id_dropout}")
        if self.weights not in ("softmax", "none", "sigmoid", "uniform") or self.loss not in ("softmax", "bce"):
            raise ConfigError(
                "din: weights must be softmax, none, sigmoid or uniform and loss softmax or bce, "
                f"got weights={self.weights!r}, loss={self.loss!r}"
            )


class DINState(NamedTuple):
    """The request's side, made once."""

    past_BLD: Tensor
    """Vectors of the past events, oldest first, then 0."""
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
        self.unit = ActivationUnit(config.dim, config.unit_widths, config.unit_activation or config.activation)
        self.head = CandidateHead(
            space, config.dim, (3 if config.cross else 2) * config.dim, config.head(), table=config.table
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
        return DINState(past_BLD, is_real_BL, self.head.request_side(batch))

    def score_candidates(self, state: DINState, candidates: Candidates) -> Scores:
        """Logits [t] per task."""
        rows = candidates.rows
        item_tD = self.items(rows.values)
        interest_tD = self.interest(state, rows.with_values(item_tD))
        parts = [item_tD, interest_tD]
        if self.config.cross:
            parts.append(item_tD * interest_tD)
        return self.head(state.request_BW, candidates, torch.cat(parts, dim=1))

    def interest(self, state: DINState, items: Jagged) -> Tensor:
        """The user as each candidate sees them (equation 3), float32 [t, D]; 0 where there is no history.

        Scoring takes the candidates in slices of C, so that B x C x L is no more than `pairs_at_once` at a time (with at
        least one candidate of every request).
        """
        pairs = None if self.training else self.config.pairs_at_once
        return mixed_past(self._weigh, items, state.past_BLD, state.is_real_BL, pairs)

    def _weigh(self, item_BCD: Tensor, past_BLD: Tensor, is_pair_BLC: Tensor) -> Tensor:
        if self.config.weights == "uniform":
            return self._weights(past_BLD.new_zeros(is_pair_BLC.shape), is_pair_BLC)
        return self._weights(self.unit(item_BCD, past_BLD, is_pair_BLC), is_pair_BLC)

    def _weights(self, output_BLC: Tensor, is_pair_BLC: Tensor) -> Tensor:
        """Weights [B, L, C] of the events for each candidate; 0 where the mask is False."""
        match self.config.weights:
            case "none":
                weight_BLC = output_BLC
            case "sigmoid":
                weight_BLC = output_BLC.sigmoid()
            case _:
                # The lowest finite number, not -inf: a request without history must not make NaN.
                lowest = torch.finfo(output_BLC.dtype).min
                weight_BLC = (output_BLC / self.config.dim**0.5).masked_fill(~is_pair_BLC, lowest).softmax(1)
        return weight_BLC.masked_fill(~is_pair_BLC, 0)

    def plain_interest(self, state: DINState, items: Jagged) -> Tensor:
        """As `interest`, candidate by candidate and by the formula as it stands: the reference of tests and benchmarks."""
        interests = []
        for item_D, row in zip(items.values, items.row_of_value.tolist()):
            past_LD = state.past_BLD[row, state.is_real_BL[row]]
            output_L = self.unit.plain(item_D.expand_as(past_LD), past_LD)
            if self.config.weights == "uniform":
                output_L = output_L * 0
            weight_1L1 = self._weights(
                output_L[None, :, None], torch.ones_like(output_L, dtype=torch.bool)[None, :, None]
            )
            interests.append(weight_1L1[0, :, 0] @ past_LD)
        return torch.stack(interests)

    def losses(self, batch: Batch) -> Losses:
        """By task, as `config.loss` says; the regulariser is added to the first."""
        losses = self.head.losses(self.score(batch), batch)
        if self.config.mba or self.config.l2:
            losses[self.space.tasks[0]] = losses[self.space.tasks[0]] + self.regulariser(batch)
        return losses

    def regulariser(self, batch: Batch) -> Tensor:
        """Mini-batch aware L2 (equations 7 and 8): mba / 2 * sum of |w_j|^2 / n_j over the item rows j that the batch reads.

        Its gradient is mba / n_j * w_j on those rows and none on others: a frequent item is decayed less per touch, a rare one more.
        `l2` adds l2 * w_j to it.
        """
        read = torch.cat([batch.candidate_rows.values, batch.history.last(self.max_history).items.values]).unique()
        read = read[self.items.known_items[read]]
        squares = self.items.ids(read).square().sum(1)
        return 0.5 * (squares * (self.config.mba / self.num_events[read] + self.config.l2)).sum()

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Once: vectors of the past and the request's layer. Per candidate: its vector, one activation unit per event, the tower."""
        num_past = min(shape.num_history, self.max_history)
        item = linear_flops(self.items)
        user = num_past * item + self.head.request_flops
        attend = 2 * self.config.dim * num_past
        if self.config.weights != "uniform":
            attend += 2 * self.unit.query_flops + num_past * self.unit.pair_flops
        return Cost(
            user_flops=0.0 if cached else float(user),
            item_flops=float(item + attend + self.head.candidate_flops),
            bytes=dense_bytes(self) + 4.0 * self.config.dim * (shape.num_candidates + num_past),
        )
