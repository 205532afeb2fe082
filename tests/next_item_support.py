"""Logs by hand and planted walks that the tests of next-item systems share."""

from __future__ import annotations

import numpy as np
import torch

from shortlist.data.batches import Batch, next_event_batch, request_batch
from shortlist.data.histories import Histories, Requests, View
from shortlist.data.schema import FieldTable, Space
from shortlist.models.base import VectorRetriever

NUM_WALKED = 30


def view_of(rows: list[list[list[int]]], num_items: int, items: FieldTable | None = None) -> View:
    """A view from users' groups of items: [[[1], [2, 3]]] is one user with a basket of one, then one of two."""
    item, group, offsets = [], [], [0, 0]
    for user in rows:
        for basket in user:
            item += basket
            group += [group[-1] + 1 if group else 0] * len(basket)
        offsets.append(len(item))
    items_N = np.array(item, dtype=np.int64)
    clock = np.array(group, dtype=np.int64)
    ones = np.ones(len(items_N), dtype=np.int64)
    histories = Histories(
        offsets=np.array(offsets), item=items_N, time=clock, group=clock, action=ones, value=ones.astype(np.float32)
    )
    known = torch.zeros(num_items + 1, dtype=torch.bool)
    known[torch.from_numpy(items_N)] = True
    known[0] = False
    space = Space(items=items or FieldTable(num_items + 1), known_items=known, num_users=len(rows))
    return View(histories=histories, space=space, users=FieldTable(len(rows) + 1), now=int(clock.max(initial=0)) + 1)


def batch_of(view: View, rows: list[list[int]], max_history: int = 1000) -> Batch:
    """Requests of unknown users with the given items as history, one group each."""
    singles = view_of([[[item] for item in row] for row in rows], view.space.num_items).histories
    none = np.zeros(0, dtype=np.int64)
    requests = Requests(
        user=np.zeros(len(rows), dtype=np.int64),
        time=np.full(len(rows), view.now),
        start=singles.offsets[1:-1],
        end=singles.offsets[2:],
        target_offsets=np.zeros(len(rows) + 1, dtype=np.int64),
        target=none,
        target_value=none.astype(np.float32),
    )
    return request_batch(singles, view.users, requests, max_history=max_history)


def next_events(view: View, max_history: int = 1000) -> Batch:
    """The next-event batch of all users."""
    users = np.arange(1, view.space.num_users + 1)
    return next_event_batch(view.histories, view.users, users, max_history=max_history)


def learn(model: VectorRetriever, view: View, epochs: int, lr: float = 0.01, seed: int = 0, size: int = 64) -> None:
    """Plain training on random batches of `size` users; leaves the model in evaluation mode."""
    torch.manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for _ in range(epochs):
        for users in torch.randperm(view.space.num_users).add(1).split(size):
            batch = next_event_batch(view.histories, view.users, users.numpy(), max_history=model.max_history)
            optimiser.zero_grad()
            torch.stack(list(model.losses(batch).values())).sum().backward()
            optimiser.step()
    model.eval()


def walks(num_items: int = NUM_WALKED, num_users: int = 400, seed: int = 0) -> tuple[View, np.ndarray]:
    """Users walk: item i is followed by next_of[i] with chance 0.8, else by any item. Popularity knows nothing of it."""
    rng = np.random.default_rng(seed)
    cycle = rng.permutation(num_items) + 1
    next_of = np.zeros(num_items + 1, dtype=np.int64)
    next_of[cycle] = np.roll(cycle, -1)
    rows = []
    for _ in range(num_users):
        walk = [int(rng.integers(1, num_items + 1))]
        for _ in range(7):
            walk.append(int(next_of[walk[-1]]) if rng.random() < 0.8 else int(rng.integers(1, num_items + 1)))
        rows.append([[i] for i in walk])
    return view_of(rows, num_items), next_of


@torch.no_grad()
def share_of_rule_found(model: VectorRetriever, view: View, next_of: np.ndarray) -> float:
    """For how many items the model's first choice after that item alone is the planted next one; chance is 1 in 30."""
    batch = batch_of(view, [[i] for i in range(1, len(next_of))])
    top = model.retrieve(batch, 2).rows
    own = torch.arange(1, len(next_of))
    first = torch.where(top[:, 0] == own, top[:, 1], top[:, 0])  # what was seen is not shown again
    return float((first.numpy() == next_of[1:]).mean())
