"""Small systems and logs for the tests of training. Run as a program, trains one slowly, to be killed.

A user's next item is planted: item i is followed by item i % n + 1, so the reachable loss is near 0.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from shortlist.data.batches import Batch
from shortlist.data.histories import Histories, View
from shortlist.data.schema import FieldTable, Space
from shortlist.models.base import Cost, Losses, Phase, RequestShape, System
from shortlist.training.sources import NextEventSource
from shortlist.training.trainer import TrainerConfig, fit

NUM_ITEMS = 11


def histories_of(users: list[list[tuple[int, int]]]) -> Histories:
    """From (item, group) pairs per user; time = 10 x group."""
    events = [event for user in users for event in user]
    item = np.array([item for item, _ in events], dtype=np.int64)
    group = np.array([group for _, group in events], dtype=np.int64)
    offsets = np.cumsum([0, 0] + [len(user) for user in users]).astype(np.int64)
    ones = np.ones(len(item))
    return Histories(
        offsets=offsets,
        item=item,
        time=group * 10,
        group=group,
        action=ones.astype(np.int64),
        value=ones.astype(np.float32),
    )


def view_of(histories: Histories, num_items: int = NUM_ITEMS) -> View:
    space = Space(
        items=FieldTable(num_items + 1),
        known_items=torch.ones(num_items + 1, dtype=torch.bool),
        num_users=histories.num_users,
    )
    return View(histories=histories, space=space, users=FieldTable(histories.num_users + 1), now=10**6)


def chain_view(num_users: int = 60, seed: int = 0) -> View:
    """Users walk along the ring of items from a random start, 4 to 12 events each, one per group."""
    generator = np.random.default_rng(seed)
    users = []
    for _ in range(num_users):
        first, length = generator.integers(NUM_ITEMS), generator.integers(4, 13)
        users.append([(int((first + step) % NUM_ITEMS) + 1, step + 1) for step in range(length)])
    return view_of(histories_of(users))


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    dim: int = 8
    """Width."""
    dropout: float = 0.2
    """Makes the result depend on torch's generator."""


class Toy(System):
    """Next item from the last one: a sparse table, dropout, a linear map."""

    kind = "retriever"
    Config = ToyConfig
    feed = "next_event"

    def __init__(self, config: ToyConfig, space: Space) -> None:
        super().__init__(config, space)
        self.table = nn.Embedding(space.num_items + 1, config.dim, sparse=True)
        self.drop = nn.Dropout(config.dropout)
        self.out = nn.Linear(config.dim, space.num_items + 1)
        self.pause = 0.0
        self.prepared = 0

    def prepare(self, view: View) -> None:
        self.prepared += 1
        counts = torch.bincount(torch.from_numpy(view.histories.item), minlength=self.space.num_items + 1)
        self.buffer("counts", counts)

    def logits(self, batch: Batch) -> Tensor:
        assert batch.targets is not None
        return self.out(self.drop(self.table(batch.history.items.values[batch.targets.position])))

    def losses(self, batch: Batch) -> Losses:
        assert batch.targets is not None
        time.sleep(self.pause)
        items = batch.targets.items
        nll = nn.functional.cross_entropy(self.logits(batch)[items.row_of_value], items.values, reduction="none")
        return {"next": (nll * batch.targets.weight).sum() / items.num_rows}

    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        return Cost()


class TwoPhases(Toy):
    """First the table, then, with the table frozen by `before`, the map."""

    befores: tuple[str, ...] = ()

    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase(name="table", feed="next_event", losses=self.losses, parameters=self.table.parameters, epochs=2),
            Phase(name="map", feed="next_event", losses=self.losses, before=self.freeze),
        )

    def freeze(self, view: View) -> None:
        self.befores = (*self.befores, "map")
        self.table.weight.requires_grad_(False)
        self.buffer("frozen_copy", self.table.weight.detach().clone())


class PrepareOnly(Toy):
    """Complete after prepare."""

    feed = None


def make(cls: type[Toy] = Toy, view: View | None = None, **settings: float) -> tuple[Toy, View]:
    view = view or chain_view()
    torch.manual_seed(3)
    return cls(ToyConfig(**settings), view.space), view  # type: ignore[arg-type]


def train(system: System, view: View, config: TrainerConfig, **options: object):
    def source_of(phase: Phase) -> NextEventSource:
        return NextEventSource(view, batch_size=config.batch_size, max_history=6, seed=config.seed, random_window=True)

    return fit(system, view, source_of, config=config, progress=False, **options)  # type: ignore[arg-type]


KILLED_RUN = TrainerConfig(
    epochs=4, batch_size=8, lr=0.02, table_lr=0.05, seed=5, device="cpu", checkpoint_seconds=0, patience=None
)


def score_of(system: System) -> float:
    """Draws a random number, as a careless validation may."""
    return -float(system.out.weight.norm()) + 1e-9 * float(torch.rand(()))  # type: ignore[union-attr, operator]


if __name__ == "__main__":
    torch.set_num_threads(1)
    toy, log = make()
    toy.pause = 0.03
    train(toy, log, KILLED_RUN, folder=Path(sys.argv[1]), validate=score_of)
