"""Which stage lost a held-out item: the last one that still had it is followed by the one that let it fall."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from shortlist.cascade.candidates import contained
from shortlist.cascade.cascade import Page
from shortlist.data.batches import target_candidates
from shortlist.data.histories import Int, Requests
from shortlist.data.jagged import Jagged

SHOWN = "shown"


def lost_at(page: Page, requests: Requests) -> Int:
    """For every target of the batch's requests, the number of the stage that dropped it; the number of stages where it was shown.

    Args:
        page: answers to the requests, with traces.
        requests: the same B requests, with their T targets.

    Returns:
        int64 [T]. A target that a later stage does not have was lost there, whatever was filled in afterwards; one that reached
        the last stage but stands beyond the page was lost in the last stage.
    """
    targets = target_candidates(requests)
    shown = page.rows.cpu()
    lists = [Jagged(trace.rows.values.cpu(), trace.rows.offsets.cpu()) for trace in page.traces]
    lists[-1] = Jagged.from_padded(shown, shown > 0)
    alive = torch.ones(len(targets.values), dtype=torch.bool)
    stage = torch.full((len(targets.values),), len(lists), dtype=torch.int64)
    for number, rows in enumerate(lists):
        here = contained(targets, rows)
        stage[alive & ~here] = number
        alive &= here
    result: Int = stage.numpy()
    return result


def attribute_losses(stages: Sequence[str], lost: Sequence[Int]) -> dict[str, float]:
    """Share of all held-out items dropped at each stage, and `shown`: the shares add up to 1.

    Args:
        stages: names in the order in which they act.
        lost: what `lost_at` gave, batch by batch.
    """
    every = np.concatenate([np.zeros(0, dtype=np.int64), *lost])
    counts = np.bincount(every, minlength=len(stages) + 1)
    return {name: float(count) / max(len(every), 1) for name, count in zip([*stages, SHOWN], counts)}
