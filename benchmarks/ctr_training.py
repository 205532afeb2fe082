"""Rows per second of training a click model: our DNN, tables and trainer beside the usual loop over `nn.Embedding`s with dense Adam.

    python benchmarks/ctr_training.py           # prints a table, writes benchmarks/results/ctr_training.json

Two shapes: `frappe`, ten fields with the sizes of Frappe, and `wide`, 100 fields of 1,000,000 ids each. Ids are log-uniform: a few are
frequent, most are rare. Arms:

    usual         one nn.Embedding per field, read in a loop; torch.optim.Adam with its defaults; batches are slices of one matrix of ids
    usual, fused  the same with Adam's fused form
    ours          the dnn ranker and `fit`, as a cascade trains it: batches from requests, small tables by fused AdamW, those with
                  10,000 ids or more row-wise
    tower alone   the tower's forward, backward and update on vectors that lie ready: the bound for any form

All arms have the same tower (400, 400, 400; batch norm, ReLU, dropout 0.2). Both forms have, checked before anything is timed, the
same loss at the same weights. Each arm trains alone, since the tables and moments of two would not fit in memory, for as many steps;
the first ones, which make the optimisers' state, are not counted. A step of the usual form writes every row of every table, one of
ours those of the batch, so the ratio grows with the tables and falls with the batch.

R rows of the log, B of a batch, F fields, d width of an embedding.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from shortlist.data.batches import Batch, Candidates
from shortlist.data.histories import Histories, Requests, View
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Categorical, FieldTable, Space
from shortlist.embeddings.base import TableChoice
from shortlist.evaluation.benchmarks import record
from shortlist.evaluation.evidence import machine_lock
from shortlist.models.ranking.dnn import DNN, DNNConfig
from shortlist.training.config import TrainerConfig
from shortlist.training.sources import CandidateSource
from shortlist.training.trainer import fit

RESULT = Path(__file__).parent / "results" / "ctr_training.json"
WIDTHS, DROPOUT, LR = (400, 400, 400), 0.2, 1e-3
ROWWISE_FROM = 10_000
"""Ids from which a table of ours is updated row by row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A log and how it is trained on."""

    num_users: int
    num_items: int
    fields: tuple[int, ...]
    """Sizes of the context's fields."""
    dim: int
    batch_size: int
    steps: int
    """Timed; before them come `warm` others."""
    warm: int = 2
    rounds: int = 1
    """Turns of each arm."""


SHAPES = {
    "frappe": Shape(
        num_users=957, num_items=4_082, fields=(7, 7, 2, 3, 2, 9, 80, 233), dim=10, batch_size=4_096, steps=49, rounds=3
    ),
    "wide": Shape(num_users=1, num_items=1, fields=(1_000_000,) * 100, dim=8, batch_size=4_096, steps=6),
}


@dataclass(frozen=True, slots=True)
class Log:
    """Rows drawn for a shape."""

    space: Space
    columns_RF: NDArray[np.int64]
    """Ids 1.. of the context's fields, the user and the item, in this order."""
    label_R: Tensor
    """float32."""


def drawn(shape: Shape, num_rows: int, seed: int = 0) -> Log:
    """Log-uniform ids, and labels by a coin."""
    rng = np.random.default_rng(seed)
    sizes = np.array((*shape.fields, shape.num_users, shape.num_items))
    columns_RF = (sizes ** rng.random((num_rows, len(sizes)))).astype(np.int64).clip(max=sizes)
    known = torch.ones(shape.num_items + 1, dtype=torch.bool)
    known[0] = False
    space = Space(
        items=FieldTable(shape.num_items + 1),
        known_items=known,
        num_users=shape.num_users,
        context_fields=tuple(Categorical(name=f"field_{i}", size=size) for i, size in enumerate(shape.fields)),
        has_clock=False,
    )
    return Log(space, columns_RF, torch.from_numpy(rng.integers(0, 2, num_rows).astype(np.float32)))


# -- the usual form ------------------------------------------------------------------------------------------------


class Usual(nn.Module):
    """One table per field, read in a loop, and a tower."""

    def __init__(self, sizes: Sequence[int], dim: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size + 1, dim) for size in sizes)
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.02)
        layers: list[nn.Module] = []
        width = len(sizes) * dim
        for hidden in WIDTHS:
            layers += [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(DROPOUT)]
            width = hidden
        self.tower = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, ids_BF: Tensor) -> Tensor:
        """Logits float32 [B]."""
        vectors = [table(ids_BF[:, field]) for field, table in enumerate(self.tables)]
        return self.tower(torch.cat(vectors, dim=1))[:, 0]


