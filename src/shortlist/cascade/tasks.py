"""Several tasks per candidate: which label each has for whom, what orders the page, and how well each is told.

    learning.candidates = "cascade"     tasks are actions: a candidate's label is 1 where its user did that with the item in the request's
                                        group, or up to `task_hours` later and before the window ends
    learning.candidates = "logged"      tasks are label columns of what the log's own pages showed: 1 above 0

A ranker of several tasks is trained to the epoch with the best mean AUC of its tasks on the validation window.

R requests, total = all candidates of all requests end to end, N events, T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from shortlist.cascade.config import Learning, RunConfig, Surface
from shortlist.data.dataset import Dataset
from shortlist.data.histories import Int, Requests, ranges
from shortlist.data.jagged import Jagged
from shortlist.data.splits import WINDOW_NUMBER, Window
from shortlist.errors import ConfigError, DataError
from shortlist.metrics.classification import auc, gauc
from shortlist.models.base import Scores

HOUR_S = 3_600
DELAY = "seconds to the outcome"
"""Name of the column that stands beside the labels where a feedback rule learns a task: float32 [total] seconds from the request to the
outcome as far as the log knows it, NaN where there is none (exact up to half a year)."""


def check_tasks(config: RunConfig, dataset: Dataset) -> None:
    """ConfigError where the log does not say of every task what came of it."""
    learning = config.learning
    logged = learning.candidates == "logged"
    columns = () if dataset.logged is None else tuple(dataset.logged.labels)
    known = columns if logged else dataset.space.actions
    for task in learning.tasks:
        if task not in known:
            what = "label columns of the log" if logged else "actions of the log before the fit window"
            other = (
                'an action, with learning.candidates = "cascade"'
                if logged
                else ('a label column, with learning.candidates = "logged"')
            )
            raise ConfigError(
                f"task {task!r} is none of the {what}: {', '.join(known) or 'there is none'}; choose from these, or name {other}"
            )
    if not learning.late_task:
        return
    if dataset.split.protocol != "time" or not dataset.space.has_clock:
        raise ConfigError(
            "learning.feedback needs to know what had come by when: a log with moments, split by time (data.protocol); leave it out here"
        )
    if logged and learning.feedback.delay not in columns:
        raise ConfigError(
            f"learning.feedback.delay {learning.feedback.delay!r} is no label column of the log: {', '.join(columns) or 'there is none'}"
        )


def page_scores(scores: Scores, tasks: Sequence[str], surface: Surface | None) -> Tensor:
    """float32 [total]: what a ranker's scores by task make of a candidate; without weights the first task alone.

    sum: sum_k w_k p_k, what the page is worth where w_k is what action k is worth. product: sum_k w_k log p_k, which orders as the product
    of the p_k^w_k does. p_k is the sigmoid of task k's score.
    """
    weights = surface.task_weights if surface is not None else {}
    if not weights or surface is None:
        return scores[tasks[0]]
    chance = torch.sigmoid if surface.combine == "sum" else logsigmoid
    return torch.stack([weight * chance(scores[task]) for task, weight in weights.items()]).sum(0)


class ActionLabels:
    """Labels by task from what users did; made once for a window.

    Args:
        late: also tell when that task's outcome came (`DELAY`); empty = of none.
    """

    def __init__(self, dataset: Dataset, learning: Learning, window: Window, late: str = "") -> None:
        self.learning, self.histories, self.late = learning, dataset.histories, late
        self.open = dataset.plan.window_of_event <= WINDOW_NUMBER[window]
        self.action_ids = dataset.action_ids(learning.tasks)
        # Without a clock times are places in the user's order, and only the request's own group counts.
        self.reach_s = round(learning.task_hours * HOUR_S) if dataset.space.has_clock else 0
        time = np.asarray(self.histories.time)
        self.first_time = int(time.min(initial=0))
        self.span = int(time.max(initial=0)) - self.first_time + self.reach_s + 2
        self.moment = self.histories.user_of_event * self.span + (time - self.first_time)
        """[N] rises along the histories, so that a user's events up to a time are found by bisection."""

    def __call__(self, requests: Requests, rows: Jagged) -> dict[str, Tensor]:
        """float32 [total] by task."""
        until = requests.user * self.span + np.minimum(requests.time - self.first_time + self.reach_s, self.span - 1)
        stop = np.searchsorted(self.moment, until, side="right")
        event, lengths = ranges(requests.end, np.maximum(stop, requests.end))
        owner = np.repeat(np.arange(len(requests)), lengths)[self.open[event]]
        event = event[self.open[event]]
        width = int(max(self.histories.item.max(initial=0), _most(rows))) + 1
        asked = rows.row_of_value.numpy() * width + rows.values.numpy()
        done = owner * width + self.histories.item[event]
        action = self.histories.action[event]
        waited = self.histories.time[event] - requests.time[owner]
        # What a feedback rule's task waits for must be known when its observation window closes.
        late, soon = self.learning.late_task, waited <= self.learning.feedback.observation_hours * HOUR_S
        labels = {
            task: torch.from_numpy(
                np.isin(asked, done[(action == number) & (soon | (late in ("", task)))]).astype(np.float32)
            )
            for task, number in zip(self.learning.tasks, self.action_ids)
        }
        told = chained(labels) if self.learning.chained else labels
        if self.late:
            is_late = action == self.action_ids[self.learning.tasks.index(self.late)]
            told = {**told, DELAY: _first(asked, done[is_late], waited[is_late])}
        return told


