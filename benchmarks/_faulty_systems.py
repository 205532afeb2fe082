"""Systems of benchmarks/faults.py: four of the package's own, which break while a file says so; the product knows nothing of it.

The file that the environment variable SHORTLIST_BENCHMARK_FAULT names is {"part": PART, "fault": FAULT}, or is not there; it is read at
every call. Faults: "exception" is raised; "hang" does not come back until the file says otherwise; "nan" are scores that are no numbers.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from shortlist.data.batches import Batch
from shortlist.models.base import Retrieved
from shortlist.models.ranking.mmr import MMR
from shortlist.models.retrieval.counts import Counts
from shortlist.models.retrieval.personal_frequency import PersonalFrequency
from shortlist.models.retrieval.popularity import Popularity
from shortlist.registry import system

T = TypeVar("T", Tensor, Retrieved)
ENVIRONMENT = "SHORTLIST_BENCHMARK_FAULT"
LOOK_S = 0.02
"""Seconds between two looks of a call that hangs."""


def fault_of(part: str) -> str | None:
    """What is wrong with a part now; None = nothing."""
    try:
        told: dict[str, Any] = json.loads(Path(os.environ[ENVIRONMENT]).read_text())
    except (KeyError, FileNotFoundError):
        return None
    return str(told["fault"]) if told["part"] == part else None


def under(part: str, work: Callable[[], T]) -> T:
    """The result of the work as the fault of the part leaves it."""
    fault = fault_of(part)
    if fault == "exception":
        raise RuntimeError("broken on purpose")
    while fault == "hang" and fault_of(part) == "hang":
        time.sleep(LOOK_S)
    found = work()
    if fault != "nan":
        return found
    if isinstance(found, Retrieved):
        return Retrieved(found.rows, torch.full_like(found.scores, torch.nan))
    return torch.full_like(found, torch.nan)


@system("faulty-popularity", stage="retrieval", paper="baseline", cold_users=True)
class FaultyPopularity(Popularity):
    """Retrieval."""

    def score_all(self, batch: Batch) -> Tensor:
        """See Popularity."""
        return under("retrieval", lambda: Popularity.score_all(self, batch))


@system("faulty-frequency", stage="pre-ranking", paper="baseline", needs={"order", "history"}, cold_users=True)
class FaultyFrequency(PersonalFrequency):
    """Pre-ranking."""

    def score_all(self, batch: Batch) -> Tensor:
        """See PersonalFrequency."""
        return under("pre-ranking", lambda: PersonalFrequency.score_all(self, batch))


@system("faulty-counts", stage="ranking", paper="baseline", needs={"order", "history"}, cold_users=True)
class FaultyCounts(Counts):
    """Ranking."""

    def score_all(self, batch: Batch) -> Tensor:
        """See Counts."""
        return under("ranking", lambda: Counts.score_all(self, batch))


@system("faulty-mmr", stage="re-ranking", paper="baseline", needs={"item_fields"}, cold_users=True, cold_items=True)
class FaultyMMR(MMR):
    """Re-ranking."""

    def rerank(self, batch: Batch, scores: Tensor, k: int) -> Retrieved:
        """See MMR."""
        return under("re-ranking", lambda: MMR.rerank(self, batch, scores, k))
