"""A world in which only pairs of fields tell, for tests of interaction rankers."""

from __future__ import annotations

import torch

from ranking_support import batch_of, space_of
from shortlist.data.batches import Batch
from shortlist.data.schema import Categorical, Space
from shortlist.models.base import Ranker, RequestShape

KINDS, ITEMS, OFFERED = 5, 20, 4
MATCH = torch.tensor([2, 0, 3, 1, 4])
"""Items of kind i are wanted in contexts of kind MATCH[i]."""


def pairs_space() -> Space:
    """Twenty items of which no field tells, a context of five kinds, and a context that says nothing."""
    return space_of(ITEMS, context_fields=(Categorical(name="kind", size=KINDS), Categorical(name="noise", size=7)))


def pairs_batch(size: int, draw: torch.Generator) -> Batch:
    """Four items of four kinds; the one whose kind matches the context is chosen. Neither item nor context alone says anything."""
    kinds = torch.rand(size, KINDS, generator=draw).argsort(1)[:, :OFFERED]
    rows = kinds + KINDS * torch.randint(ITEMS // KINDS, kinds.shape, generator=draw) + 1
    wanted = kinds[:, 0]
    order = torch.rand(size, OFFERED, generator=draw).argsort(1)
    label = (kinds == wanted[:, None]).float().gather(1, order)
    context = {"kind": MATCH[wanted] + 1, "noise": torch.randint(1, 8, (size,), generator=draw)}
    return batch_of([[]] * size, rows.gather(1, order).tolist(), context=context, labels={"target": label.flatten()})


@torch.no_grad()
def flops_counted(model: Ranker, num_history: int, num_candidates: int) -> tuple[float, float]:
    """FLOPs of the user side and of all candidates, by torch's own counter, for one request in `rich_space`."""
    from torch.utils.flop_counter import FlopCounterMode

    from ranking_support import rich_batch

    batch = rich_batch([[1 + i % 12 for i in range(num_history)]], [[1 + i % 12 for i in range(num_candidates)]])
    with FlopCounterMode(display=False) as user:
        state = model.user_state(batch)
    with FlopCounterMode(display=False) as item:
        model.score_candidates(state, batch.candidates)
    return user.get_total_flops(), item.get_total_flops()


def flops_stated(model: Ranker, num_history: int, num_candidates: int) -> tuple[float, float]:
    """The same by `cost`."""
    cost = model.cost(RequestShape(num_history=num_history, num_candidates=num_candidates))
    assert model.cost(RequestShape(), cached=True).user_flops == 0
    return cost.user_flops, cost.item_flops * num_candidates
