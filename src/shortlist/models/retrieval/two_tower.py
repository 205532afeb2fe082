"""Two towers: a user's and an item's vector whose inner product ranks, trained with a softmax over the batch that is corrected for
sampling (Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations", RecSys 2019).

    u = unit(MLP(mean of past items; decayed sum of past items; user fields; context)),   v_y = unit(MLP(item id + item fields))
    score(y) = u . v_y,    loss = softmax over the pool of (score / temperature - log expected number of y in the pool)

The pool holds the batch's targets, whose frequency follows popularity, and uniform negatives besides ("mixed negative sampling",
Yang et al., WWW 2020 companion), which show the model items that are rarely anyone's target.

Differences from the paper: item frequencies are counted on the training log, or learned from the stream as there (`frequency`); all
items of a group are targets of one request; no reward weights but the batch's own.

B requests, E events end to end, T targets end to end, M pool, D width of an embedding, d width of a tower's output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from shortlist.data.batches import Batch, History
from shortlist.data.histories import View
from shortlist.data.jagged import segment_sum
from shortlist.data.samplers import InBatchSampler, UniformSampler, mixed_log_expected, update_streaming_interval
from shortlist.data.schema import Space
from shortlist.embeddings.base import TableChoice
from shortlist.errors import ConfigError
from shortlist.layers.counting import distinct_events, groups_ago
from shortlist.layers.fields import ItemEncoder
from shortlist.layers.losses import in_batch_softmax_loss, unit
from shortlist.layers.scoring import RequestEncoder, dense_bytes, linear_flops
from shortlist.layers.towers import MLP
from shortlist.models.base import Cost, Losses, RequestShape, VectorRetriever
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class TwoTowerConfig:
    """Settings of the two towers."""

    dim: int = 64
    """Width of embeddings and of both towers' outputs."""
    widths: tuple[int, ...] = (128,)
    """Hidden widths of either tower."""
    temperature: float = 0.05
    """The cosine is divided by it in the loss; smaller is sharper."""
    num_uniform: int = 256
    """Uniform negatives added to each batch's own targets; 0 = none, as in the first paper."""
    frequency: Literal["counts", "streaming"] = "counts"
    """Chances of the batch's targets: counted on the training log, or learned batch by batch (algorithm 2 of the paper)."""
    correct_target: bool = True
    """Correct the target's own score too, as the paper does; False gives the unbiased estimate of the full softmax."""
    decay: float = 0.7
    """Weight of a past group relative to the one after it, in the decayed sum."""
    id_dropout: float = 0.1
    """Share of item ids replaced by the unknown one in training, so that new items live by their fields."""
    dropout: float = 0.1
    """Share of hidden units set to 0 in training."""
    max_history: int = 100
    """Newest events read per request."""
    table: TableChoice = TableChoice()  # noqa: RUF009  (frozen)
    """Which table holds the item ids."""

    def __post_init__(self) -> None:
        if self.dim < 1 or self.max_history < 1 or self.num_uniform < 0:
            raise ConfigError(
                "two-tower: dim and max_history must be at least 1 and num_uniform at least 0, "
                f"got {self.dim}, {self.max_history} and {self.num_uniform}"
            )
        if self.temperature <= 0:
            raise ConfigError(f"two-tower: temperature must be above 0, got {self.temperature}")
        if not 0 < self.decay <= 1:
            raise ConfigError(f"two-tower: decay must be above 0 and at most 1, got {self.decay}")
        if not 0 <= self.id_dropout < 1:
            raise ConfigError(f"two-tower: id_dropout must be from 0 to below 1, got {self.id_dropout}")
        if self.frequency not in ("counts", "streaming"):
            raise ConfigError(f"two-tower: frequency must be counts or streaming, got {self.frequency!r}")


STREAMING_RATE = 0.05  # weight of the newest interval between two occurrences of an item
FIRST_INTERVAL = 100.0  # batches between two occurrences, before anything is known


