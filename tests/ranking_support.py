"""Little worlds with planted rules, and batches by hand, for tests of rankers."""

from __future__ import annotations

import torch
from torch import Tensor

from shortlist.data.batches import Batch, Candidates, History
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Categorical, Field, FieldTable, Numeric, Sequence, Space
from shortlist.models.base import Ranker

GROUPS, PER_GROUP, PAST, OFFERED = 40, 5, 8, 6


def batch_of(past: list[list[int]], offered: list[list[int]], **columns: dict[str, Tensor]) -> Batch:
    """A batch by hand; events one hour apart, the request one hour after the last; `columns` are fields of Batch."""
    items = Jagged.from_rows(past)
    total = len(items.values)
    history = History(
        items=items,
        time=3600 * items.position_of_value,
        action=torch.ones(total, dtype=torch.int64),
        value=torch.ones(total),
        group=torch.arange(total),
    )
    return Batch(
        user=torch.arange(1, len(past) + 1),
        time=3600 * items.lengths,
        history=history,
        user_fields=columns.get("user_fields", {}),
        context=columns.get("context", {}),
        candidates=Candidates(rows=Jagged.from_rows(offered), pair=columns.get("pair", {})),
        labels=columns.get("labels", {}),
    )


def space_of(
    num_items: int,
    *,
    unknown: tuple[int, ...] = (),
    item_fields: tuple[Field, ...] = (),
    item_columns: dict[str, Tensor | Jagged] | None = None,
    user_fields: tuple[Field, ...] = (),
    context_fields: tuple[Field, ...] = (),
    pairs: tuple[str, ...] = (),
    tasks: tuple[str, ...] = ("target",),
    actions: tuple[str, ...] = ("event",),
    has_clock: bool = True,
) -> Space:
    """A space by hand; `unknown` rows had no training events."""
    known = torch.ones(num_items + 1, dtype=torch.bool)
    known[[0, *unknown]] = False
    return Space(
        items=FieldTable(num_items + 1, item_fields, item_columns or {}),
        known_items=known,
        num_users=10,
        user_fields=user_fields,
        context_fields=context_fields,
        pair_fields=tuple(Numeric(name=name) for name in pairs),
        tasks=tasks,
        actions=actions,
        has_clock=has_clock,
    )


def rich_space(**changes: tuple[str, ...]) -> Space:
    """12 items with a category, a price and words; users, contexts and pairs with fields. Items 11 and 12 are new."""
    words = Jagged.from_rows([[], *[[1 + i % 3, 4] for i in range(12)]])
    return space_of(
        12,
        unknown=(11, 12),
        item_fields=(Categorical(name="category", size=3), Numeric(name="price"), Sequence(name="words", size=4)),
        item_columns={
            "category": torch.tensor([0, *[1 + i % 3 for i in range(12)]]),
            "price": torch.linspace(-1, 1, 13),
            "words": words,
        },
        user_fields=(Categorical(name="country", size=2),),
        context_fields=(Categorical(name="hour", size=24), Numeric(name="rain")),
        pairs=("seen", "since"),
        **changes,
    )


def rich_batch(past: list[list[int]], offered: list[list[int]], **labels: list[float]) -> Batch:
    """Requests in `rich_space`, its columns drawn from a fixed seed, except pair fields: a function of the candidate alone."""
    size = len(past)
    rows = torch.tensor([row for rows in offered for row in rows], dtype=torch.int64)
    return batch_of(
        past,
        offered,
        user_fields={"country": torch.arange(size) % 3},
        context={"hour": torch.arange(size) % 24, "rain": torch.arange(size) / 10},
        pair={"seen": rows / 12, "since": torch.cos(rows.float())},
        labels={name: torch.tensor(values) for name, values in labels.items()},
    )


def groups_space() -> Space:
    """Items in groups of which no field tells: only ids."""
    return space_of(GROUPS * PER_GROUP)


def groups_batch(size: int, draw: torch.Generator) -> Batch:
    """Each past holds one item of each of 8 groups; the first candidate is of one of these groups, the other five are not.

    With 40 groups and few dimensions the mean of the past blurs which groups are in it: only a look from the candidate tells.
    """
    group = torch.rand(size, GROUPS, generator=draw).argsort(1)
    liked = group.gather(1, torch.randint(PAST, (size, 1), generator=draw))
    offered = torch.cat([liked, group[:, PAST : PAST + OFFERED - 1]], 1)
    items = [1 + g * PER_GROUP + torch.randint(PER_GROUP, g.shape, generator=draw) for g in (group[:, :PAST], offered)]
    label = torch.zeros(size, OFFERED)
    label[:, 0] = 1
    return batch_of(items[0].tolist(), items[1].tolist(), labels={"target": label.flatten()})


def train(model: Ranker, draw_batch: object, steps: int, lr: float = 0.01, seed: int = 1) -> list[float]:
    """Adam on freshly drawn batches; the loss of each step."""
    draw = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    curve = []
    for _ in range(steps):
        loss = torch.stack(list(model.losses(draw_batch(64, draw)).values())).sum()  # type: ignore[operator]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        curve.append(float(loss.detach()))
    model.eval()
    return curve


@torch.no_grad()
def share_right(model: Ranker, batch: Batch) -> float:
    """How often the positive of a request scores above a negative of it (GAUC, since every request has as many)."""
    score = model.score(batch)["target"].view(batch.size, -1)
    label = batch.labels["target"].view(batch.size, -1) > 0
    above = score[:, :, None] > score[:, None, :]
    return float(above[label[:, :, None] & ~label[:, None, :]].float().mean())
