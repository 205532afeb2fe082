"""What the claims about several tasks share: census-income as rows with several labels, one training, networks of equal size.

Every row is one request with one candidate, the same for all, and its columns are context. The public copy at hand is the test file of
99,762 people, split 60/20/20 at random; published figures are of the 199,523 others with this file as validation and test, so ours are
not comparable to them row by row.

R rows, T tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

import _ctr as ctr
from _ranking_lab import Examples, World
from shortlist.data.batches import Candidates
from shortlist.embeddings.base import Table
from shortlist.evaluation.evidence import Lab
from shortlist.metrics import auc
from shortlist.models.base import Ranker
from shortlist.registry import find
from shortlist.training.config import TrainerConfig
from shortlist.training.context import deterministic
from shortlist.training.gradients.base import GradientRule, backward
from shortlist.training.optimisers import build_optimisers, clip_gradients
from shortlist.training.sources import CandidateSource
from shortlist.training.trainer import summed

COLLEGE = (
    "Associates degree-academic program",
    "Associates degree-occup /vocational",
    "Bachelors degree(BA AB BS)",
    "Masters degree(MA MS MEng MEd MSW MBA)",
    "Prof school degree (MD DDS DVM LLB JD)",
    "Doctorate degree(PhD EdD)",
)
"""At least college; with these the correlation with never married is -0.238 here, and 0.2373 as published."""
NUMBERS = ("age", "wage", "gains", "losses", "dividends", "weeks")
INCOME, EDUCATION, SINGLE = "income", "education", "never_married"
DATA = (
    "Census-income (KDD): the 99,762 rows of the UCI test file, the only part at hand, split 60/20/20 at random by seed; label columns and "
    "instance weight dropped, values fitted on the training part"
)
DIM = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class People:
    """Rows with several labels."""

    world: World
    """Labels of its examples are the first task's."""
    labels: Mapping[str, Mapping[str, Tensor]]
    """float32 [R] by part, then by task."""

    def batch_source(self, tasks: tuple[str, ...], batch_size: int, seed: int) -> CandidateSource:
        """Training rows, shuffled each epoch."""
        world = self.world
        return CandidateSource(
            world.histories,
            world.users,
            world.train.requests,
            Candidates(rows=world.train.rows),
            {task: self.labels["train"][task] for task in tasks},
            batch_size=batch_size,
            max_history=1,
            only_chosen=False,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """The same for every arm."""

    batch_size: int = 1024
    lr: float = 2e-3
    epochs: int = 20
    """At most; the best one by the first task's AUC on validation stands."""
    patience: int = 3


QUICK = Training(batch_size=256, lr=1e-2, epochs=2)


def people(lab: Lab, tasks: tuple[str, ...], seed: int) -> People:
    """Census rows without the columns that the tasks were made of; a planted table in the quick form."""
    rows = planted(seed) if lab.quick else census(lab.data_root)
    named = {INCOME: "c41", EDUCATION: "c4", SINGLE: "c7"}
    labels = {task: rows[task].cast(pl.Float32).to_numpy().copy() for task in tasks}
    kept = rows.drop([INCOME, EDUCATION, SINGLE, *(named[t] for t in tasks if named[t] in rows.columns)], strict=False)
    part = np.digitize(np.random.default_rng([seed, 7]).random(len(rows)), [0.6, 0.8])
    kept = kept.with_columns(label=rows[tasks[0]])
    frames = {name: kept.filter(pl.Series(part == number)) for number, name in enumerate(ctr.PARTS)}
    numbers = tuple(c for c in NUMBERS if c in kept.columns)
    table = ctr.Table(**frames, user=None, item=None, numeric=numbers, min_count=5)
    by_part = {
        name: {task: torch.from_numpy(values[part == number]) for task, values in labels.items()}
        for number, name in enumerate(ctr.PARTS)
    }
    return People(world=ctr.world_of(table), labels=by_part)


def census(root: Path) -> pl.DataFrame:
    """The file's 42 columns as c0 .. c41 without the instance weight, six of them numbers under their own names, and the three labels."""
    rows = pl.read_parquet(root / "tabular" / "census_income_kdd_test_99762.parquet")
    rows = rows.rename({f"column_{i}": f"c{i}" for i in range(42)}).with_columns(pl.all().str.strip_chars())
    rows = rows.with_columns(
        pl.col("c41").eq("50000+.").alias(INCOME),
        pl.col("c4").is_in(COLLEGE).alias(EDUCATION),
        pl.col("c7").eq("Never married").alias(SINGLE),
    )
    names = dict(zip(("c0", "c5", "c16", "c17", "c18", "c39"), NUMBERS))
    rows = rows.with_columns(
        pl.col(code).cast(pl.Float32) if code in ("c0", "c39") else pl.col(code).cast(pl.Float32).log1p()
        for code in names
    )
    return rows.drop("c24", "c41").rename(names)


def planted(seed: int, num_rows: int = 3_000) -> pl.DataFrame:
    """A table of the same kind, of which the labels are noisy sums of hidden values of its columns; for quick forms."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 6, (num_rows, 8))
    weight = rng.normal(size=(3, 8, 6))
    sums = np.stack([weight[t, np.arange(8), codes].sum(1) + rng.normal(size=num_rows) for t in range(3)])
    columns = {f"x{i}": codes[:, i] for i in range(8)}
    labels = dict(zip((INCOME, EDUCATION, SINGLE), sums > 0))
    return pl.DataFrame({**columns, "age": rng.normal(size=num_rows).astype(np.float32), **labels})


# -- networks of equal size ----------------------------------------------------------------------------------------


def built(name: str, settings: Mapping[str, Any], data: People, tasks: tuple[str, ...], seed: int = 0) -> Ranker:
    """A registered multi-task ranker over the rows' columns."""
    torch.manual_seed(seed)
    entry = find(name)
    inputs = input_settings(DIM)
    system = entry.cls(
        entry.config({"dropout": 0.0, "input": inputs, **settings}), replace(data.world.space, tasks=tasks)
    )
    assert isinstance(system, Ranker)
    return system


def input_settings(dim: int) -> Any:
    """Settings of the input: no history is read, and the one candidate has no id of its own."""
    from shortlist.layers.experts import InputConfig

    return InputConfig(dim=dim, max_history=1, use_ids=False, id_dropout=0.0)


def size_of(system: nn.Module) -> int:
    """Parameters that are in no table and map no field."""
    left_out = {
        id(p) for m in system.modules() if isinstance(m, Table | nn.Embedding | nn.EmbeddingBag) for p in m.parameters()
    }
    return sum(p.numel() for p in system.parameters() if id(p) not in left_out)


def width_for(size: int, make: Callable[[int], Ranker]) -> int:
    """The width whose network is nearest to a size; sizes rise with the width."""
    low, high = 1, 2
    while size_of(make(high)) < size:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size_of(make(middle)) < size else (low, middle)
    return min((low, high), key=lambda width: abs(size_of(make(width)) - size))


# -- training -----------------------------------------------------------------------------------------------------


def learned(
    system: Ranker,
    data: People,
    tasks: tuple[str, ...],
    training: Training,
    seed: int,
    rule: GradientRule | None = None,
) -> dict[str, float]:
    """Train and judge: AUC of every task on the test part, at the epoch with the best first task on validation."""
    torch.manual_seed(seed)
    source = data.batch_source(tasks, training.batch_size, seed)
    optimisers = build_optimisers(system, TrainerConfig(lr=training.lr, optimiser="adam"))
    shared = system.shared_parameters()
    best, misses, best_epoch = {"valid": -np.inf}, 0, 0
    with deterministic(True):
        for epoch in range(training.epochs):
            system.train()
            for batch in source.batches(epoch):
                system.zero_grad(set_to_none=True)
                losses = system.losses(batch)
                if rule is None:
                    summed(losses).backward()
                else:
                    backward(rule, losses, shared)
                clip_gradients(system.parameters(), 5.0)
                for optimiser in optimisers:
                    optimiser.step()
            valid = judged(system, data, data.world.valid, "valid", tasks[:1])[tasks[0]]
            misses += 1
            if valid > best["valid"]:
                best = {"valid": valid, **judged(system, data, data.world.test, "test", tasks)}
                misses, best_epoch = 0, epoch + 1
            if misses >= training.patience:
                break
    told = {f"auc:{task}": best[task] for task in tasks}
    return {**told, "cost:best_epoch": float(best_epoch), "cost:parameters": float(size_of(system))}


@torch.no_grad()
def judged(system: Ranker, data: People, examples: Examples, part: str, tasks: tuple[str, ...]) -> dict[str, float]:
    """AUC of some tasks on a part."""
    system.eval()
    scores: dict[str, list[Tensor]] = {task: [] for task in tasks}
    for index in np.array_split(np.arange(len(examples.requests)), -(-len(examples.requests) // 8192)):
        found = system.score(examples.batch(data.world, index, 1))
        for task in tasks:
            scores[task].append(found[task])
    return {task: auc(data.labels[part][task], torch.cat(scores[task])) for task in tasks}
