"""Small random logs, and plain Python that says what should come of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from shortlist.data.histories import Histories
from shortlist.data.log import EventLog, Roles, read

START = 1_600_000_000
HOUR = 3_600
DAY = 86_400


def small_frame(seed: int = 0, *, num_users: int = 14, num_items: int = 12, num_events: int = 220) -> pl.DataFrame:
    """Events in shuffled file order: baskets of one to four lines, text user ids, repeats, two actions, money."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    basket = 0
    while len(rows) < num_events:
        basket += 1
        user, at = int(rng.integers(num_users)), START + HOUR * int(rng.integers(2_000))
        for _ in range(int(rng.integers(1, 5))):
            rows.append({
                "user_id": f"u{user}",
                "item_id": 100 + int(rng.integers(num_items)),
                "timestamp": at + int(rng.integers(0, 90)),
                "basket_id": f"b{basket}",
                "action": str(rng.choice(["view", "buy"])),
                "value": float(rng.integers(1, 20)),
            })  # fmt: skip
    return pl.DataFrame(rows).sample(fraction=1.0, shuffle=True, seed=seed)


def small_log(seed: int = 0, **kwargs: Any) -> EventLog:
    """`small_frame` read as a log."""
    return read(small_frame(seed, **kwargs))


def plain_log(rows: list[tuple[str, str, int]], **columns: list[Any]) -> EventLog:
    """A log of (user, item, time) rows in file order; the same user and time is one group."""
    user, item, time = zip(*rows)
    frame = pl.DataFrame({"user_id": user, "item_id": item, "timestamp": [START + t for t in time], **columns})
    return read(frame, roles=Roles(value="", basket="", action="", query=""))


@dataclass
class Basket:
    """One group as plain Python finds it."""

    user: Any
    at: int
    """Seconds of its last event."""
    lines: list[dict[str, Any]]

    @property
    def items(self) -> set[Any]:
        return {line["item_id"] for line in self.lines}


def baskets_of(log: EventLog) -> dict[Any, list[Basket]]:
    """Groups per user, oldest first, found one row at a time."""
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in log.events.iter_rows(named=True):
        groups.setdefault(row["group_id"], []).append(row)
    users: dict[Any, list[tuple[int, int, Basket]]] = {}
    for number, lines in groups.items():
        at_ms = (
            max(int(line["timestamp"].replace(tzinfo=None).timestamp() * 1000) for line in lines) if log.has_time else 0
        )
        at = at_ms // 1000 if log.has_clock else 0
        user = lines[0]["user_id"]
        users.setdefault(user, []).append((at_ms, number, Basket(user, at, lines)))
    return {user: [basket for *_, basket in sorted(found, key=lambda f: f[:2])] for user, found in users.items()}


def shuffled_inside_groups(frame: pl.DataFrame, seed: int = 0) -> pl.DataFrame:
    """The same rows with the lines of each basket in another order, on the basket's own places in the file."""
    rng = np.random.default_rng(seed)
    order = np.arange(frame.height)
    for places in frame.with_row_index().group_by("user_id", "basket_id", maintain_order=True).agg("index")["index"]:
        order[places.to_numpy()] = rng.permutation(places.to_numpy())
    return frame[order]


def random_histories(seed: int = 0, *, num_users: int = 9, num_items: int = 7, most_groups: int = 7) -> Histories:
    """Histories with users of no, one and several groups; times rise by hours."""
    rng = np.random.default_rng(seed)
    rows, group = [], 0
    for user in range(1, num_users + 1):
        at = START
        for _ in range(int(rng.integers(0, most_groups + 1))):
            group, at = group + 1, at + HOUR * int(rng.integers(1, 60))
            for _ in range(int(rng.integers(1, 4))):
                rows.append(
                    (
                        user,
                        int(rng.integers(1, num_items + 1)),
                        at,
                        group,
                        int(rng.integers(1, 3)),
                        int(rng.integers(1, 9)),
                    )
                )
    user, item, time, groups, action, value = np.array(rows, dtype=np.int64).reshape(-1, 6).T
    return Histories(
        offsets=np.searchsorted(user, np.arange(num_users + 2)).astype(np.int64),
        item=item,
        time=time,
        group=groups,
        action=action,
        value=value.astype(np.float32),
    )
