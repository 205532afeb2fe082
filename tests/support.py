"""A planted little shop that every contract test shares: its rules are known, so what a system should find is known too.

20 items in 4 clusters of 5. Each user likes one cluster; a basket holds one to three items of it, and after item i of a cluster the
next basket opens with item i + 1 of the cluster. User fields, item fields, a context field and two pair fields stand beside.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import torch

from shortlist.data.batches import Batch, labels_of, next_event_batch, request_batch, target_candidates
from shortlist.data.dataset import Dataset, build_dataset
from shortlist.data.histories import Histories, Requests, View
from shortlist.data.jagged import Jagged
from shortlist.data.log import read
from shortlist.data.schema import Categorical, FieldTable, Numeric, Sequence, Space
from shortlist.data.splits import DataConfig
from shortlist.models.base import Feed, System
from shortlist.registry import Entry

CLUSTERS, PER_CLUSTER = 4, 5
NUM_ITEMS = CLUSTERS * PER_CLUSTER
DAY = 86_400
PAIRS = (Numeric(name="times_seen"), Numeric(name="days_since"))


def planted_histories(num_users: int = 60, seed: int = 0) -> Histories:
    """Histories of the shop; user u likes cluster u % 4. Each has 4 to 8 baskets, one a day."""
    rng = np.random.default_rng(seed)
    rows = []
    group = 0
    for user in range(1, num_users + 1):
        cluster, at = user % CLUSTERS, int(rng.integers(PER_CLUSTER))
        for day in range(int(rng.integers(4, 9))):
            group += 1
            others = rng.permutation([i for i in range(PER_CLUSTER) if i != at])[: rng.integers(0, 3)]
            for place in [at, *others]:
                rows.append((user, 1 + cluster * PER_CLUSTER + place, day * DAY + 3600, group))
            at = (at + 1) % PER_CLUSTER
    user, item, time, groups = np.array(rows, dtype=np.int64).T
    offsets = np.searchsorted(user, np.arange(num_users + 2)).astype(np.int64)
    ones = np.ones(len(user), dtype=np.int64)
    return Histories(offsets=offsets, item=item, time=time, group=groups, action=ones, value=ones.astype(np.float32))


def planted_space(num_users: int = 60, tasks: tuple[str, ...] = ("target",)) -> Space:
    """Fields: cluster (Categorical), price (Numeric), words (Sequence) of items; country of users; hour of requests."""
    n = NUM_ITEMS + 1
    cluster = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.arange(NUM_ITEMS) // PER_CLUSTER])
    lengths = torch.full((n,), 2)
    lengths[0] = 0
    words = torch.stack([cluster[1:], 5 + torch.arange(NUM_ITEMS) % PER_CLUSTER], 1).flatten()
    items = FieldTable(
        n,
        (Categorical(name="cluster", size=4), Numeric(name="price"), Sequence(name="words", size=9)),
        {"cluster": cluster, "price": torch.linspace(-1, 1, n), "words": Jagged.from_lengths(words, lengths)},
    )
    known = torch.ones(n, dtype=torch.bool)
    known[0] = False
    return Space(
        items=items,
        known_items=known,
        num_users=num_users,
        user_fields=(Categorical(name="country", size=2),),
        context_fields=(Categorical(name="hour", size=24),),
        pair_fields=PAIRS,
        tasks=tasks,
    )


def planted_view(num_users: int = 60, seed: int = 0) -> View:
    """All but each user's last basket."""
    whole = planted_histories(num_users, seed)
    last = whole.group[whole.offsets[2:] - 1]
    histories = whole.keep(whole.group != np.concatenate([[-1], last])[whole.user_of_event])
    country = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.arange(num_users) % 2])
    users = FieldTable(num_users + 1, (Categorical(name="country", size=2),), {"country": country})
    return View(histories=histories, space=planted_space(num_users), users=users, now=10 * DAY)


def last_baskets(num_users: int = 60, seed: int = 0) -> tuple[Histories, Requests]:
    """Each user's last basket as a held-out request, with the histories its indices point into."""
    whole = planted_histories(num_users, seed)
    user = np.arange(1, num_users + 1)
    stop = whole.offsets[user + 1]
    last = whole.group[stop - 1]
    end = np.array([np.flatnonzero(whole.group == g)[0] for g in last])
    targets = [np.unique(whole.item[a:b]) for a, b in zip(end, stop)]
    requests = Requests(
        user=user,
        time=whole.time[stop - 1],
        start=whole.offsets[user],
        end=end,
        target_offsets=np.concatenate([[0], np.cumsum([len(t) for t in targets])]).astype(np.int64),
        target=np.concatenate(targets),
        target_value=np.ones(sum(len(t) for t in targets), dtype=np.float32),
        context={"hour": np.full(num_users, 2, dtype=np.int64)},
    )
    return whole, requests


def pair_fields(batch: Batch, rows: Jagged) -> dict[str, torch.Tensor]:
    """The two planted pair fields by brute force: log count of the item in the history, and 1 / (1 + days since)."""
    seen, since = [], []
    for r in range(batch.size):
        a, b = batch.history.items.offsets[r : r + 2].tolist()
        items, times = batch.history.items.values[a:b], batch.history.time[a:b]
        for row in rows.values[rows.offsets[r] : rows.offsets[r + 1]].tolist():
            when = times[items == row]
            seen.append(float(np.log1p(len(when))))
            since.append(1 / (1 + (int(batch.time[r]) - int(when.max())) / DAY) if len(when) else 0.0)
    return {"times_seen": torch.tensor(seen), "days_since": torch.tensor(since)}


