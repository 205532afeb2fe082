"""DNN ranker: embeddings, mean pooling over the history, and a tower.

The ranking network of "Deep Neural Networks for YouTube Recommendations" (Covington, Adams and Sargin, RecSys 2016, section 4), the
"Base" of DIN's paper: a user is one vector, whatever the candidate. Differences: user-item pair fields are read as well (on logs of
repeat purchases they say most), the loss is a softmax over a request's candidates unless "bce" is chosen, and watch-time weighting is
left to the batch's weights.

B requests, t candidates end to end, E history events end to end, D width of a vector, R of the request's side, W of the first hidden
layer, T tasks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shortlist.data.batches import Batch, Candidates
from shortlist.data.jagged import segment_mean
from shortlist.data.schema import Space
from shortlist.embeddings.base import TableChoice
from shortlist.errors import ConfigError
from shortlist.layers.adaptive import APGConfig
from shortlist.layers.fields import ItemEncoder
from shortlist.layers.gates import GateConfig
from shortlist.layers.scoring import (
    EventMarks,
    HeadConfig,
    PairFeatures,
    RankingLoss,
    RequestEncoder,
    blocks_of,
    dense_bytes,
    linear_flops,
    make_tower,
    task_losses,
)
from shortlist.layers.towers import Activation, Norm
from shortlist.models.base import Cost, Losses, Ranker, RequestShape, Scores
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class DNNConfig:
    """Settings of the DNN ranker."""

    dim: int = 32
    """Width of one embedding."""
    widths: tuple[int, ...] = (128, 64)
    """Hidden widths of the tower."""
    activation: Activation = "relu"
    """Of the hidden layers."""
    dropout: float = 0.1
    """Share of hidden units set to 0 in training."""
    norm: Norm = "none"
    """Of the hidden layers."""
    max_history: int = 50
    """Newest events read per request."""
    loss: RankingLoss = "softmax"
    """softmax over a request's candidates; bce gives scores that are logits of a probability. Rows with one candidate use bce."""
    use_ids: bool = True
    """Read the items' own id rows; False leaves only their fields."""
    use_user_ids: bool = False
    """Read the user's own id row; unknown users read the unknown row."""
    id_dropout: float = 0.05
    """Share of id rows replaced by the unknown row in training, so that new items and users have one that is trained."""
    pair_bins: int = 8
    """Bins of the piecewise-linear curve that each pair field may take; 0 = linear."""
    table: TableChoice = TableChoice()  # noqa: RUF009  (frozen)
    """Which table holds the id rows."""
    gates: GateConfig = GateConfig()  # noqa: RUF009  (frozen)
    """Gates on the tower's input and hidden units: SENet, EPNet, PPNet, LHUC."""
    apg: APGConfig = APGConfig()  # noqa: RUF009  (frozen)
    """Hidden layers with weights made per row."""

    def tower(self) -> HeadConfig:
        """Settings of the tower."""
        return HeadConfig(
            widths=self.widths,
            activation=self.activation,
            dropout=self.dropout,
            norm=self.norm,
            gates=self.gates,
            apg=self.apg,
        )

    def __post_init__(self) -> None:
        if self.dim < 1 or self.max_history < 1 or self.pair_bins < 0:
            raise ConfigError(
                "dnn: dim and max_history must be at least 1 and pair_bins at least 0, "
                f"got dim={self.dim}, max_history={self.max_history}, pair_bins={self.pair_bins}"
            )
        if not 0 <= self.id_dropout < 1:
            raise ConfigError(f"dnn: id_dropout must be from 0 to below 1, got {self.id_dropout}")
        if self.loss not in ("softmax", "bce"):
            raise ConfigError(f"dnn: loss must be softmax or bce, got {self.loss!r}")


@system(
    "dnn",
    stage="ranking",
    paper="Covington et al., RecSys 2016",
    cold_users=True,
    cold_items=True,
    tiny={"dim": 8, "widths": (16,), "max_history": 10, "dropout": 0.0},
)
class DNN(Ranker):
    """Mean of the past items beside user, context, item and pair fields, through a tower."""

    Config = DNNConfig

    def __init__(self, config: DNNConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.max_history
        readable = space if config.use_ids else replace(space, known_items=torch.zeros_like(space.known_items))
        self.items = ItemEncoder(readable, config.dim, id_dropout=config.id_dropout, table=config.table)
        self.marks = EventMarks(space, config.dim)
        self.request = RequestEncoder(
            space, config.dim, use_user_ids=config.use_user_ids, id_dropout=config.id_dropout, table=config.table
        )
        self.pair = PairFeatures(space.pair_fields, config.pair_bins)
        self.head = make_tower(
            space,
            blocks_of(self.request.width + config.dim, config.dim),
            [config.dim, self.pair.width],
            config.tower(),
        )

    def user_state(self, batch: Batch) -> Tensor:
        """float32 [B, W]: the request's share of the tower's first layer."""
        history = batch.history.last(self.max_history)
        past_ED = self.marks(self.items(history.items.values), history, batch.time)
        pooled_BD = segment_mean(past_ED, history.items.row_of_value, batch.size)
        return self.head.request_side(torch.cat([self.request(batch), pooled_BD], dim=1), batch)

    def score_candidates(self, state: Tensor, candidates: Candidates) -> Scores:
        """Logits [t] per task."""
        rows = candidates.rows
        pair_tV = self.pair(candidates.pair, len(rows.values))
        candidate_tV = torch.cat([self.items(rows.values), pair_tV], dim=1)
        logit_tT = self.head(state, candidate_tV, rows.row_of_value, rows.values)
        return dict(zip(self.space.tasks, logit_tT.unbind(1)))

    def losses(self, batch: Batch) -> Losses:
        """By task, as `config.loss` says."""
        return task_losses(self.score(batch), batch, self.config.loss)

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Item vectors of the history, the request's layer, and per candidate its vector and the rest of the tower."""
        num_past = min(shape.num_history, self.max_history)
        item = linear_flops(self.items)
        user = num_past * item + linear_flops(self.request) + self.head.request_flops
        num_rows = shape.num_candidates + (0 if cached else num_past)
        return Cost(
            user_flops=0.0 if cached else float(user),
            item_flops=float(item + self.head.candidate_flops),
            bytes=dense_bytes(self) + 4.0 * self.config.dim * num_rows,
        )
