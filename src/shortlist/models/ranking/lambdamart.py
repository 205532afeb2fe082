"""LambdaMART: boosted trees whose gradients are pairwise and weighed by what a swap would change in NDCG (Burges, "From RankNet to
LambdaRank to LambdaMART", Microsoft Research TR-2010-82). The trees are grown by LightGBM.

It reads what the neural rankers read, as plain columns: pair fields, item, user and context fields. Ids of items and users are left out,
a sequence field (such as title words) is its length and its first code, and vectors are their components. A request of one candidate has
nothing to swap: where all are such, as in tabular logs, the trees learn a logistic loss.

It learns in one pass over the candidates in place of gradient steps (`Phase.learn`); the share of requests that comes last says when
to stop. The trees are kept as bytes of LightGBM's own text form. The library is needed to learn and to score.

B requests, t candidates end to end, N = n + 1 catalogue rows, U columns of a request, I of an item, P of a pair, F = P + U + I, T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shortlist.data.batches import Batch, Candidates
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Categorical, Column, Field, Image, Space, Text
from shortlist.data.schema import Sequence as SequenceField
from shortlist.errors import ConfigError, DataError
from shortlist.extras import library
from shortlist.models.base import Cost, Losses, Phase, Ranker, RequestShape, Scores
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class LambdaMARTConfig:
    """Settings of LambdaMART."""

    num_trees: int = 600
    """At most, per task."""
    num_leaves: int = 7
    """Leaves of a tree at most."""
    lr: float = 0.03
    """Share of each tree that is added."""
    min_leaf: int = 50
    """Candidates in a leaf at least."""
    l2: float = 1.0
    """Penalty on the square of leaf values."""
    truncation: int = 30
    """Swaps count where one of the two stands among so many best."""
    valid_share: float = 0.15
    """Share of the requests, the last ones handed over, that only say when to stop; 0 = grow all trees."""
    patience: int = 30
    """Trees without a better NDCG@10 on these requests before growing stops; the best number of trees is kept."""
    max_history: int = 1
    """Newest events asked for; it reads the history through pair fields alone, which are made before."""
    seed: int = 0
    """Of the library; nothing is drawn with these settings."""

    def __post_init__(self) -> None:
        for name, least in (("num_trees", 1), ("num_leaves", 2), ("min_leaf", 1), ("truncation", 1), ("patience", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"lambdamart: {name} must be at least {least}, got {getattr(self, name)}")
        if self.lr <= 0 or self.l2 < 0 or not 0 <= self.valid_share < 1:
            raise ConfigError(
                "lambdamart: lr must be above 0, l2 not negative and valid_share from 0 to below 1, "
                f"got {self.lr}, {self.l2} and {self.valid_share}"
            )


class Lesson(NamedTuple):
    """Requests with labelled candidates, as the library wants them."""

    x: NDArray[np.float32]
    """[t, F]."""
    label: NDArray[np.int32]
    """[t]: 1 where the candidate was chosen."""
    weight: NDArray[np.float32]
    """[t]."""
    lengths: NDArray[np.int64]
    """[B] candidates per request, 1 or more."""

    def split(self, num_requests: int) -> tuple[Lesson, Lesson]:
        """The first requests, and the rest."""
        at = int(self.lengths[:num_requests].sum())
        first = Lesson(self.x[:at], self.label[:at], self.weight[:at], self.lengths[:num_requests])
        return first, Lesson(self.x[at:], self.label[at:], self.weight[at:], self.lengths[num_requests:])


@system(
    "lambdamart",
    stage="ranking",
    paper="Burges, MSR-TR-2010-82",
    cold_users=True,
    cold_items=True,
    tiny={"num_trees": 30, "num_leaves": 7, "lr": 0.2, "min_leaf": 5},
)
class LambdaMART(Ranker):
    """Boosted trees over pair, item, user and context fields."""

    Config = LambdaMARTConfig
    config: LambdaMARTConfig
    item_NI: Tensor
    comparisons_T: Tensor

    def __init__(self, config: LambdaMARTConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = config.max_history
        self.register_buffer(
            "item_NI", columns_of(space.items.fields, space.items.columns, space.num_items + 1), persistent=False
        )
        self.buffer("comparisons_T", torch.zeros(len(space.tasks)))
        for number in range(len(space.tasks)):
            self.buffer(f"trees_{number}", torch.zeros(0, dtype=torch.uint8))
        self._grown: list[Any] | None = None

    def phases(self) -> tuple[Phase, ...]:
        """One pass over the candidates."""
        return (Phase(name="trees", feed="candidates", losses=self.losses, learn=self.learn),)

    def train(self, mode: bool = True) -> LambdaMART:
        """As nn.Module; the library's form of the trees is dropped, since they may change."""
        self._grown = None
        super().train(mode)
        return self

    # --- learning ---

    def learn(self, batches: Iterable[Batch]) -> Losses:
        """Grow the trees of every task. What is returned is 1 - NDCG@10, or the logistic loss, of the requests held out."""
        lightgbm = library("lightgbm", extra="baselines", user="lambdamart")
        taken = [(batch, self._table(self.user_state(batch), batch.candidates)) for batch in batches]
        left = {}
        for number, task in enumerate(self.space.tasks):
            lesson = lesson_of(taken, task)
            booster, left[task] = self._grow(lightgbm, lesson)
            text = booster.model_to_string(num_iteration=max(booster.best_iteration, 0) or None)
            self.buffer(f"trees_{number}", torch.from_numpy(np.frombuffer(text.encode(), np.uint8).copy()))
            self.comparisons_T[number] = mean_comparisons(text)
        self._grown = None
        return {task: torch.tensor(value) for task, value in left.items()}

    def _grow(self, lightgbm: Any, lesson: Lesson) -> tuple[Any, float]:
        """The library's trees, and the loss of the requests held out (of all, where none are)."""
        config = self.config
        ranks = int(lesson.lengths.max()) > 1
        metric = "ndcg" if ranks else "binary_logloss"
        settings = {
            "objective": "lambdarank" if ranks else "binary",
            "metric": metric,
            "eval_at": [10],
            "lambdarank_truncation_level": config.truncation,
            "num_leaves": config.num_leaves,
            "learning_rate": config.lr,
            "min_data_in_leaf": config.min_leaf,
            "lambda_l2": config.l2,
            "seed": config.seed,
            "deterministic": True,
            "force_row_wise": True,
            "num_threads": torch.get_num_threads(),
            "verbosity": -1,
        }
        learned, held = lesson.split(len(lesson.lengths) - int(config.valid_share * len(lesson.lengths)))
        if not (held.label.any() and learned.label.any()):
            learned, held = lesson, lesson
        seen: dict[str, dict[str, list[float]]] = {}
        callbacks = [lightgbm.record_evaluation(seen)]
        if held is not lesson:
            callbacks.append(lightgbm.early_stopping(config.patience, verbose=False))
        data = self._dataset(lightgbm, learned, ranks)
        booster = lightgbm.train(
            settings,
            data,
            num_boost_round=config.num_trees,
            valid_sets=[data if held is lesson else self._dataset(lightgbm, held, ranks, like=data)],
            valid_names=["held"],
            callbacks=callbacks,
        )
        (curve,) = seen["held"].values()
        best = curve[(max(booster.best_iteration, 0) or len(curve)) - 1]
        return booster, 1 - best if ranks else best

    def _dataset(self, lightgbm: Any, lesson: Lesson, ranks: bool, like: Any = None) -> Any:
        return lightgbm.Dataset(
            lesson.x,
            label=lesson.label,
            weight=lesson.weight,
            group=lesson.lengths if ranks else None,
            categorical_feature=self._categorical(),
            reference=like,
        )

    def _categorical(self) -> list[int]:
        """Which of the F columns are codes."""
        flags = [False] * len(self.space.pair_fields)
        for fields in (self.space.user_fields, self.space.context_fields, self.space.items.fields):
            flags += [code for f in fields for code in codes(f)]
        return [number for number, code in enumerate(flags) if code]

    # --- scoring ---

    def user_state(self, batch: Batch) -> Tensor:
        """float32 [B, U]: user and context columns."""
        space = self.space
        parts = [
            columns_of(space.user_fields, batch.user_fields, batch.size),
            columns_of(space.context_fields, batch.context, batch.size),
        ]
        return torch.cat([part.to(self.item_NI.device) for part in parts], dim=1)

    def score_candidates(self, state: Tensor, candidates: Candidates) -> Scores:
        """Sums of leaf values [t] per task, one call of the library each; 0 before anything is learned."""
        tasks, total = self.space.tasks, len(candidates.rows.values)
        trees = [getattr(self, f"trees_{number}") for number in range(len(tasks))]
        if not total or not all(len(text) for text in trees):
            return {task: state.new_zeros(total) for task in tasks}
        if self._grown is None:
            lightgbm = library("lightgbm", extra="baselines", user="lambdamart")
            self._grown = [lightgbm.Booster(model_str=text.cpu().numpy().tobytes().decode()) for text in trees]
        x = self._table(state, candidates)
        threads = torch.get_num_threads()
        scores = [booster.predict(x, raw_score=True, num_threads=threads) for booster in self._grown]
        return {task: torch.from_numpy(score.astype(np.float32)).to(state.device) for task, score in zip(tasks, scores)}

    def _table(self, user_BU: Tensor, candidates: Candidates | None) -> NDArray[np.float32]:
        """[t, F]: pair, user, context and item columns."""
        if candidates is None:
            raise ValueError("this batch has no candidates to learn from; build it with candidates=...")
        rows, names = candidates.rows, [f.name for f in self.space.pair_fields]
        missing = [name for name in names if name not in candidates.pair]
        if missing:
            raise DataError(f"the candidates lack pair fields {missing}, which lambdamart was built to read")
        pairs = [candidates.pair[name][:, None].float() for name in names]
        columns = torch.cat([*pairs, user_BU[rows.row_of_value], self.item_NI[rows.values]], dim=1)
        return columns.cpu().numpy()

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Comparisons from root to leaf, mean over what was learned from, one FLOP each; trees x log2(leaves) before learning.

        A comparison is a jump in memory rather than arithmetic: a tree's FLOP takes many times as long as a matrix product's.
        """
        planned = len(self.space.tasks) * self.config.num_trees * math.log2(self.config.num_leaves)
        width = len(self.space.pair_fields) + self.item_NI.shape[1]
        text = sum(len(getattr(self, f"trees_{number}")) for number in range(len(self.space.tasks)))
        return Cost(
            item_flops=float(self.comparisons_T.sum()) or planned, bytes=text + 4.0 * width * shape.num_candidates
        )


def lesson_of(taken: Sequence[tuple[Batch, NDArray[np.float32]]], task: str) -> Lesson:
    """All batches end to end, without candidates whose label is not known (NaN); DataError without labels, or with none above 0."""
    rows, labels, weights, lengths = [], [], [], []
    for batch, x in taken:
        if task not in batch.labels:
            raise DataError(
                f"the batch has no labels for {[task]}; label every task of the space or drop it from the tasks"
            )
        label = batch.labels[task]
        known, candidates = ~label.isnan(), batch.candidate_rows
        rows.append(x[known.cpu().numpy()])
        labels.append(label[known].gt(0).cpu().numpy())
        weights.append((torch.ones_like(label) if batch.weight is None else batch.weight)[known].cpu().numpy())
        number = candidates.row_of_value[known]
        lengths.append(torch.bincount(number, minlength=candidates.num_rows).cpu().numpy())
    length = np.concatenate(lengths)
    lesson = Lesson(
        x=np.concatenate(rows),
        label=np.concatenate(labels).astype(np.int32),
        weight=np.concatenate(weights).astype(np.float32),
        lengths=length[length > 0],
    )
    if not lesson.label.any():
        raise DataError(f"lambdamart: no candidate has a label of task {task!r} above 0, so there is nothing to learn")
    return lesson


def codes(f: Field) -> list[bool]:
    """One entry per column that a field becomes, True where the column is a code; [] for fields that are not read."""
    match f:
        case Text() | Image():
            return []
        case Categorical():
            return [True]
        case SequenceField():
            return [False, True]
    return [False] * getattr(f, "dim", 1)


def columns_of(fields: Sequence[Field], columns: Mapping[str, Column], num_rows: int) -> Tensor:
    """float32 [num_rows, sum of len(codes(f))]: fields as plain columns; code 0 = unknown, or nothing in the sequence."""
    parts: list[Tensor] = []
    for f in fields:
        if not codes(f):
            continue
        column = columns[f.name]
        if isinstance(column, Jagged):
            first = torch.zeros_like(column.lengths)
            filled = column.lengths > 0
            first[filled] = column.values[column.offsets[:-1][filled]]
            column = torch.stack([column.lengths, first], dim=1)
        parts.append(column.float().view(num_rows, -1))
    return torch.cat(parts, dim=1) if parts else torch.zeros(num_rows, 0)


def mean_comparisons(text: str) -> float:
    """Comparisons per candidate, mean over the rows that the trees were grown on, from LightGBM's text form.

    A row is compared at every inner node that it passes, so per tree it is the sum of the inner nodes' rows by those of the root.
    """
    counts = [line.partition("=")[2].split() for line in text.splitlines() if line.startswith("internal_count=")]
    return sum(sum(map(int, rows)) / int(rows[0]) for rows in counts if rows)