@system(
    "two-tower",
    stage="retrieval",
    paper="Yi et al., RecSys 2019",
    needs={"history"},
    cold_users=True,
    cold_items=True,
    tiny={"dim": 8, "widths": (16,), "num_uniform": 8, "dropout": 0.0},
)
class TwoTower(VectorRetriever):
    """User and item towers under an in-batch softmax that is corrected for sampling."""

    Config = TwoTowerConfig
    config: TwoTowerConfig
    feed = "targets"
    counts_N: Tensor
    interval_N: Tensor
    last_step_N: Tensor
    step: Tensor

    def __init__(self, config: TwoTowerConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.max_history
        dim, widths = config.dim, config.widths
        self.items = ItemEncoder(space, dim, id_dropout=config.id_dropout, table=config.table)
        self.request = RequestEncoder(space, dim)
        self.item_tower = MLP(dim, widths, dim, dropout=config.dropout)
        self.user_tower = MLP(2 * dim + self.request.width, widths, dim, dropout=config.dropout)
        num_rows = space.num_items + 1
        self.buffer("counts_N", torch.zeros(num_rows))
        self.buffer("interval_N", torch.full((num_rows,), FIRST_INTERVAL))
        self.buffer("last_step_N", torch.zeros(num_rows, dtype=torch.int64))
        self.buffer("step", torch.zeros((), dtype=torch.int64))

    def prepare(self, view: View) -> None:
        """Count how often each item is chosen in training: the chance that it is in a batch."""
        counts = np.bincount(view.histories.item, minlength=view.space.items.num_rows)
        self.buffer("counts_N", torch.from_numpy(counts.astype(np.float32)).to(self.space_device()))

    def encode_user(self, batch: Batch) -> Tensor:
        """float32 [B, d], of length 1."""
        mean_BD, decayed_BD = self._past(batch.history.last(self.max_history), batch.size)
        return unit(self.user_tower(torch.cat([mean_BD, decayed_BD, self.request(batch)], dim=1)))

    def _past(self, history: History, num_requests: int) -> tuple[Tensor, Tensor]:
        """Mean over past items and mean weighted by decay^(groups ago), float32 [B, D] each; unknown items are left out."""
        read = distinct_events(history, per_group=True)
        row_E = history.items.row_of_value[read]
        item_ED = self.items(history.items.values[read])
        weight_E = self.config.decay ** groups_ago(history)[read].to(item_ED.dtype)
        pooled = []
        for w_E in (torch.ones_like(weight_E), weight_E):
            total_B = segment_sum(w_E, row_E, num_requests).clamp(min=1e-6)
            pooled.append(segment_sum(w_E[:, None] * item_ED, row_E, num_requests) / total_B[:, None])
        return pooled[0], pooled[1]

    def encode_items(self, rows: Tensor) -> Tensor:
        """float32 [n, d], of length 1."""
        return unit(self.item_tower(self.items(rows)))

    def losses(self, batch: Batch) -> Losses:
        """{"retrieval": mean cross-entropy}; the batch's candidates are what each request chose, a request weighs 1 in all."""
        targets = batch.candidate_rows
        uniform = UniformSampler.of_mask(self.items.known_items)
        pool = torch.cat([targets.values, uniform.draw((self.config.num_uniform,))])
        weight_T = batch.weight
        if weight_T is None:
            weight_T = 1.0 / targets.lengths[targets.row_of_value].clamp(min=1).float()
        distinct, place = pool.unique(return_inverse=True)
        log_expected_M = self._log_expected(pool, targets.values, uniform)
        loss = in_batch_softmax_loss(
            self.encode_user(batch) / self.config.temperature,
            self.encode_items(distinct)[place],
            pool,
            targets,
            log_expected_M,
            weight_T,
            correct_target=self.config.correct_target,
        )
        return {"retrieval": loss}

    @torch.no_grad()
    def _log_expected(self, pool: Tensor, targets: Tensor, uniform: UniformSampler) -> Tensor:
        """Log of how often each row of the pool [M] is expected in it."""
        if self.config.frequency == "streaming":
            if self.training:
                self.step += 1
                update_streaming_interval(
                    self.last_step_N, self.interval_N, targets, int(self.step), max(STREAMING_RATE, 1 / int(self.step))
                )
            log_q_in_batch = -self.interval_N[pool].log() - math.log(max(len(targets), 1))
        else:
            log_q_in_batch = InBatchSampler.of_counts(self.counts_N).log_q(pool)
        return mixed_log_expected([(len(targets), log_q_in_batch), (self.config.num_uniform, uniform.log_q(pool))])

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """User tower once, item vectors kept: an inner product per item."""
        num_read, dim = min(shape.num_history, self.max_history), self.config.dim
        item_maps = linear_flops(self.items)
        user = num_read * (item_maps + 5.0 * dim) + self.user_tower.flops_per_row + linear_flops(self.request)
        read = dense_bytes(self.user_tower) + dense_bytes(self.request) + 4.0 * dim * (num_read + shape.num_items)
        return Cost(user_flops=0.0 if cached else user, item_flops=2.0 * dim, bytes=read)
