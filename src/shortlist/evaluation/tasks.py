"""How well a run's rankers tell the outcomes of each task apart, on the requests of a window."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from shortlist.cascade.lessons import collect, sample, sample_shown, task_score
from shortlist.cascade.run import Run, as_of
from shortlist.cascade.tasks import ActionLabels, ShownLabels
from shortlist.data.histories import Int
from shortlist.data.jagged import Jagged
from shortlist.models.base import Ranker

Quality = dict[str, dict[str, dict[str, float]]]
"""By system, then by task: candidates, positives, auc, gauc; see `task_quality`."""


def evaluate_tasks(
    run: Run, window: Literal["fit", "valid", "test"] = "test", *, max_requests: int | None = None, seed: int = 0
) -> Quality:
    """Every ranker on what reaches its stage: candidates that the stages before let through, labelled by what their users then did; or,
    where the run learns from logged pages, what the window's pages showed. Nothing for a run without tasks.

    Args:
        max_requests: a seeded sample of at most so many; None = all.

    Raises DataError where logged pages are wanted and the window has none.
    """
    learning, dataset = run.config.learning, run.dataset
    if not learning.tasks:
        return {}
    cascade, shown = as_of(run, window), None
    labels: Callable[[Int, Jagged], dict[str, Tensor]]
    if learning.candidates == "logged":
        most = max_requests or len(dataset.impressions(window)[0])
        requests, shown, columns = sample_shown(dataset, most, seed, window)
        labels = ShownLabels(learning, shown, columns)
    else:
        everyone = getattr(dataset.split, window)
        requests = sample(everyone, max_requests or len(everyone), seed)
        by_action = ActionLabels(dataset, learning, window)

        def labels(index: Int, rows: Jagged) -> dict[str, Tensor]:
            return by_action(requests.select(index), rows)

    found: Quality = {}
    with torch.no_grad():
        for stage in run.config.stages[1:]:
            rankers = {n: s for n in stage.systems if isinstance(s := cascade.systems[n], Ranker)}
            if set(rankers) <= set(found):
                continue
            lessons = collect(cascade, dataset, requests, stage.name, shown=shown, labels=labels)
            found |= {n: task_score(s, dataset, lessons) for n, s in rankers.items() if n not in found}
    return found


def task_rows(quality: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[list[str]]:
    """A table with a head, one line per system and task."""
    rows = [["system", "task", "candidates", "positives", "auc", "gauc"]]
    for system, by_task in quality.items():
        for task, told in by_task.items():
            counts = [f"{told[name]:,.0f}" for name in ("candidates", "positives")]
            rows.append([system, task, *counts, *(f"{told[n]:.4f}" if n in told else "" for n in ("auc", "gauc"))])
    return rows