def planted_batch(num_users: int = 60, seed: int = 0, candidates: int | None = None) -> Batch:
    """Held-out requests; with `candidates`, so many random items each beside the targets, with pair fields and labels."""
    histories, requests = last_baskets(num_users, seed)
    view = planted_view(num_users, seed)
    batch = request_batch(histories, view.users, requests, max_history=50)
    if candidates is None:
        return batch
    rng = np.random.default_rng(seed + 1)
    rows = []
    for r in range(len(requests)):
        targets = requests.target[requests.target_offsets[r] : requests.target_offsets[r + 1]]
        others = np.setdiff1d(np.arange(1, NUM_ITEMS + 1), targets)
        rows.append(rng.permutation(np.concatenate([targets, rng.permutation(others)[:candidates]])).tolist())
    jagged = Jagged.from_rows(rows)
    label, _ = labels_of(jagged, requests)
    return batch.with_candidates(jagged, pair_fields(batch, jagged), {"target": label})


def training_batch(feed: Feed, view: View, seed: int = 0) -> Batch:
    """One batch of the given feed over the whole planted shop."""
    users = np.arange(1, view.space.num_users + 1)
    if feed == "next_event":
        return next_event_batch(view.histories, view.users, users, max_history=50)
    if feed == "targets":
        histories, requests = last_baskets(len(users), seed)
        batch = request_batch(histories, view.users, requests, max_history=50)
        return batch.with_candidates(target_candidates(requests))
    return planted_batch(len(users), seed, candidates=6)


def build(entry: Entry, view: View, seed: int = 0) -> System:
    """A tiny instance, prepared, not trained."""
    torch.manual_seed(seed)
    model: System = entry.cls(entry.config(entry.tiny), view.space)
    model.prepare(view)
    return model.eval()


def train(model: System, view: View, steps: int = 60, lr: float = 0.02) -> list[float]:
    """Every phase for `steps` full-batch steps of Adam, or its own learning; the summed loss of each step."""
    curve = []
    for phase in model.phases():
        if phase.before is not None:
            phase.before(view)
        if phase.learn is not None:
            model.train()
            curve.append(float(torch.stack(list(phase.learn([training_batch(phase.feed, view)]).values())).sum()))
            continue
        parameters = (
            list(phase.parameters()) if phase.parameters else [p for p in model.parameters() if p.requires_grad]
        )
        dense = torch.optim.Adam(parameters, lr=lr)
        batch = training_batch(phase.feed, view)
        model.train()
        for _ in range(steps):
            loss = torch.stack(list(phase.losses(batch).values())).sum()
            dense.zero_grad()
            loss.backward()
            dense.step()
            curve.append(float(loss.detach()))
    model.eval()
    return curve


def one_request(batch: Batch, r: int) -> Batch:
    """Request r of a batch, alone."""
    index = torch.tensor([r])
    history = batch.history
    where = history.items.value_index(index)
    candidates = batch.candidates
    if candidates is not None:
        kept = candidates.rows.value_index(index)
        candidates = replace(
            candidates,
            rows=candidates.rows.select(index),
            pair={name: column[kept] for name, column in candidates.pair.items()},
        )
    return replace(
        batch,
        user=batch.user[index],
        time=batch.time[index],
        history=replace(
            history,
            items=history.items.select(index),
            time=history.time[where],
            action=history.action[where],
            value=history.value[where],
            group=history.group[where],
        ),
        user_fields={n: c.select(index) if isinstance(c, Jagged) else c[index] for n, c in batch.user_fields.items()},
        context={n: c.select(index) if isinstance(c, Jagged) else c[index] for n, c in batch.context.items()},
        candidates=candidates,
        labels={},
        excluded=None if batch.excluded is None else batch.excluded.select(index),
    )


def shop_frames(num_users: int = 80, seed: int = 0) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """The planted shop as raw tables with string ids: events, items (title, cluster, price), users (country).

    Users come at their own time of the year, so that a split by time holds out something of most of them.
    """
    histories = planted_histories(num_users, seed)
    rng = np.random.default_rng(seed)
    user = histories.user_of_event
    moment = 1_700_000_000 + histories.time * 6 + rng.integers(0, 2 * DAY, num_users + 1)[user]
    events = pl.DataFrame(
        {
            "user_id": [f"u{u}" for u in user],
            "item_id": [f"i{i}" for i in histories.item],
            "timestamp": moment,
            "price": 1.0 + histories.item % 7,
        }
    )
    number = np.arange(1, NUM_ITEMS + 3)  # two items that nobody bought
    items = pl.DataFrame(
        {
            "item_id": [f"i{i}" for i in number],
            "title": [f"thing number {i}" for i in number],
            "cluster": [f"c{(i - 1) // PER_CLUSTER}" for i in number],
            "price": 1.0 + number % 7,
        }
    )
    users = pl.DataFrame(
        {
            "user_id": [f"u{u}" for u in range(1, num_users + 1)],
            "country": [f"land{u % 2}" for u in range(1, num_users + 1)],
        }
    )
    return events, items, users


def shop_dataset(num_users: int = 80, seed: int = 0, config: DataConfig | None = None) -> Dataset:
    """The same, read and encoded."""
    events, items, users = shop_frames(num_users, seed)
    return build_dataset(read(events, items=items, users=users), config)
