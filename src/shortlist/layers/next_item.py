"""The objective of next-item systems: how a position's vector asks for items, in training and in serving. One for all of them.

Full softmax ("SASRec+") and sampled softmax: Klenitskiy & Vasilev, RecSys 2023, and the baselines of HSTU (Zhai et al., ICML 2024); gBCE
("gSASRec"): Petrov & Macdonald, RecSys 2023; BCE with one negative: Kang & McAuley, ICDM 2018; TOP1, BPR, their max forms and
negatives of the own batch beside popular ones: GRU4Rec, Hidasi et al., ICLR 2016, and Hidasi & Karatzoglou, CIKM 2018.

P supervised positions, T their targets end to end, n items (matrices have n + 1 rows), D width, k negatives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from shortlist.data.batches import NextTargets
from shortlist.data.histories import View
from shortlist.data.jagged import Jagged
from shortlist.data.samplers import (
    InBatchSampler,
    PopularitySampler,
    UniformSampler,
    draw_outside,
    mixed_log_expected,
)
from shortlist.data.schema import Space
from shortlist.errors import ConfigError
from shortlist.kernels.sampled_softmax import shared_sampled_softmax
from shortlist.layers.losses import (
    bce_loss,
    bpr_loss,
    bpr_max_loss,
    full_softmax_loss,
    gbce_beta,
    gbce_loss,
    hide_hits,
    negative_scores,
    sampled_softmax_loss,
    target_scores,
    top1_loss,
    top1_max_loss,
    unit,
)

SequenceLoss = Literal["full_softmax", "sampled_softmax", "gbce", "bce_k", "bce", "top1", "bpr", "top1_max", "bpr_max"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NextItemConfig:
    """Settings of the objective."""

    loss: SequenceLoss = "full_softmax"
    """full_softmax over all items; sampled_softmax, gbce and bce_k against `num_negatives`; bce as in SASRec's paper: one negative of
    its own per position, none of the user's training items. top1, bpr and their max forms compare scores in pairs, as in GRU4Rec's
    papers. Above some 100,000 items a sampled loss is the affordable one."""
    num_negatives: int = 256
    """Negatives k of the sampled losses, uniform over the items; bce always takes one."""
    negatives: Literal["shared", "own", "in_batch"] = "shared"
    """shared: one draw of distinct items per step serves all positions. own: each position draws for itself, P * k * D numbers.
    in_batch: targets of the batch, one per sequence, and `num_negatives` extra items drawn by popularity; not every system has it."""
    popularity_alpha: float = 0.5
    """in_batch: an extra negative is drawn with a chance proportional to the item's count ** alpha; 0 = uniform, 1 = popularity."""
    log_q: float = 1.0
    """in_batch with sampled_softmax: share of the log of how often an item is expected among the negatives that is taken off its
    score; 1 estimates the full softmax without bias, 0 punishes popular items."""
    score_penalty: float = 1.0
    """bpr_max: weight of the squared scores of negatives, without which they drift."""
    elu: float | None = None
    """Scores below 0 become elu * (exp(score) - 1) in the loss, as in GRU4Rec's bpr_max; None = as they are. It changes no order,
    so it is not served."""
    normalise: bool = False
    """Score by cosine instead of inner product; wants a temperature of about 0.05."""
    temperature: float = 1.0
    """Scores are divided by it, in training and serving."""
    gbce_t: float = 0.75
    """Calibration t of gBCE: 0 = plain BCE, 1 = calibrated probabilities."""
    learn_offset: bool = True
    """bce_k and gbce add one learned number to all scores, started at -log k. Published models must bend all item vectors into one
    direction for it first, which can look like no training at all for thousands of steps. It changes no order, so it is not served."""

    def check_objective(self, system: str, *, sparse: bool, counts: bool = False) -> None:
        """Raises ConfigError, in the name of `system`, where the settings make no objective.

        Args:
            sparse: the item table is.
            counts: the system calls `NextItemLoss.prepare`, which in-batch negatives need.
        """
        if self.negatives == "in_batch" and not counts:
            raise ConfigError(f"{system} does not count items, which negatives = 'in_batch' needs; use shared or own")
        if self.popularity_alpha < 0 or self.log_q < 0 or self.score_penalty < 0 or (self.elu or 0) < 0:
            raise ConfigError(f"{system}: popularity_alpha, log_q, score_penalty and elu must be 0 or above")
        if self.num_negatives < (0 if self.negatives == "in_batch" else 1):
            raise ConfigError(f"{system}: num_negatives must be at least 1, got {self.num_negatives}")
        if self.temperature <= 0:
            raise ConfigError(f"{system}: temperature must be above 0, got {self.temperature}")
        if sparse and self.loss == "full_softmax":
            raise ConfigError(
                f"{system}: a full softmax touches every row of the table; use a sampled loss or sparse = false"
            )


