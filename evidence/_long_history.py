"""What the claims about long histories share: a planted log with rare old tastes, arms that see it, and how alike both stages choose.

R requests, C candidates of each, t candidates of all requests end to end, L events of a past, K chosen events, H heads.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from _ranking_lab import Examples, Training, World, scores, trained
from shortlist.data.batches import Batch
from shortlist.data.histories import Histories, Requests, View
from shortlist.data.jagged import Jagged, segment_sum
from shortlist.data.schema import Categorical, FieldTable, Space
from shortlist.layers.scoring import HeadConfig
from shortlist.layers.search import search
from shortlist.metrics import Interval, auc, auc_per_user, bootstrap_interval, bootstrap_ratio
from shortlist.models.base import Ranker, RequestShape
from shortlist.models.ranking.eta import ETA
from shortlist.models.ranking.sim import SIM
from shortlist.models.ranking.twin import TWIN, take_turns

PARTS = ("train", "valid", "test")
SHORT, FULL, POOLED = "DIN, newest 50", "DIN, all events", "mean of all events"
HARD, FINE, SOFT = "SIM hard", "SIM hard, by the attribute that tells", "SIM soft"
ETA_ARM, SDIM_ARM, TWIN_ARM, MIMN_ARM = "ETA", "SDIM", "TWIN", "MIMN, newest 100"
SHARP = "SDIM, 6 signs must agree"
SEARCHES = (HARD, SOFT, ETA_ARM, TWIN_ARM)
LONG = (POOLED, HARD, SOFT, ETA_ARM, SDIM_ARM, TWIN_ARM)
"""Those that read the whole past. MIMN reads event after event, so that a training on all of it would take longer than all others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LongArm:
    """A system with its settings."""

    system: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def arms(
    *, dim: int, max_history: int, recency: str, coarse: str, fine: str | None = None, use_ids: bool = True
) -> dict[str, LongArm]:
    """All rankers with the same embeddings and tower; 50 events found, 20 newest read whole, by those that search.

    Args:
        recency: of DIN's events; the others mark ages by themselves.
        coarse: attribute that SIM hard compares.
        fine: another one, for an arm of its own; None = neither such an arm nor SDIM with a sharper kernel.
        use_ids: read the items' own rows; False leaves their fields.
    """
    head = HeadConfig(widths=(64,), loss="bce")
    base: dict[str, Any] = {"dim": dim, "max_history": max_history, "use_ids": use_ids}
    din = {**base, "widths": head.widths, "loss": "bce", "recency": recency}
    long = {**base, "head": head}
    found = {
        SHORT: LongArm(system="din", settings={**din, "max_history": min(50, max_history)}),
        FULL: LongArm(system="din", settings=din),
        POOLED: LongArm(
            system="dnn", settings={**base, "widths": head.widths, "loss": "bce", "activation": head.activation}
        ),
        HARD: LongArm(system="sim", settings={**long, "attribute": coarse}),
        FINE: LongArm(system="sim", settings={**long, "attribute": fine}),
        SOFT: LongArm(system="sim", settings={**long, "search": "soft"}),
        ETA_ARM: LongArm(system="eta", settings=long),
        SDIM_ARM: LongArm(system="sdim", settings=long),
        SHARP: LongArm(system="sdim", settings={**long, "num_bits": 96, "signature_bits": 6}),
        TWIN_ARM: LongArm(system="twin", settings=long),
        MIMN_ARM: LongArm(system="mimn", settings={**long, "max_history": min(100, max_history)}),
    }
    return {name: arm for name, arm in found.items() if name not in (FINE, SHARP) or fine is not None}


