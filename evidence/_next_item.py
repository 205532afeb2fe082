"""What the next-item claims share: one way to train a sequence system, one evaluation, the same baselines for every table.

R requests, C = 101 candidates of a sampled ranking.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from shortlist.data.batches import request_batch
from shortlist.data.dataset import Dataset, build_dataset
from shortlist.data.datasets import load
from shortlist.data.histories import Requests
from shortlist.data.jagged import Jagged
from shortlist.data.log import EventLog, read
from shortlist.data.samplers import UniformSampler, draw_outside
from shortlist.data.splits import DataConfig
from shortlist.evaluation.evaluate import CHUNK, evaluate, held_out, judge_pages, make_pages, pager_of
from shortlist.evaluation.evidence import Lab
from shortlist.metrics import Interval
from shortlist.models.base import RETRIEVAL_TASK, RequestShape, System
from shortlist.registry import find
from shortlist.training.config import TrainerConfig
from shortlist.training.session_parallel import SessionParallelSource
from shortlist.training.sources import BatchSource, NextEventSource
from shortlist.training.trainer import TrainReport, fit

BASELINES = ("popularity", "personal-frequency", "counts", "ease")
LEAVE_LAST_OUT = DataConfig(protocol="leave-last-out-as-published", kcore=5, repeats="no")
PROTOCOL = (
    "Leave-last-out as published: each user's last event is the test, with the validation event in the input; full ranking of the "
    "catalogue, seen items filtered; ties in time cut by file order, which a model of order may use. Epoch chosen on validation NDCG@10, "
    "test once. The *_of_101 columns rank against 100 uniform negatives instead, for contrast only."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class NextItemArm:
    """A system with its settings, and what of the training differs from the claim's other arms."""

    system: str
    """Registered name."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    in_lanes: bool = False
    """Train on session-parallel batches, `batch_size` lanes, a user being one session; else on one sequence per user."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One data set and how long systems are trained on it; the same for every arm."""

    data: str
    """Name of a data set, or "walks" for the planted one."""
    arms: Mapping[str, NextItemArm]
    seeds: tuple[int, ...]
    batch_size: int
    epochs: int
    patience: int
    """Validations without a gain."""
    validate_every: int = 1
    max_history: int = 200
    lr: float = 1e-3
    split: DataConfig = LEAVE_LAST_OUT
    baselines: tuple[str, ...] = BASELINES
    sampled: bool = True
    """Also rank each target among 100 negatives; False where requests have several targets, as baskets do."""


def run_setting(lab: Lab, setting: Setting) -> None:
    """Measure the baselines, then every arm with every seed; finished ones are not repeated."""
    log = walks() if setting.data == "walks" else load(setting.data, lab.data_root)
    dataset = build_dataset(log, setting.split)
    for name in setting.baselines:
        lab.measure(f"{setting.data}: {name}", 0, partial(measured_baseline, name, dataset, setting.sampled))
    for seed in setting.seeds:
        for name in setting.arms:
            lab.measure(f"{setting.data}: {name}", seed, partial(measured_arm, lab, setting, dataset, name, seed))


def measured_baseline(name: str, dataset: Dataset, sampled: bool = True) -> dict[str, float | Interval]:
    """A system without gradient training, on the same events."""
    entry, view = find(name), dataset.view()
    system: System = entry.cls(entry.config(), view.space)
    system.prepare(view)
    return measured(system.eval(), dataset, sampled)


def measured_arm(lab: Lab, setting: Setting, dataset: Dataset, name: str, seed: int) -> dict[str, float | Interval]:
    """One system, trained and judged."""
    system, report = trained_arm(lab, setting, dataset, name, seed)
    return {
        **measured(system, dataset, setting.sampled),
        "cost:epochs": float(report.epochs),
        "cost:best_epoch": float(report.best_epoch or report.epochs),
        "cost:training_seconds": report.seconds,
    }


def trained_arm(lab: Lab, setting: Setting, dataset: Dataset, name: str, seed: int) -> tuple[System, TrainReport]:
    """One system trained on one sequence per user; the epoch is chosen on validation NDCG@10 under full ranking."""
    arm, view = setting.arms[name], dataset.view()
    entry = find(arm.system)
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"max_history": setting.max_history, **arm.settings}
    system: System = entry.cls(entry.config(settings), view.space)
    requests = held_out(dataset, "valid", repeats=dataset.repeats)

    def validate(trained: System) -> float:
        rows = make_pages(pager_of(trained, 10), dataset, requests, repeats=dataset.repeats)
        return float(judge_pages(rows, requests, 10)["ndcg@10"][0].mean())

    chosen = {
        "batch_size": setting.batch_size,
        "lr": setting.lr,
        "optimiser": "adam",
        "clip_norm": None,
        "epochs": setting.epochs,
        "patience": setting.patience,
        "validate_every": setting.validate_every,
        **arm.trainer,
    }
    config = TrainerConfig(seed=seed, **chosen)
    source: BatchSource
    if arm.in_lanes:
        source = SessionParallelSource(view, batch_size=config.batch_size)
    else:
        source = NextEventSource(view, batch_size=config.batch_size, max_history=system.max_history, seed=seed)
    slug = "".join(c if c.isalnum() else "-" for c in f"{setting.data} {name} {seed}")
    folder = None if lab.scratch is None else lab.scratch / slug
    report = fit(
        system, view, lambda phase: source, config=config, validate=validate, folder=folder, progress=not lab.quick
    )
    return system, report


