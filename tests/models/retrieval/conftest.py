"""Small logs by hand: users as lists of (day, [items]) baskets."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from shortlist.data.batches import Batch, request_batch
from shortlist.data.histories import Histories, Requests, View
from shortlist.data.schema import FieldTable, Space

torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other
DAY = 86_400
Baskets = Sequence[tuple[int, Sequence[int]]]


def _histories(users: Sequence[Baskets]) -> Histories:
    item, time, group, counts = [], [], [], [0]
    for baskets in users:
        counts.append(sum(len(items) for _, items in baskets))
        for day, items in baskets:
            number = group[-1] + 1 if group else 0
            item += list(items)
            time += [day * DAY] * len(items)
            group += [number] * len(items)
    return Histories(
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        item=np.array(item, dtype=np.int64),
        time=np.array(time, dtype=np.int64),
        group=np.array(group, dtype=np.int64),
        action=np.ones(len(item), dtype=np.int64),
        value=np.ones(len(item), dtype=np.float32),
    )


@pytest.fixture
def make_view() -> Callable[..., View]:
    """make_view(users, num_items, now_day, items=FieldTable) -> View; user row u is users[u - 1]."""

    def make(
        users: Sequence[Baskets],
        num_items: int,
        now_day: int = 100,
        items: FieldTable | None = None,
        has_clock: bool = True,
    ) -> View:
        histories = _histories(users)
        known = torch.zeros(num_items + 1, dtype=torch.bool)
        known[torch.from_numpy(np.unique(histories.item))] = True
        known[0] = False
        space = Space(
            items=items or FieldTable(num_items + 1), known_items=known, num_users=len(users), has_clock=has_clock
        )
        return View(histories=histories, space=space, users=FieldTable(len(users) + 1), now=now_day * DAY)

    return make


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """make_batch(users, now_day) -> Batch: one request per user with all their baskets as history."""

    def make(users: Sequence[Baskets], now_day: int = 100, exclude_history: bool = False) -> Batch:
        histories = _histories(users)
        rows = np.arange(1, len(users) + 1)
        requests = Requests(
            user=rows,
            time=np.full(len(users), now_day * DAY),
            start=histories.offsets[rows],
            end=histories.offsets[rows + 1],
            target_offsets=np.zeros(len(users) + 1, dtype=np.int64),
            target=np.zeros(0, dtype=np.int64),
            target_value=np.zeros(0, dtype=np.float32),
        )
        table = FieldTable(len(users) + 1)
        return request_batch(histories, table, requests, max_history=1000, exclude_history=exclude_history)

    return make


@pytest.fixture
def random_users() -> list[Baskets]:
    """30 users, 20 items and now and then the unknown one, baskets of 1..4 with repeats inside."""
    random = np.random.default_rng(5)
    return [
        [
            (int(day), random.integers(0, 21, random.integers(1, 5)).tolist())
            for day in np.sort(random.choice(90, random.integers(1, 7), replace=False))
        ]
        for _ in range(30)
    ]


@pytest.fixture
def shuffled_in_baskets(random_users: list[Baskets]) -> list[Baskets]:
    """The same log with the items of every basket in another order."""
    random = np.random.default_rng(6)
    return [[(day, random.permutation(items).tolist()) for day, items in user] for user in random_users]
