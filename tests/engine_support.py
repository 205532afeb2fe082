"""A small shop and a run over it, for tests of the engine and the server: what follows what is known, so answers can be told in advance.

40 items in a ring: after item n comes item n + 1. 50 users walk along it for some days, one item a day; three items are on sale that
nobody has bought. Ids of users are text, ids of items numbers from 100, so that neither is a row.
"""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
import polars as pl
import torch

from shortlist.cascade.build import train_cascade
from shortlist.cascade.cascade import Cascade, stage_space
from shortlist.cascade.config import RunConfig
from shortlist.cascade.live import Live
from shortlist.data.dataset import Dataset, build_dataset
from shortlist.data.log import read

NUM_ITEMS, NUM_NEW, NUM_USERS = 40, 3, 50
FIRST_ITEM = 100
START = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
DAY = 86_400

RUN = """
[surface]
k = 6
[stages.retrieval]
systems = ["counts", "popularity"]
keep = 25
[stages.ranking]
systems = ["counts"]
keep = 15
[stages.re-ranking]
systems = ["mmr"]
"""


def shop_frames(seed: int = 0, start: datetime.datetime = START) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Events and items of the shop."""
    rng = np.random.default_rng(seed)
    events = []
    for user in range(NUM_USERS):
        at = int(rng.integers(NUM_ITEMS))
        for day in range(int(rng.integers(12, 25))):
            moment = start + datetime.timedelta(days=day, minutes=user)
            events.append((f"user-{user}", FIRST_ITEM + at, moment, ["view", "buy"][day % 2], float(1 + at % 5)))
            at = (at + 1) % NUM_ITEMS
    items = [(FIRST_ITEM + n, f"Item number {n}", f"shelf-{n % 4}", float(n % 7)) for n in range(NUM_ITEMS + NUM_NEW)]
    columns = ["user_id", "item_id", "timestamp", "action", "value"]
    return (
        pl.DataFrame(events, schema=columns, orient="row"),
        pl.DataFrame(items, schema=["item_id", "title", "shelf", "price"], orient="row"),
    )


def shop_dataset(seed: int = 0, start: datetime.datetime = START) -> Dataset:
    """The shop, encoded; items may be shown again."""
    events, items = shop_frames(seed, start)
    return build_dataset(read(events, items=items))


def trained_shop(folder: Path, text: str = RUN, seed: int = 0) -> Path:
    """A run trained on the shop by settings in TOML, in the folder."""
    torch.set_num_threads(1)
    events, items = shop_frames(seed)
    config = RunConfig.from_toml(text)
    train_cascade(build_dataset(read(events, items=items), config.data_settings), config, folder, progress=False)
    return folder


def prepared_cascade(dataset: Dataset, text: str = RUN) -> Cascade:
    """A cascade of systems that learn no weights, prepared on all events."""
    config = RunConfig.from_toml(text)
    view = dataset.view("end")
    systems = {}
    for stage in config.stages:
        for name in stage.systems:
            if name not in systems:
                choice = config.systems[name]
                torch.manual_seed(0)
                systems[name] = choice.entry.cls(choice.settings, stage_space(config, view.space, stage.name))
                systems[name].prepare(view)
    counts = np.bincount(view.histories.item, minlength=dataset.num_items + 1)
    popular = torch.from_numpy(np.argsort(-counts[1:], kind="stable") + 1)
    return Cascade(config, view.space, systems, popular=popular)


def shop_live(seed: int = 0, *, start: datetime.datetime = START, text: str = RUN, version: str = "one") -> Live:
    """The shop as the engine serves it."""
    dataset = shop_dataset(seed, start)
    return Live(dataset, prepared_cascade(dataset, text), version)


def after(item: int) -> int:
    """Id of the item that follows on the ring."""
    return FIRST_ITEM + (item - FIRST_ITEM + 1) % NUM_ITEMS


def break_system(live: Live, name: str, work: object) -> None:
    """Put a fault into every way a system of the run is asked."""
    for method in ("score", "score_all", "retrieve", "rerank"):
        object.__setattr__(live.cascade.systems[name], method, work)


def raising(*_: object, **__: object) -> None:
    """The fault."""
    raise RuntimeError("out of order")