def measured(system: System, dataset: Dataset, sampled: bool = True) -> dict[str, float | Interval]:
    """Both protocols on the test requests, or full ranking alone; called once per trained model."""
    report = evaluate(pager_of(system, 10), dataset, name="", repeats=dataset.repeats)
    flops = system.cost(RequestShape(num_history=200, num_items=dataset.num_items)).flops(dataset.num_items)
    found: dict[str, float | Interval] = {
        "ndcg@10": report.metrics["ndcg@10"],
        "hr@10": report.metrics["hr@10"],
        "coverage": report.metrics["coverage"].mean,
        "cost:flops_per_request": flops,
    }
    if sampled:
        rank_R = ranks_among_100(system, dataset, held_out(dataset, "test", repeats=dataset.repeats))
        hit_R = rank_R < 10
        found["ndcg@10_of_101"] = float((hit_R / np.log2(rank_R + 2)).mean())
        found["hr@10_of_101"] = float(hit_R.mean())
    return found


def ranks_among_100(system: System, dataset: Dataset, requests: Requests) -> NDArray[np.int64]:
    """[R] place of the target, from 0, among itself and 100 uniform items that the user has not met; ties count against it.

    The draw is the same for every system.
    """
    generator = torch.Generator().manual_seed(0)
    sampler = UniformSampler(torch.arange(1, dataset.num_items + 1))
    ranks = []
    for start in range(0, len(requests), CHUNK):
        part = requests.select(np.arange(start, min(start + CHUNK, len(requests))))
        batch = request_batch(dataset.histories, dataset.users, part, max_history=200, exclude_history=True)
        assert batch.excluded is not None
        request_R = torch.arange(len(part))
        target_R = torch.from_numpy(part.target)
        owner = torch.cat([batch.excluded.row_of_value, request_R])
        met = torch.cat([batch.excluded.values, target_R])[owner.argsort(stable=True)]
        forbidden = Jagged.from_lengths(met, batch.excluded.lengths + 1)
        negatives = draw_outside(sampler, forbidden, request_R, 100, generator, rounds=50)
        rows_RC = torch.cat([target_R[:, None], negatives], dim=1)
        candidates = Jagged.from_lengths(rows_RC.flatten(), torch.full((len(part),), rows_RC.shape[1]))
        with torch.inference_mode():
            score = system.score(batch.with_candidates(candidates))[RETRIEVAL_TASK]  # type: ignore[operator]
        score_RC = score.view(rows_RC.shape).masked_fill(rows_RC == 0, -torch.inf)
        ranks.append((score_RC[:, 1:] >= score_RC[:, :1]).sum(1).numpy())
    return np.concatenate(ranks)


def walks(num_items: int = 100, num_users: int = 600, length: int = 12) -> EventLog:
    """A small log whose rule is known, for the quick form: item i is followed by i + 1 with chance 0.7, else by any item."""
    rng = np.random.default_rng(0)
    at = rng.integers(0, num_items, num_users)
    columns = [at]
    for _ in range(length - 1):
        at = np.where(rng.random(num_users) < 0.7, (at + 1) % num_items, rng.integers(0, num_items, num_users))
        columns.append(at)
    frame = {
        "user_id": np.repeat(np.arange(num_users), length),
        "item_id": np.stack(columns, axis=1).reshape(-1),
        "timestamp": 1_600_000_000 + np.tile(np.arange(length) * 3_600, num_users),
    }
    return read(pl.DataFrame(frame))


MASKED_AND_RECURRENT = {
    "BERT4Rec": NextItemArm(
        system="bert4rec",
        settings={"dim": 64, "use_fields": False},
        # A fifth of the positions teach per pass, so it needs more and smaller steps than SASRec; the default of its papers is too few.
        trainer={"batch_size": 64, "epochs": 240, "patience": 10},
    ),
    "GRU4Rec": NextItemArm(system="gru4rec", settings={"dim": 64, "use_fields": False}),
}
"""The arms beside SASRec in the next-item claims."""


def quick(arm: NextItemArm) -> NextItemArm:
    """The same arm, narrow, for the ten-second form."""
    length = ("epochs", "patience", "validate_every", "max_seconds")
    trainer = {name: value for name, value in arm.trainer.items() if name not in length}
    return replace(arm, settings={**arm.settings, "dim": 16}, trainer=trainer)
