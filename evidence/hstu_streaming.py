"""Pointwise attention against softmax on a stream whose catalogue grows: HSTU's synthetic data set, scaled to a CPU.

`shortlist prove hstu_streaming`; no public data. Full form about 12 minutes on one core.
R records, L events of each, C categories of a record, n items.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from shortlist.data.batches import Batch, next_event_batch, request_batch
from shortlist.data.histories import Histories, Int, Requests, View
from shortlist.data.schema import FieldTable, Space
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab, hold_if
from shortlist.layers.hstu import HSTUBlockConfig
from shortlist.models.base import VectorRetriever
from shortlist.registry import find
from shortlist.training.config import TrainerConfig
from shortlist.training.trainer import fit

RECIPE: dict[str, Any] = {
    "dim": 64,
    "loss": "sampled_softmax",
    "num_negatives": 128,
    "normalise": True,
    "temperature": 0.05,
    "dropout": 0.0,
}
POINTWISE, SOFTMAX, TRANSFORMER = "HSTU without bias", "HSTU without bias, softmax", "Transformer"
WITHOUT_BIAS: dict[str, Any] = {"position_bias": False, "time_bias": False, "block_dropout": 0.0}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    POINTWISE: ("hstu", {"layers": HSTUBlockConfig(**WITHOUT_BIAS)}),
    SOFTMAX: ("hstu", {"layers": HSTUBlockConfig(**WITHOUT_BIAS, attention="softmax")}),
    TRANSFORMER: ("sasrec", {}),
}
FACTOR = 1.2
BEST = "a list that knows what each record was drawn from"
LAST = 4
"""Events of each test record that are predicted."""

CLAIM = Claim(
    name="hstu_streaming",
    systems=("hstu", "sasrec"),
    claim="On a stream whose catalogue grows, sums of SiLU(scores) keep how much of each category a user took, which a softmax divides "
    "away: HSTU finds more than its softmax twin and than a Transformer.",
    data="Made as in the paper's appendix, scaled down: 2,000 items in 50 categories, 50,000 records of 64 events in order of arrival, "
    "40 % of the items there at the start, the rest coming one by one; up to 5 categories per record, drawn by a Dirichlet process",
    protocol="One pass over the first 90 % of the records in order, then the last "
    f"{LAST} events of each of the last 10 %, each given all events before it; full ranking, nothing filtered; same width, layers, loss, "
    "optimiser and batches for all arms, no bias and no dropout in any; nothing is selected",
    bar=f"HR@10 of HSTU at least {FACTOR} x its softmax twin over three seeds, and the twin not below the Transformer",
    published={
        "HSTU without rab (20,000 items, 1,000,000 records of 128)": {"hr@10": 0.0893, "hr@50": 0.3170},
        "HSTU without rab, softmax": {"hr@10": 0.0617, "hr@50": 0.2496},
        "Transformer": {"hr@10": 0.0442, "hr@50": 0.2025},
    },
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """Size of the stream and of the training; the same for all arms."""

    num_records: int = 50_000
    length: int = 64
    num_items: int = 2_000
    num_categories: int = 50
    batch_size: int = 32
    lr: float = 1e-3
    test_share: float = 0.1
    start_share: float = 0.4
    """Share of the items that are there at the start."""

    @property
    def num_train(self) -> int:
        """Records of the one pass."""
        return int(self.num_records * (1 - self.test_share))


FULL = Stream()
QUICK = Stream(num_records=1_500, length=32, num_items=200, num_categories=10, lr=3e-3)


class Records(NamedTuple):
    """A stream, and what it was drawn from."""

    item_RL: Int
    """Items 1..n, records in order of arrival."""
    slot_RL: Int
    """Which of the record's categories each event is of."""
    prior_RC: NDArray[np.float64]
    alpha_R: NDArray[np.float64]
    there_RC: Int
    """Items of each of the record's categories that have arrived by then."""

    def of_test(self, num_train: int) -> Records:
        """Those after the training records."""
        tests = slice(num_train, None)
        prior_RC, alpha_R = self.prior_RC[tests], self.alpha_R[tests]
        return Records(self.item_RL[tests], self.slot_RL[tests], prior_RC, alpha_R, self.there_RC[tests])


