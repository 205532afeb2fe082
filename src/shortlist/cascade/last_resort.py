"""The page of a request that the cascade could not answer: the most popular items that its rules permit."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from shortlist.cascade.candidates import Blocked, first_permitted
from shortlist.cascade.cascade import Page, StageTrace
from shortlist.cascade.knowing import Known
from shortlist.cascade.live import Live
from shortlist.cascade.questions import Asked
from shortlist.data.jagged import Jagged

LAST_RESORT = "popular"
"""Name of the chain, and of its only stage."""


def popular_page(live: Live, asked: Asked, known: Known, allowed: Tensor | None) -> Page:
    """What is left when the cascade fails as a whole: the most popular items that the rules permit."""
    began = time.perf_counter()
    popular, num_requests = live.cascade.popular.cpu(), len(asked.users)
    if asked.candidates is not None:
        popular = popular[torch.isin(popular, torch.from_numpy(asked.candidates))]
    if asked.query is not None:
        popular = popular[:0]  # what most people want is no answer to words
    if allowed is not None:
        popular = popular[allowed[popular]]
    excluded = None if known.batch is None else known.batch.excluded
    most = asked.k + (0 if excluded is None else int(excluded.lengths.max()))
    rows_Bk = first_permitted(
        popular[:most].expand(num_requests, -1), Blocked(live.dataset.num_items, excluded, allowed), asked.k
    )
    shown = Jagged.from_padded(rows_Bk, rows_Bk > 0)
    trace = StageTrace(
        name=LAST_RESORT,
        systems=(),
        rows=shown,
        scores=torch.zeros(len(shown.values)),
        system_scores={},
        num_received=torch.full((num_requests,), len(popular)),
        spent_ms=(time.perf_counter() - began) * 1e3,
        flops=0.0,
    )
    return Page(rows=rows_Bk, scores=torch.full(rows_Bk.shape, -torch.inf), traces=(trace,), chain=LAST_RESORT)
