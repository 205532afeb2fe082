"""A large event log whose rules are known: what a system can find in it was put there.

    python benchmarks/generated_log.py FOLDER [--events 5000000] [--users 400000] [--items 100000] [--format parquet]

Users come for sessions. A session stays in one category, drawn from the few that its user likes; inside it an event either follows the
one before (the next item on the category's ring), or repeats something the user had earlier, or is drawn afresh by popularity (Zipf).
Users, items and categories are skewed alike. Some items were never touched: their category alone can carry them.

    events.parquet   user_id item_id timestamp action device price session
    items.parquet    item_id title category price maker
    users.parquet    user_id country

Everything is drawn with one seed and no loop over events: 5 M rows take some ten seconds. N events, S sessions, U users, I items.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

Int = NDArray[np.int64]
DAY_S = 86_400
FIRST_DAY_S = 1_700_006_400  # 15 November 2023, midnight UTC
ACTIONS, ACTION_SHARES = ("view", "cart", "buy"), (0.8, 0.13, 0.07)
DEVICES, COUNTRIES, MAKERS = 4, 30, 200


@dataclass(frozen=True, kw_only=True)
class LogShape:
    """What to draw."""

    events: int = 5_000_000
    """Rows of the log, exactly."""
    users: int = 400_000
    """Users at most: those without a session do not occur."""
    items: int = 100_000
    """Items with a chance of an event."""
    new_items: int = 1_000
    """Listed items without any event."""
    categories: int = 200
    liked: int = 3
    """Categories of one user."""
    session_length: float = 5.0
    """Mean events of a session."""
    follow: float = 0.4
    """Share of events, other than a session's first, that are the next item on the ring after the event before."""
    repeat: float = 0.2
    """Share of events that repeat an earlier one of the same user."""
    skew: float = 1.1
    """Exponent of Zipf's law, for categories and items."""
    user_skew: float = 0.6
    """The same for users; lower, since nobody makes a tenth of a shop's log."""
    days: int = 180
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.events, self.users, self.categories, self.liked, self.days) < 1 or self.items < self.categories:
            raise ValueError("events, users, categories, liked and days must be at least 1, items at least categories")
        if not 0 <= self.follow <= 1 or not 0 <= self.repeat <= 1 - self.follow:
            raise ValueError("follow and repeat are shares that add up to at most 1")


class Frames(NamedTuple):
    """A log and its tables."""

    events: pl.DataFrame
    items: pl.DataFrame
    users: pl.DataFrame


class Truth(NamedTuple):
    """What was drawn, by number: for tests that know the answer. Item `i` is place i // categories of category i % categories."""

    user: Int
    """[N]"""
    item: Int
    """[N]"""
    session: Int
    """[N]"""
    time_s: Int
    """[N] rising within a user."""
    followed: NDArray[np.bool_]
    """[N] is the next item on the ring after the event before."""
    repeated: NDArray[np.bool_]
    """[N] copies an earlier event of the user."""


def zipf(rng: np.random.Generator, size: int, values: int, skew: float) -> Int:
    """int64 [size] from 0..values-1, value v in proportion to (v + 1)^-skew."""
    cumulated = np.cumsum(np.arange(1, values + 1, dtype=np.float64) ** -skew)
    return np.searchsorted(cumulated, rng.random(size) * cumulated[-1]).astype(np.int64)


def draw(shape: LogShape) -> Truth:
    """The events by number, users together, oldest first."""
    rng = np.random.default_rng(shape.seed)
    user_S, time_S, length_S = _sessions(shape, rng)
    session = np.repeat(np.arange(len(user_S)), length_S)
    user, event = user_S[session], np.arange(shape.events)
    first_of_session = np.searchsorted(session, session)
    first_of_user = np.searchsorted(user, user)
    lot = rng.random(shape.events)
    followed = (lot < shape.follow) & (event > first_of_session)
    repeated = (lot >= 1 - shape.repeat) & (event > first_of_user)
    earlier = first_of_user + (rng.random(shape.events) * (event - first_of_user)).astype(np.int64)
    source = np.where(followed, event - 1, np.where(repeated, earlier, event))

    liked_UL = zipf(rng, shape.users * shape.liked, shape.categories, shape.skew).reshape(shape.users, shape.liked)
    category = liked_UL[user_S, rng.integers(0, shape.liked, len(user_S))][session]
    size = _ring_sizes(shape)[category]
    place = np.minimum(zipf(rng, shape.events, int(size.max()), shape.skew), size - 1)
    root, steps = trace_back(source, followed.astype(np.int64))
    category, size = category[root], size[root]
    item = (place[root] + steps) % size * shape.categories + category
    pause = rng.integers(5, 300, shape.events)
    since = np.cumsum(pause) - np.cumsum(pause)[first_of_session]
    return Truth(user, item, session, time_S[session] + since, followed, repeated)