class ShownLabels:
    """Labels by task from the label columns of logged impressions; `late` as in ActionLabels."""

    def __init__(self, learning: Learning, shown: Jagged, columns: Mapping[str, Tensor], late: str = "") -> None:
        self.learning, self.shown, self.columns, self.late = learning, shown, columns, late

    def __call__(self, index: Int, rows: Jagged) -> dict[str, Tensor]:
        """float32 [total] by task for candidates of the impressions `index`, each of which was shown."""
        chosen = torch.from_numpy(index)
        shown, where = self.shown.select(chosen), self.shown.value_index(chosen)
        width = max(_most(shown), _most(rows)) + 1
        key = shown.row_of_value * width + shown.values
        order = key.argsort()
        place = torch.searchsorted(key[order], rows.row_of_value * width + rows.values).clamp(max=max(len(key) - 1, 0))
        labels = {task: (self.columns[task][where][order][place] > 0).float() for task in self.learning.tasks}
        told = chained(labels) if self.learning.chained else labels
        if self.late:
            waited = self.columns[self.learning.feedback.delay][where][order][place] * HOUR_S
            told = {**told, DELAY: waited.float().masked_fill(labels[self.late] == 0, torch.nan)}
        return told


def _first(asked: Int, done: Int, waited: Int) -> Tensor:
    """float32 [total]: the shortest time after which each asked key was done; NaN where it never was."""
    order = np.lexsort((waited, done))
    keys, first = np.unique(done[order], return_index=True)
    if not len(keys):
        return torch.full((len(asked),), torch.nan)
    place = np.searchsorted(keys, asked).clip(max=len(keys) - 1)
    shortest = waited[order][first][place]
    return torch.from_numpy(np.where(keys[place] == asked, shortest, np.nan).astype(np.float32))


def chained(labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each task's label [total] is known (no NaN) only where that of the task before it is 1."""
    known: dict[str, Tensor] = {}
    before: Tensor | None = None
    for task, label in labels.items():
        known[task] = label if before is None else label.masked_fill(before != 1, torch.nan)
        before = known[task]
    return known


def task_quality(scores: Mapping[str, Tensor], labels: Mapping[str, Tensor], user: Int) -> dict[str, dict[str, float]]:
    """By task: known candidates, positives, and, where both classes are there, auc and gauc (users weighed by their candidates).

    Args:
        scores, labels: [total] by task; NaN labels are left out.
        user: [total] whose candidate it is.
    """
    told: dict[str, dict[str, float]] = {}
    for task, label in labels.items():
        known = (~label.isnan()).numpy()
        true, score = label.numpy()[known], scores[task].numpy()[known]
        told[task] = {"candidates": float(len(true)), "positives": float(true.sum())}
        for name, measure in (("auc", lambda t, s: auc(t, s)), ("gauc", lambda t, s, u=user[known]: gauc(t, s, u))):
            try:
                told[task][name] = measure(true, score)
            except DataError:  # one class alone: nothing to tell apart
                continue
    return told


def mean_auc(quality: Mapping[str, Mapping[str, float]]) -> float | None:
    """Mean AUC of the tasks that have both outcomes, each counting alike; None where no task has both."""
    found = [told["auc"] for told in quality.values() if "auc" in told]
    return sum(found) / len(found) if found else None


def in_words(quality: Mapping[str, Mapping[str, float]]) -> str:
    """One clause per task."""
    parts = []
    for task, told in quality.items():
        figures = ", ".join(f"{name} {told[name]:.4f}" for name in ("auc", "gauc") if name in told)
        parts.append(
            f"{task} {figures or 'has one class only'} ({told['positives']:,.0f} of {told['candidates']:,.0f})"
        )
    return "; ".join(parts)


def _most(rows: Jagged) -> int:
    return int(rows.values.max()) if len(rows.values) else 0