def usual_rate(log: Log, shape: Shape, *, fused: bool) -> float:
    """Rows per second of the usual form."""
    torch.manual_seed(0)
    model = Usual((*shape.fields, shape.num_users, shape.num_items), shape.dim)
    optimiser = torch.optim.Adam(model.parameters(), lr=LR, fused=fused or None)
    ids_RF = torch.from_numpy(log.columns_RF)
    order = torch.randperm(len(ids_RF), generator=torch.Generator().manual_seed(0))
    model.train()
    began, num_rows = 0.0, 0
    for step in range(shape.warm + shape.steps):
        if step == shape.warm:
            began = time.perf_counter()
        batch = order[step * shape.batch_size : (step + 1) * shape.batch_size]
        optimiser.zero_grad(set_to_none=True)
        binary_cross_entropy_with_logits(model(ids_RF[batch]), log.label_R[batch]).backward()
        optimiser.step()
        num_rows += len(batch) if step >= shape.warm else 0
    return num_rows / (time.perf_counter() - began)


def tower_rate(shape: Shape) -> float:
    """Rows per second of the tower alone, on vectors that lie ready: what no way of holding tables can pass."""
    torch.manual_seed(0)
    tower = Usual((0,) * (len(shape.fields) + 2), shape.dim).tower
    optimiser = torch.optim.Adam(tower.parameters(), lr=LR, fused=True)
    x_BX = torch.randn(shape.batch_size, (len(shape.fields) + 2) * shape.dim, requires_grad=True)
    label_B = torch.ones(shape.batch_size)
    began = 0.0
    for step in range(shape.warm + shape.steps):
        if step == shape.warm:
            began = time.perf_counter()
        optimiser.zero_grad(set_to_none=True)
        binary_cross_entropy_with_logits(tower(x_BX)[:, 0], label_B).backward()
        optimiser.step()
    return shape.steps * shape.batch_size / (time.perf_counter() - began)


# -- ours ----------------------------------------------------------------------------------------------------------


def dnn(log: Log, shape: Shape, *, rowwise_from: int = ROWWISE_FROM) -> DNN:
    """Our ranker over the log."""
    is_large = max(shape.num_users, shape.num_items) >= rowwise_from or max(shape.fields) >= rowwise_from
    config = DNNConfig(
        dim=shape.dim,
        widths=WIDTHS,
        dropout=DROPOUT,
        norm="batch",
        max_history=1,
        loss="bce",
        use_user_ids=True,
        id_dropout=0.0,
        pair_bins=0,
        table=TableChoice(sparse=is_large, min_field_size=rowwise_from if is_large else None),
    )
    return DNN(config, log.space)


def source(log: Log, batch_size: int, num_rows: int) -> CandidateSource:
    """The first rows as requests with one candidate each."""
    *context_FR, user_R, item_R = log.columns_RF[:num_rows].T.copy()
    none_R = np.zeros(num_rows, dtype=np.int64)
    requests = Requests(
        user=user_R,
        time=none_R,
        start=none_R,
        end=none_R,
        target_offsets=np.zeros(num_rows + 1, dtype=np.int64),
        target=none_R[:0],
        target_value=np.zeros(0, dtype=np.float32),
        context={f"field_{i}": column_R for i, column_R in enumerate(context_FR)},
    )
    return CandidateSource(
        Histories.empty(log.space.num_users),
        FieldTable(log.space.num_users + 1),
        requests,
        Candidates(rows=Jagged(torch.from_numpy(item_R), torch.arange(num_rows + 1))),
        {"target": log.label_R[:num_rows]},
        batch_size=batch_size,
        max_history=1,
        only_chosen=False,
    )