class ItemVectors(Protocol):
    """What makes vectors of items: an ItemEncoder, or one with columns of the system's own beside it."""

    def __call__(self, rows: Tensor) -> Tensor:
        """float [*, D] for catalogue rows [...] int64."""
        ...

    def all(self) -> Tensor:
        """float [n + 1, D]: every item."""
        ...


class NextItemLoss(nn.Module):
    """The loss of supervised positions, and the scaling that makes scores of vectors.

    The item encoder is the system's own and is given with each call, so that its weights have one name.

    Args:
        config: the system's settings.
        space: items; those with fields are judged by them, without fields an item that never sold is a negative like any other.
        has_fields: the system's item vectors read fields.
    """

    candidates_N: Tensor
    count_N: Tensor

    def __init__(self, config: NextItemConfig, space: Space, *, has_fields: bool) -> None:
        super().__init__()
        self.config = config
        has_offset = config.learn_offset and config.loss in ("bce_k", "gbce")
        self.offset = nn.Parameter(torch.tensor(-math.log(config.num_negatives))) if has_offset else None
        is_candidate_N = space.known_items.clone() if has_fields else torch.ones_like(space.known_items)
        is_candidate_N[0] = False
        self.register_buffer("candidates_N", is_candidate_N, persistent=False)
        self.is_in_batch = config.negatives == "in_batch" and config.loss not in ("full_softmax", "bce")
        if self.is_in_batch:  # training that goes on from a checkpoint does not count again
            self.register_buffer("count_N", torch.zeros(space.num_items + 1))

    def prepare(self, view: View) -> None:
        """Count the items' training events, where negatives are drawn by them."""
        if self.is_in_batch:
            count_N = np.bincount(view.histories.item, minlength=len(self.candidates_N))
            self.count_N.copy_(torch.from_numpy(count_N.astype(np.float32)))

    def forward(
        self,
        items: ItemVectors,
        query_PD: Tensor,
        targets: NextTargets,
        history: Jagged,
        all_items_ND: Tensor | None = None,
    ) -> Tensor:
        """The mean loss over positions, a scalar; 0 where no position is supervised.

        Args:
            items: makes item vectors [*, D].
            query_PD: what each supervised position asks for, before scaling.
            targets: the positions and their items.
            history: the batch's input items; `bce` draws none of the user's own.
            all_items_ND: every item's vector [n + 1, D] where the system has made them for its inputs already; full_softmax only.
        """
        config, query_PD = self.config, self.query(query_PD)
        if config.loss == "full_softmax":
            all_items_ND = items.all() if all_items_ND is None else all_items_ND
            return full_softmax_loss(
                query_PD, self.vectors(all_items_ND), targets.items, targets.weight, allowed_N=self.candidates_N
            )
        negatives, log_expected = self._negatives(targets, history)
        if config.loss == "sampled_softmax" and not self.is_in_batch and negatives.dim() == 1 and config.elu is None:
            return self._fused(items, query_PD, targets, negatives)
        positive_T = self._activated(target_scores(query_PD, self.vectors(items(targets.items.values)), targets.items))
        negative_Pk = self._activated(negative_scores(query_PD, self.vectors(items(negatives))))
        negative_Pk = hide_hits(negative_Pk, negatives, targets.items)
        match config.loss:
            case "sampled_softmax":
                return sampled_softmax_loss(positive_T, negative_Pk, targets.items, targets.weight, log_expected)
            case "gbce":
                beta = gbce_beta(negatives.shape[-1], int(self.candidates_N.sum()), config.gbce_t)
                return gbce_loss(positive_T, negative_Pk, targets.items, targets.weight, beta=beta)
            case "bce" | "bce_k":
                return bce_loss(positive_T, negative_Pk, targets.items, targets.weight)
            case "top1":
                return top1_loss(positive_T, negative_Pk, targets.items, targets.weight)
            case "bpr":
                return bpr_loss(positive_T, negative_Pk, targets.items, targets.weight)
            case "top1_max":
                return top1_max_loss(positive_T, negative_Pk, targets.items, targets.weight)
            case "bpr_max":
                penalty = config.score_penalty
                return bpr_max_loss(positive_T, negative_Pk, targets.items, targets.weight, penalty=penalty)
        raise ConfigError(f"no next-item loss named {config.loss!r}")

    def _fused(self, items: ItemVectors, query_PD: Tensor, targets: NextTargets, negatives_k: Tensor) -> Tensor:
        """Sampled softmax against distinct negatives that all positions share, in one pass."""
        rows, weight_T = targets.items, targets.weight * (targets.items.values != 0)
        return shared_sampled_softmax(
            query_PD,
            self.vectors(items(rows.values)),
            self.vectors(items(negatives_k)),
            rows.row_of_value,
            rows.values,
            negatives_k,
            weight_T / weight_T.sum().clamp(min=torch.finfo(weight_T.dtype).tiny),
        )

    def _activated(self, scores: Tensor) -> Tensor:
        """Scores as the loss reads them: with the learned offset, through the activation."""
        if self.offset is not None:
            scores = scores + self.offset
        return scores if self.config.elu is None else nn.functional.elu(scores, self.config.elu)

    def query(self, query_PD: Tensor) -> Tensor:
        """Query vectors [P, D] as scores read them."""
        return (unit(query_PD) if self.config.normalise else query_PD) / self.config.temperature

    def vectors(self, items_D: Tensor) -> Tensor:
        """Item vectors [*, D] as scores read them."""
        return unit(items_D) if self.config.normalise else items_D

    def _negatives(self, targets: NextTargets, history: Jagged) -> tuple[Tensor, Tensor | float]:
        """Catalogue rows, int64 [k] that all positions share or [P, k], and what a softmax takes off their scores."""
        config = self.config
        if self.is_in_batch:
            return self._in_batch(targets.items.values, history.num_rows)
        sampler = UniformSampler.of_mask(self.candidates_N)
        if config.loss == "bce":
            own_items, owner_P = _items_of_users(history, targets)
            return draw_outside(sampler, own_items, owner_P, 1), 0.0
        if config.negatives == "own":
            return sampler.draw((targets.items.num_rows, config.num_negatives)), 0.0
        return sampler.draw_distinct(config.num_negatives), 0.0

    def _in_batch(self, targets_T: Tensor, num_rows: int) -> tuple[Tensor, Tensor | float]:
        """The targets of a session-parallel step, or as many random ones of a batch of whole sequences; then extra popular items."""
        config = self.config
        if len(targets_T) > num_rows:
            targets_T = targets_T[torch.randperm(len(targets_T), device=targets_T.device)[:num_rows]]
        extra = PopularitySampler.of_counts(self.count_N, config.popularity_alpha)
        rows = torch.cat([targets_T, extra.draw((config.num_negatives,))])
        if config.loss != "sampled_softmax" or not config.log_q or not len(rows):
            return rows, 0.0
        in_batch = InBatchSampler.of_counts(self.count_N)
        parts = [(len(targets_T), in_batch.log_q(rows)), (config.num_negatives, extra.log_q(rows))]
        return rows, config.log_q * mixed_log_expected(parts)


def _items_of_users(history: Jagged, targets: NextTargets) -> tuple[Jagged, Tensor]:
    """All items of each user in a training batch, inputs and targets, and the user [P] of each supervised position."""
    user_P = history.row_of_value[targets.position]
    user = torch.cat([history.row_of_value, user_P[targets.items.row_of_value]])
    order = user.argsort(stable=True)
    values = torch.cat([history.values, targets.items.values])[order]
    return Jagged.from_lengths(values, torch.bincount(user, minlength=history.num_rows)), user_P