def drawn(stream: Stream, seed: int) -> Records:
    """The stream of a seed."""
    rng = np.random.default_rng([seed, 7])
    R, L, most = stream.num_records, stream.length, 5
    category_N = rng.integers(0, stream.num_categories, stream.num_items)
    # Categories of a record and their random prior; fewer than five where the last ones get no weight.
    own_RC = np.argpartition(rng.random((R, stream.num_categories)), most, axis=1)[:, :most]
    prior_RC = rng.random((R, most)) * (np.arange(most) < rng.integers(1, most + 1, (R, 1)))
    prior_RC /= prior_RC.sum(1, keepdims=True)
    edge_RC = np.cumsum(prior_RC, axis=1)
    alpha_R = rng.uniform(1, 500, R)
    slot_RL = np.zeros((R, L), dtype=np.int64)
    for step in range(L):
        fresh_R = (edge_RC < rng.random((R, 1))).sum(1).clip(max=most - 1)
        if step:
            again_R = slot_RL[np.arange(R), rng.integers(0, step, R)]  # a past event: categories by their counts
            is_fresh_R = rng.random(R) < alpha_R / (alpha_R + step)
            fresh_R = np.where(is_fresh_R, fresh_R, again_R)
        slot_RL[:, step] = fresh_R
    category_RL = np.take_along_axis(own_RC, slot_RL, axis=1)
    # Items of a category in order of arrival; a record finds those that have arrived by then.
    order = np.argsort(category_N, kind="stable")
    first_C = np.searchsorted(category_N[order], np.arange(stream.num_categories + 1))
    arrived_R = stream.num_items * (stream.start_share + (1 - stream.start_share) * np.arange(R) / R)
    there_RC = np.stack([np.searchsorted(order[a:b], arrived_R) for a, b in pairwise(first_C)], axis=1).clip(min=1)
    place_RL = (rng.random((R, L)) * np.take_along_axis(there_RC, category_RL, axis=1)).astype(np.int64)
    item_RL = order[first_C[category_RL] + place_RL] + 1
    return Records(item_RL, slot_RL, prior_RC, alpha_R, np.take_along_axis(there_RC, own_RC, axis=1))


def best_possible(test: Records) -> dict[str, float]:
    """Hit rates of a list that knows what each record was drawn from: nobody can do better."""
    R, L = test.item_RL.shape
    found = {10: 0.0, 50: 0.0}
    for at in range(L - LAST, L):
        count_RC = (test.slot_RL[:, :at, None] == np.arange(test.prior_RC.shape[1])).sum(1)
        chance_RC = (test.alpha_R[:, None] * test.prior_RC + count_RC) / (test.alpha_R + at)[:, None]
        each_RC = chance_RC / test.there_RC
        order_RC = np.argsort(-each_RC, axis=1)
        there_RC = np.take_along_axis(test.there_RC, order_RC, axis=1)
        for k in found:
            # The list is filled from the category whose items are the likeliest, then from the next.
            before_RC = np.cumsum(there_RC, axis=1) - there_RC
            shown_RC = np.minimum(there_RC, (k - before_RC).clip(min=0))
            found[k] += float((shown_RC * np.take_along_axis(each_RC, order_RC, axis=1)).sum() / R / LAST)
    return {"hr@10": found[10], "hr@50": found[50]}


def view_of(item_RL: Int, num_items: int) -> View:
    """Records as users in order; every event is a group, times only give the order."""
    R, L = item_RL.shape
    ones, number = np.ones(R * L, dtype=np.int64), np.arange(R * L)
    histories = Histories(
        offsets=np.concatenate([[0], np.arange(R + 1) * L]),
        item=item_RL.reshape(-1),
        time=number,
        group=number,
        action=ones,
        value=ones.astype(np.float32),
    )
    known = torch.zeros(num_items + 1, dtype=torch.bool)
    known[torch.from_numpy(item_RL.reshape(-1))] = True
    space = Space(items=FieldTable(num_items + 1), known_items=known, num_users=R, has_clock=False)
    return View(histories=histories, space=space, users=FieldTable(R + 1), now=R * L)