class Timed:
    """A source whose batches are counted and timed from step `warm` on: what they cost to make is part of it."""

    def __init__(self, inner: CandidateSource, warm: int) -> None:
        self.inner, self.warm = inner, warm
        self.began, self.num_rows = 0.0, 0

    def steps_per_epoch(self) -> int:
        """See BatchSource."""
        return self.inner.steps_per_epoch()

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See BatchSource."""
        made = self.inner.batches(epoch, start)
        for step in range(start, self.steps_per_epoch()):
            if step == self.warm:
                self.began = time.perf_counter()
            batch = next(made)
            self.num_rows += batch.size if step >= self.warm else 0
            yield batch


def our_rate(log: Log, shape: Shape) -> float:
    """Rows per second of our training, from log rows to updated tables."""
    torch.manual_seed(0)
    model = dnn(log, shape)
    num_users = log.space.num_users
    view = View(histories=Histories.empty(num_users), space=log.space, users=FieldTable(num_users + 1), now=0)
    timed = Timed(source(log, shape.batch_size, shape.batch_size * (shape.warm + shape.steps)), shape.warm)
    config = TrainerConfig(epochs=1, batch_size=shape.batch_size, lr=LR, clip_norm=None, device="cpu")
    fit(model, view, lambda phase: timed, config=config, progress=False)
    return timed.num_rows / (time.perf_counter() - timed.began)


def check_same_loss(shape: Shape) -> float:
    """The largest difference of the losses of both forms with our weights, on smaller fields; asserted to be rounding."""
    small = replace(shape, fields=tuple(min(size, 1_000) for size in shape.fields))
    log = drawn(small, 256)
    torch.manual_seed(0)
    ours = dnn(log, small, rowwise_from=500)
    usual = Usual((*small.fields, small.num_users, small.num_items), small.dim)
    own = dict(ours.named_parameters())
    tables = [*(name for name in own if name.startswith("request.context_fields.maps")), "request.user_ids.rows.weight"]
    tables.append("items.ids.rows.weight")
    first, *others = [module for module in ours.head.modules() if isinstance(module, nn.Linear)]
    theirs = [module for module in usual.tower if isinstance(module, nn.Linear)]
    with torch.no_grad():
        for table, name in zip(usual.tables, tables, strict=True):
            table.weight.copy_(own[name])
        # Ours reads the mean of the past between the request's fields and the item: nothing, on rows without a past.
        split = (len(tables) - 1) * small.dim
        kept = [*range(split), *range(split + small.dim, first.in_features)]
        theirs[0].weight.copy_(first.weight[:, kept])
        for mine, other in zip(others, theirs[1:], strict=True):
            other.load_state_dict(mine.state_dict())
        ours.eval(), usual.eval()
        (batch,) = source(log, 256, 256).batches(0)
        columns = [batch.context[f"field_{i}"] for i in range(len(small.fields))]
        ids_BF = torch.stack([*columns, batch.user, batch.candidate_rows.values], dim=1)  # type: ignore[list-item]
        mine_loss = ours.losses(batch)["target"]
        other_loss = binary_cross_entropy_with_logits(usual(ids_BF), batch.labels["target"])
    gap = float((mine_loss - other_loss).abs())
    assert gap < 1e-5, f"the arms do not compute the same loss: {float(mine_loss)} and {float(other_loss)}"
    return gap


# -- the run -------------------------------------------------------------------------------------------------------


def measured(name: str, shape: Shape) -> dict[str, Any]:
    """All arms on one shape, one after another, as often as the shape says; medians."""
    check_same_loss(shape)
    log = drawn(shape, shape.batch_size * (shape.warm + shape.steps))
    arms: dict[str, Callable[[], float]] = {
        "usual": lambda: usual_rate(log, shape, fused=False),
        "usual, fused": lambda: usual_rate(log, shape, fused=True),
        "ours": lambda: our_rate(log, shape),
        "tower alone": lambda: tower_rate(shape),
    }
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(shape.rounds):
        for arm, run in arms.items():
            found[arm].append(run())
            gc.collect()
    rates = {arm: median(values) for arm, values in found.items()}
    for arm, rate in rates.items():
        print(f"  {name:8} {arm:14} {rate:12,.0f} rows/s {rate / rates['usual']:8.2f}x")
    return {
        "shape": name,
        "fields": len(shape.fields) + 2,
        "rows_of_tables": sum(shape.fields) + shape.num_users + shape.num_items,
        "dim": shape.dim,
        "batch_size": shape.batch_size,
        "rows_per_second": {arm: round(rate) for arm, rate in rates.items()},
        "times_faster": {arm: round(rate / rates["usual"], 2) for arm, rate in rates.items()},
    }


def main() -> None:
    """Run, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", choices=sorted(SHAPES), help="only this one")
    parser.add_argument(
        "--quick", action="store_true", help="small tables, few steps; nothing is written unless --out is given"
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    shapes = {name: shape for name, shape in SHAPES.items() if given.shape in (None, name)}
    if given.quick:
        shapes = {
            name: replace(
                shape, fields=tuple(min(size, 20_000) for size in shape.fields), batch_size=512, steps=3, rounds=1
            )
            for name, shape in shapes.items()
        }
    with machine_lock():
        table = [measured(name, shape) for name, shape in shapes.items()]
    figures = {"settings": {"threads": given.threads, "widths": WIDTHS}, "shapes": table, "bar": "ours >= 3x usual"}
    written = record(RESULT, figures, quick=given.quick, out=given.out)
    print(f"written to {written}" if written else "quick: nothing written")


if __name__ == "__main__":
    main()
