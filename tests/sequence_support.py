"""Small logs and plain training for tests of sequence systems."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch

from shortlist.data.batches import Batch, next_event_batch, request_batch
from shortlist.data.histories import Histories, Requests, View
from shortlist.data.schema import FieldTable, Space
from shortlist.models.base import System

S = TypeVar("S", bound=System)


def view_of(rows: list[list[list[int]]], num_items: int) -> View:
    """A view without fields from users' groups of items: [[[1], [2, 3]]] is one user with a basket of one, then one of two."""
    items, groups, offsets = [], [], [0, 0]
    for user in rows:
        for group in user:
            items += group
            groups += [len(groups)] * len(group)
        offsets.append(len(items))
    item = np.array(items, dtype=np.int64)
    clock = np.array(groups, dtype=np.int64)
    ones = np.ones(len(item), dtype=np.int64)
    histories = Histories(
        offsets=np.array(offsets), item=item, time=clock, group=clock, action=ones, value=ones.astype(np.float32)
    )
    known = torch.zeros(num_items + 1, dtype=torch.bool)
    known[torch.from_numpy(item)] = True
    space = Space(items=FieldTable(num_items + 1), known_items=known, num_users=len(rows))
    return View(histories=histories, space=space, users=FieldTable(len(rows) + 1), now=int(clock.max(initial=0)) + 1)


def batch_of(view: View, rows: list[list[int]]) -> Batch:
    """Requests of unknown users with the given items as history, one group each."""
    singles = view_of([[[item] for item in row] for row in rows], view.space.num_items).histories
    end = singles.offsets[2:]
    none = np.zeros(0, dtype=np.int64)
    requests = Requests(
        user=np.zeros(len(rows), dtype=np.int64),
        time=np.full(len(rows), view.now),
        start=singles.offsets[1:-1],
        end=end,
        target_offsets=np.zeros(len(rows) + 1, dtype=np.int64),
        target=none,
        target_value=none.astype(np.float32),
    )
    return request_batch(singles, view.users, requests, max_history=1000)


def learn(model: S, view: View, epochs: int, lr: float = 0.01, seed: int = 0, bf16: bool = False) -> S:
    """Plain training on random batches of 64 users."""
    torch.manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for _ in range(epochs):
        for users in torch.randperm(view.space.num_users).add(1).split(64):
            batch = next_event_batch(view.histories, view.users, users.numpy(), max_history=model.max_history)
            optimiser.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model.losses(batch)["next"]
            loss.backward()
            optimiser.step()
    return model.eval()