@dataclass(frozen=True, slots=True)
class InOrder:
    """Batches of a stream: records as they arrive, once."""

    view: View
    batch_size: int

    def steps_per_epoch(self) -> int:
        """Batches of the pass."""
        return -(-self.view.space.num_users // self.batch_size)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """From step `start` on."""
        users = np.arange(1, self.view.space.num_users + 1)
        for step in range(start, self.steps_per_epoch()):
            rows = users[step * self.batch_size : (step + 1) * self.batch_size]
            yield next_event_batch(self.view.histories, self.view.users, rows, max_history=1_000)


def run(lab: Lab) -> None:
    """Every arm with every seed; a seed is also another stream."""
    stream = QUICK if lab.quick else FULL
    for seed in lab.seeds:
        records = drawn(stream, seed)
        lab.measure(BEST, seed, partial(best_possible, records.of_test(stream.num_train)))
        for name in ARMS:
            lab.measure(name, seed, partial(measured, stream, records.item_RL, name, seed))


def measured(stream: Stream, item_RL: Int, name: str, seed: int) -> dict[str, float]:
    """One pass over the training records, then the test records."""
    view = view_of(item_RL[: stream.num_train], stream.num_items)
    torch.manual_seed(seed)
    system, settings = ARMS[name]
    entry = find(system)
    own = {"max_history": stream.length, "use_fields": False, **RECIPE, **settings}
    model: VectorRetriever = entry.cls(entry.config(own), view.space)
    config = TrainerConfig(
        epochs=1,
        batch_size=stream.batch_size,
        lr=stream.lr,
        optimiser="adamw",
        clip_norm=None,
        patience=None,
        seed=seed,
    )
    report = fit(model, view, lambda phase: InOrder(view, stream.batch_size), config=config, progress=False)
    hit_10, hit_50 = hits(model, item_RL[stream.num_train :], view)
    return {"hr@10": hit_10, "hr@50": hit_50, "cost:training_seconds": report.seconds}


def hits(model: VectorRetriever, test_RL: Int, view: View) -> tuple[float, float]:
    """Share of the last events of the test records that stand among the best 10 and 50 of all items."""
    R, L = test_RL.shape
    histories = view_of(test_RL, view.space.num_items).histories
    none, found = np.zeros(0, dtype=np.int64), []
    for at in range(L - LAST, L):
        for part in np.array_split(np.arange(R), max(R // 512, 1)):
            requests = Requests(
                user=np.zeros(len(part), dtype=np.int64),
                time=part * L + at,
                start=part * L,
                end=part * L + at,
                target_offsets=np.zeros(len(part) + 1, dtype=np.int64),
                target=none,
                target_value=none.astype(np.float32),
            )
            with torch.inference_mode():
                rows = model.retrieve(request_batch(histories, view.users, requests, max_history=L), 50).rows.numpy()
            is_target = rows == test_RL[part, at][:, None]
            found.append(np.stack([is_target[:, :10].any(1), is_target.any(1)], 1))
    hit_10, hit_50 = np.concatenate(found).mean(0)
    return float(hit_10), float(hit_50)


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar."""
    pointwise, softmax, transformer = (arms[name].metrics["hr@10"].mean for name in (POINTWISE, SOFTMAX, TRANSFORMER))
    ratio = pointwise / max(softmax, 1e-9)
    best = arms[BEST].metrics["hr@10"].mean
    return hold_if(
        ratio >= FACTOR and softmax >= transformer,
        f"HR@10 {pointwise:.4f} against {softmax:.4f} with softmax ({ratio:.2f} x) and {transformer:.4f} of the Transformer; no list can "
        f"reach more than {best:.4f} ({best / max(softmax, 1e-9):.2f} x the softmax).",
    )