def planted(*, num_users: tuple[int, int, int], length: int, seed: int = 0) -> World:
    """Users with tastes that lie far back.

    1,280 items in 64 kinds of 20, eight kinds to a shelf; both are fields of items. A past of `length` events, an hour apart: 24 of them
    of 6 rare kinds, anywhere but among the newest 100; the rest of 16 everyday kinds, two of each shelf, so that a shelf fills up. A
    request, a user's only one, asks for 3 items of the rare kinds, 3 of everyday kinds and 4 of kinds that the user never had, in random
    order; liked with chance .9, .9 and .1. The newest events tell the everyday kinds alone.

    Args:
        num_users: for training, validation and test.
    """
    rng = np.random.default_rng(seed)
    total, num_kinds, per_kind, num_rare = sum(num_users), 64, 20, 24
    kind_N = np.concatenate([[0], 1 + np.arange(num_kinds * per_kind) // per_kind])
    # Kinds of each user in random order per shelf: two everyday; of the other six on each shelf some are rare, others never met.
    order = rng.random((total, 8, 8)).argsort(2) + 8 * np.arange(8)[:, None]
    everyday = order[:, :, :2].reshape(total, 16)
    others = rng.permuted(order[:, :, 2:].reshape(total, 48), axis=1)
    rare, never = others[:, :6], others[:, 6:]
    kind = np.take_along_axis(everyday, rng.integers(0, 16, (total, length)), 1)
    newest = min(100, length // 4)
    places = rng.random((total, length - newest)).argsort(1)[:, :num_rare]
    np.put_along_axis(kind, places, np.take_along_axis(rare, rng.integers(0, 6, (total, num_rare)), 1), 1)
    asked = np.concatenate(
        [
            np.take_along_axis(rare, rng.integers(0, 6, (total, 3)), 1),
            np.take_along_axis(everyday, rng.integers(0, 16, (total, 3)), 1),
            np.take_along_axis(never, rng.integers(0, never.shape[1], (total, 4)), 1),
        ],
        axis=1,
    )
    chance = np.repeat([0.9, 0.9, 0.1], [3, 3, 4])
    liked = rng.random(asked.shape) < chance
    shuffled = rng.random(asked.shape).argsort(1)
    asked, liked = np.take_along_axis(asked, shuffled, 1), np.take_along_axis(liked, shuffled, 1)
    past, offered = (1 + k * per_kind + rng.integers(0, per_kind, k.shape) for k in (kind, asked))
    return _world_of(past, offered, liked, kind_N, num_users)


def _world_of(
    past: np.ndarray, offered: np.ndarray, liked: np.ndarray, kind_N: np.ndarray, num_users: tuple[int, int, int]
) -> World:
    """Pasts [U, L], candidates and labels [U, C] as one request per user, the first users for training."""
    total, length = past.shape
    ones = np.ones(past.size, dtype=np.int64)
    times = np.tile(np.arange(length) * 3_600, total)
    offsets = np.concatenate([[0], np.arange(total + 1) * length]).astype(np.int64)
    histories = Histories(
        offsets=offsets,
        item=past.ravel().astype(np.int64),
        time=times,
        group=np.arange(past.size),
        action=ones,
        value=ones.astype(np.float32),
    )
    shelf_N = np.where(kind_N > 0, 1 + (kind_N - 1) // 8, 0)
    fields = (Categorical(name="shelf", size=8), Categorical(name="kind", size=64))
    columns = {"shelf": torch.from_numpy(shelf_N), "kind": torch.from_numpy(kind_N)}
    known = torch.arange(len(kind_N)) > 0
    space = Space(items=FieldTable(len(kind_N), fields, columns), known_items=known, num_users=total)
    users = FieldTable(total + 1)
    view = View(histories=histories, space=space, users=users, now=int(times.max()))
    parts = []
    for part in np.split(np.arange(total), np.cumsum(num_users)[:-1]):
        rows = Jagged.from_lengths(
            torch.from_numpy(offered[part].ravel().astype(np.int64)), torch.full((len(part),), offered.shape[1])
        )
        requests = Requests(
            user=part + 1,
            time=np.full(len(part), length * 3_600),
            start=offsets[part + 1],
            end=offsets[part + 2],
            target_offsets=np.zeros(len(part) + 1, dtype=np.int64),
            target=np.zeros(0, dtype=np.int64),
            target_value=np.zeros(0, dtype=np.float32),
        )
        parts.append(
            Examples(requests=requests, rows=rows, label=torch.from_numpy(liked[part].ravel().astype(np.float32)))
        )
    return World(histories=histories, view=view, users=users, train=parts[0], valid=parts[1], test=parts[2])


def long_pasts(world: World, *, least: int, most: Mapping[str, int], seed: int = 0) -> World:
    """Only requests whose past holds at least so many events, at most so many of each part, drawn at random."""
    rng = np.random.default_rng(seed)
    parts = {}
    for part in PARTS:
        examples: Examples = getattr(world, part)
        long = np.flatnonzero(examples.requests.end - examples.requests.start >= least)
        index = torch.from_numpy(np.sort(rng.permutation(long)[: most[part]]))
        parts[part] = Examples(
            requests=examples.requests.select(index.numpy()),
            rows=examples.rows.select(index),
            label=examples.label[examples.rows.value_index(index)],
        )
    return replace(world, **parts)


def measured_arm(arm: LongArm, world: World, training: Training, seed: int) -> dict[str, float | Interval]:
    """Train, choose the epoch on validation GAUC, measure once on the test requests."""
    system, report = trained(arm.system, arm.settings, world, training, seed)
    began = time.perf_counter()
    score = scores(system, world, world.test)
    seconds = time.perf_counter() - began
    shape = RequestShape(num_history=training.max_history, num_candidates=100)
    figures: dict[str, float | Interval] = {
        **judged(score, world.test),
        "cost:seconds_per_step": report.seconds / max(report.steps, 1),
        "cost:ms_per_test_request": 1e3 * seconds / len(world.test.requests),
        "cost:mflop_per_100_candidates": system.cost(shape).flops(100) / 1e6,
        "cost:mflop_per_100_candidates_cached": system.cost(shape, cached=True).flops(100) / 1e6,
        "cost:best_epoch": float(report.best_epoch or report.epochs),
        "cost:epochs": float(report.epochs),
    }
    few = np.arange(min(64, len(world.test.requests)))
    alike = consistency(system, world.test.batch(world, few, system.max_history))
    return figures if alike is None else {**figures, "consistency": alike}


def judged(score: Tensor, examples: Examples) -> dict[str, Interval]:
    """AUC of all rows; GAUC and NDCG of the requests' own order, over users. A request without a like or without a dislike has none."""
    per_user = auc_per_user(examples.label, score, examples.user_of_row)
    weight = per_user.impressions_U.astype(np.float64)
    whole = auc(examples.label, score)
    ndcg_R, counts_R = ndcg(score, examples)
    return {
        "gauc": bootstrap_ratio(per_user.auc_U * weight, weight, seed=0, resamples=1_000),
        "auc": Interval(whole, whole, whole),
        "ndcg": bootstrap_interval(ndcg_R[counts_R], examples.requests.user[counts_R], seed=0, resamples=1_000),
    }


def ndcg(score: Tensor, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    """NDCG [R] of each request's whole order, and bool [R]: requests with both labels."""
    rows = examples.rows
    order = torch.argsort(score, descending=True, stable=True)
    order = order[rows.row_of_value[order].argsort(stable=True)]
    discount_t = 1 / torch.log2(rows.position_of_value + 2.0)
    liked_R = segment_sum(examples.label, rows.row_of_value, rows.num_rows)
    gain_R = segment_sum(discount_t * examples.label[order], rows.row_of_value, rows.num_rows)
    best_R = segment_sum(
        discount_t * (rows.position_of_value < liked_R[rows.row_of_value]), rows.row_of_value, rows.num_rows
    )
    both_R = (liked_R > 0) & (liked_R < rows.lengths)
    return (gain_R / best_R.clamp(min=1e-9)).numpy(), both_R.numpy()


@torch.no_grad()
def consistency(system: Ranker, batch: Batch) -> float | None:
    """Share of the K events that the exact stage would rank first on the whole past which the search hands to it; None without a search.

    Several heads name their best in turn. Requests with a past of K or fewer do not count.
    """
    if not isinstance(system, SIM | ETA | TWIN):
        return None
    rows = batch.candidate_rows
    state, k = system.user_state(batch), system.config.num_found
    item_tD = system.encoder(rows.values)
    past = state.past.items
    item_BCD, _ = rows.with_values(item_tD).padded()
    event_BLD, _ = past.with_values(state.past.event_ED).padded()
    if isinstance(system, TWIN):
        found = system.found(state, rows, item_tD)
        key_BLD, _ = past.with_values(state.key_ED).padded()
        bias_BLH, _ = past.with_values(state.bias_EH).padded()
        query, shape = system.relevance.query, system.relevance.shape
        key_BLHd = key_BLD.unflatten(2, shape)
    else:
        found = system.found(state, rows, item_tD)
        query, shape = system.long.query, (system.long.num_heads, system.long.width)
        key_BLHd = system.long.key(event_BLD).unflatten(2, shape)
        bias_BLH = torch.zeros(*event_BLD.shape[:2], shape[0])

    def exact(first: int, stop: int) -> Tensor:
        query_BcHd = query(item_BCD[:, first:stop]).unflatten(2, shape)
        logit_BcHL = torch.einsum("bchd,blhd->bchl", query_BcHd, key_BLHd) / shape[1] ** 0.5
        return logit_BcHL + bias_BLH.transpose(1, 2)[:, None]

    wanted = search(exact, past, rows, k, pairs_at_once=1_000_000, pick=take_turns)
    is_long_t = past.lengths[rows.row_of_value] > k
    in_both_t = torch.stack([_num_shared(*pair) for pair in zip(_sets(wanted), _sets(found), strict=True)])
    return float((in_both_t[is_long_t] / k).mean()) if is_long_t.any() else None


def _sets(chosen: Any) -> list[Tensor]:
    return [event[is_real] for event, is_real in zip(chosen.event, chosen.is_real)]


def _num_shared(one: Tensor, other: Tensor) -> Tensor:
    return torch.isin(one, other).sum()


def shown(arms: Mapping[str, Any], metric: str, names: tuple[str, ...]) -> str:
    """Means of a metric by arm, for a reason."""
    return ", ".join(f"{name} {arms[name].metrics[metric].mean:.4f}" for name in names if metric in arms[name].metrics)


def ordered_in_every_seed(better: Any, worse: Any, metric: str) -> bool:
    """Whether an arm is above another with each seed."""
    return all(a > b for a, b in zip(better.per_seed[metric], worse.per_seed[metric], strict=True))
