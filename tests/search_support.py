"""Long pasts with a planted rule: what is chosen is of a group that the past holds, long ago."""

from __future__ import annotations

import torch

from ranking_support import batch_of, space_of
from shortlist.data.batches import Batch
from shortlist.data.schema import Categorical, Space

GROUPS, PER_GROUP, LENGTH, RECENT, OFFERED = 40, 5, 40, 10, 5


def long_space() -> Space:
    """200 items in 40 groups, which a categorical field of items tells, with two actions."""
    group = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.arange(GROUPS * PER_GROUP) // PER_GROUP])
    return space_of(
        GROUPS * PER_GROUP, item_fields=(Categorical(name="group", size=GROUPS),), item_columns={"group": group}
    )


def long_batch(size: int, draw: torch.Generator) -> Batch:
    """Of 30 old events in 12 groups and 10 newer ones in 4 others, the first candidate's group is one of the 12, the others' of neither."""
    group = torch.rand(size, GROUPS, generator=draw).argsort(1)
    old = group[:, :12].gather(1, torch.randint(12, (size, LENGTH - RECENT), generator=draw))
    new = group[:, 12:16].gather(1, torch.randint(4, (size, RECENT), generator=draw))
    liked = old.gather(1, torch.randint(old.shape[1], (size, 1), generator=draw))
    offered = torch.cat([liked, group[:, 16 : 16 + OFFERED - 1]], 1)
    past, rows = (
        1 + g * PER_GROUP + torch.randint(PER_GROUP, g.shape, generator=draw)
        for g in (torch.cat([old, new], 1), offered)
    )
    label = torch.zeros(size, OFFERED)
    label[:, 0] = 1
    return batch_of(past.tolist(), rows.tolist(), labels={"target": label.flatten()})
