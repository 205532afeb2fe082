"""What the claims about embedding tables share: tables of a DNN replaced by others of a given size, and what they store.

n ids of a table, R rows for them, K values of a log's column.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from _ctr import Change, Recipe, embeddings_of, quality, trained
from _ranking_lab import World
from shortlist.embeddings.base import Table, TableChoice, finish_tables, make_table
from shortlist.embeddings.bh import BHConfig, block_rows, chosen_blocks
from shortlist.embeddings.hashed import HashedConfig
from shortlist.embeddings.multi_hash import MultiHashConfig
from shortlist.embeddings.quotient_remainder import QuotientRemainderConfig
from shortlist.metrics import Interval
from shortlist.models.base import Ranker
from shortlist.models.ranking.dnn import DNN

INIT_STD = 0.01
Maker = Callable[[int, int, Tensor], Table]
"""From the number of rows, the width and the training counts [n + 1] to a table that has learned the counts."""
SCHEMES: dict[str, Callable[[float], TableChoice]] = {
    "hashing trick": lambda c: HashedConfig(compression=c, init_std=INIT_STD),
    "two hashes, summed": lambda c: MultiHashConfig(compression=c, init_std=INIT_STD),
    "quotient-remainder, added": lambda c: QuotientRemainderConfig(compression=c, op="add", init_std=INIT_STD),
    "quotient-remainder, multiplied": lambda c: QuotientRemainderConfig(compression=c, init_std=INIT_STD),
    "BH, succession": lambda c: BHConfig(compression=c, init_std=INIT_STD),
}


def bh_rows(num_ids: int, compression: float) -> int:
    """Rows that BH (succession) takes for so many ids at a compression: what all other schemes are given too."""
    bits = max(1, (num_ids - 1).bit_length())
    blocks = chosen_blocks(num_ids - 1, bits, max(1, round(num_ids / compression)), "succession", shared=False)
    return sum(block_rows(blocks, num_ids - 1))


def fits(scheme: str, num_ids: int, compression: float) -> bool:
    """Whether the scheme can be as small as BH; quotient and remainder need 2 sqrt(n) rows."""
    fewest = math.isqrt(num_ids - 1) + 1
    smallest = fewest + math.ceil(num_ids / fewest)
    return "quotient" not in scheme or smallest <= bh_rows(num_ids, compression)


def sized(scheme: str, compression: float) -> Maker:
    """Tables of a scheme with as many rows as BH takes at that compression."""

    def make(num_rows: int, dim: int, counts: Tensor) -> Table:
        rows = bh_rows(num_rows - 1, compression)
        return make_table(num_rows, dim, SCHEMES[scheme]((num_rows - 1) / rows))

    return make


def chosen(choice: TableChoice) -> Maker:
    """The same table for every column."""

    def make(num_rows: int, dim: int, counts: Tensor) -> Table:
        table = make_table(num_rows, dim, choice)
        table.prepare(counts)
        return table

    return make


def replaced(make: Maker, world: World, *, users: bool = True) -> Change:
    """Puts tables in the place of a DNN's item ids, and user ids where wanted; those of the context stay plain."""

    def change(system: Ranker) -> None:
        assert isinstance(system, DNN)
        dim = system.config.dim
        item, user = world.train.rows.values, torch.from_numpy(world.train.requests.user)
        system.items.ids = make(world.space.num_items + 1, dim, counts_of(item, world.space.num_items))
        if users and system.request.user_ids is not None:
            system.request.user_ids = make(world.space.num_users + 1, dim, counts_of(user, world.space.num_users))

    return change


def counts_of(codes: Tensor, size: int) -> Tensor:
    """Occurrences of each code in training, int64 [size + 1]."""
    return torch.bincount(codes, minlength=size + 1)


def measured(
    settings: Mapping[str, Any], world: World, recipe: Recipe, seed: int, make: Maker, *, users: bool = True
) -> tuple[Ranker, dict[str, float | Interval]]:
    """A trained DNN whose tables have dropped what only training needed, and its figures on the test rows."""
    system, course = trained("dnn", settings, world, recipe, seed, change=replaced(make, world, users=users))
    valid = quality(system, world, world.valid)
    finish_tables(system)
    return system, {
        **quality(system, world, world.test),
        "valid_auc": valid["auc"],
        "cost:floats": float(floats_of(system)),
        "cost:id_floats": float(floats_of(*id_tables(system)[: 2 if users else 1])),
        "cost:epochs": float(course.epochs),
    }


def id_tables(system: Ranker) -> list[Table]:
    """Tables of a DNN's items and users."""
    assert isinstance(system, DNN)
    tables = [system.items.ids, system.request.user_ids]
    return [table for table in tables if table is not None]


def floats_of(*modules: nn.Module) -> int:
    """Numbers stored in all tables of the modules."""
    return sum(weight.numel() for module in modules for weight in embeddings_of(module))
