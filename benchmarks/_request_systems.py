"""Systems for benchmarks/request_path.py: vectors from a file, and two that do nothing, so that what is left is the engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shortlist.data.batches import Batch, Candidates
from shortlist.data.jagged import segment_mean
from shortlist.data.schema import Space
from shortlist.models.base import RETRIEVAL_TASK, Cost, Ranker, RequestShape, Retrieved, Retriever, VectorRetriever
from shortlist.registry import system

LATEST = 5


@dataclass(frozen=True, kw_only=True)
class FileConfig:
    """Settings of vectors from a file."""

    path: str
    """A .npy of float32 [n + 1, d]."""


@system("file-vectors", stage="retrieval", paper="baseline", needs={"history"})
class FileVectors(VectorRetriever):
    """Vectors from a file; a user is the mean of the latest items."""

    Config = FileConfig

    def __init__(self, config: FileConfig, space: Space) -> None:
        super().__init__(config, space)
        self.max_history = LATEST
        self.item_Nd = torch.nn.Parameter(torch.from_numpy(np.load(Path(config.path))), requires_grad=False)

    def encode_user(self, batch: Batch) -> Tensor:
        """[B, d]."""
        items = batch.history.items.last(LATEST)
        return segment_mean(self.item_Nd[items.values], items.row_of_value, batch.size)

    def encode_items(self, rows: Tensor) -> Tensor:
        """[n, d]."""
        return self.item_Nd[rows]

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """One product per item."""
        d = self.item_Nd.shape[1]
        return Cost(user_flops=LATEST * d, item_flops=2.0 * d, bytes=4.0 * d * shape.num_items)


@dataclass(frozen=True, kw_only=True)
class NoConfig:
    """No settings."""


@system("first-rows", stage="retrieval", paper="baseline")
class FirstRows(Retriever):
    """The first k rows of the catalogue for everybody."""

    Config = NoConfig

    def retrieve(self, batch: Batch, k: int) -> Retrieved:
        """Rows 1 to k."""
        rows_Bk = torch.arange(1, k + 1).expand(batch.size, -1)
        return Retrieved(rows_Bk, -rows_Bk.float())

    def score(self, batch: Batch) -> dict[str, Tensor]:
        """The row's number, negative."""
        return {RETRIEVAL_TASK: -batch.candidate_rows.values.float()}

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Nothing."""
        return Cost(user_flops=0.0, item_flops=0.0, bytes=0.0)


@system("no-op", stage="ranking", paper="baseline")
class NoOp(Ranker):
    """0 for every candidate."""

    Config = NoConfig

    def user_state(self, batch: Batch) -> None:
        """Nothing."""

    def score_candidates(self, state: None, candidates: Candidates) -> dict[str, Tensor]:
        """Zeros."""
        return {self.space.tasks[0]: torch.zeros(len(candidates.rows.values))}

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """Nothing."""
        return Cost(user_flops=0.0, item_flops=0.0, bytes=0.0)