def trace_back(source: Int, add: Int) -> tuple[Int, Int]:
    """Where every chain of `source` [N] begins and what it adds up on the way, by doubling: root and sum, [N] each.

    source[i] <= i is what event i is made from, itself where it is drawn afresh; add[i] counts only where source[i] < i.
    """
    root, steps = source.copy(), np.where(source == np.arange(len(source)), 0, add)
    while not np.array_equal(root[root], root):
        steps = steps + steps[root]
        root = root[root]
    return root, steps


def frames(shape: LogShape) -> Frames:
    """The log as tables with text ids, rows in time order; ids carry no rank."""
    truth = draw(shape)
    rng = np.random.default_rng([shape.seed, 1])
    listed = shape.items + shape.new_items
    user_id, item_id = _ids("u", shape.users, rng), _ids("p", listed, rng)
    number = np.arange(listed)
    category, price = number % shape.categories, np.round(np.exp(rng.normal(2.5, 0.8, listed)), 2)
    device_S = rng.integers(0, DEVICES, int(truth.session[-1]) + 1)
    events = pl.DataFrame({
        "user_id": user_id.gather(truth.user),
        "item_id": item_id.gather(truth.item),
        "timestamp": truth.time_s,
        "action": pl.Series(ACTIONS).gather(rng.choice(3, shape.events, p=ACTION_SHARES)),
        "device": pl.Series([f"device {n}" for n in range(DEVICES)]).gather(device_S[truth.session]),
        "price": price[truth.item],
        "session": truth.session,
    }).sort("timestamp", maintain_order=True)  # fmt: skip
    items = pl.DataFrame({
        "item_id": item_id,
        "title": [f"Thing {n} of kind {c}" for n, c in zip(number.tolist(), category.tolist())],
        "category": [f"kind {c}" for c in category.tolist()],
        "price": price,
        "maker": [f"maker {m}" for m in rng.integers(0, MAKERS, listed).tolist()],
    })  # fmt: skip
    country = [f"land {c}" for c in zipf(rng, shape.users, COUNTRIES, shape.skew).tolist()]
    return Frames(events, items, pl.DataFrame({"user_id": user_id, "country": country}))


def write(made: Frames, folder: Path, kind: Literal["parquet", "csv", "csv.gz", "jsonl"] = "parquet") -> None:
    """events, items and users as files of one kind in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in made._asdict().items():
        path = folder / f"{name}.{kind}"
        match kind:
            case "parquet":
                frame.write_parquet(path)
            case "csv":
                frame.write_csv(path)
            case "csv.gz":
                frame.write_csv(path, compression="gzip")
            case "jsonl":
                frame.write_ndjson(path)


def _sessions(shape: LogShape, rng: np.random.Generator) -> tuple[Int, Int, Int]:
    """User, first second and number of events of each session, by user and time; the numbers add up to `events`."""
    drawn = rng.geometric(1 / shape.session_length, int(shape.events / shape.session_length * 1.2) + 10)
    while drawn.sum() < shape.events:
        drawn = np.concatenate([drawn, drawn])
    length = drawn[: int(np.searchsorted(np.cumsum(drawn), shape.events)) + 1].copy()
    length[-1] -= length.sum() - shape.events
    user = zipf(rng, len(length), shape.users, shape.user_skew)
    time_s = FIRST_DAY_S + rng.integers(0, shape.days * DAY_S, len(length))
    order = np.lexsort((time_s, user))
    user, time_s, length = user[order], time_s[order], length[order]
    # A session does not begin before the one before it has ended.
    span = length * 300
    shift = np.cumsum(span) - span
    start = np.maximum.accumulate(time_s - shift + user * np.int64(10**11)) - user * np.int64(10**11) + shift
    return user, start, length


def _ring_sizes(shape: LogShape) -> Int:
    """Items of each category [categories]."""
    return np.bincount(np.arange(shape.items) % shape.categories, minlength=shape.categories).astype(np.int64)


def _ids(letter: str, count: int, rng: np.random.Generator) -> pl.Series:
    """Text ids in an order that says nothing."""
    return pl.Series(rng.permutation(count) + count).cast(pl.String).str.replace("^", letter)


def main() -> None:
    """Write a log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    default = LogShape()
    for name in ("events", "users", "items", "categories", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name))
    parser.add_argument("--format", choices=("parquet", "csv", "csv.gz", "jsonl"), default="parquet")
    given = parser.parse_args()
    shape = LogShape(
        events=given.events, users=given.users, items=given.items, categories=given.categories, seed=given.seed
    )
    write(frames(shape), given.folder, given.format)


if __name__ == "__main__":
    main()
