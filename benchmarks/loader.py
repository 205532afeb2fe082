"""Training a small DNN on live batches, beside the same batches built beforehand, and beside batches built one request at a time.

    python benchmarks/loader.py [--events 2000000] [--quick] [--no-wait] [--out benchmarks/results/loader.json]

The model is small, so that the loader is most of the work. Arms take turns in blocks of the same batches, each block in another order, so
that neither a busy moment nor a warm cache favours one of them:
    frozen    the step alone, on batches that are there already
    live      `CandidateSource` builds the batch, then the step
    plain     the usual way: every request cut out of the histories in a Python loop and stacked; the same batch, then the step

Before anything counts, `plain` must have given the same tensors as `live`. Speeds are medians over the blocks of the ratio to frozen.
Goal: live at 95 % of the speed of frozen or more. B requests per batch.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import fields, is_dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shortlist.data.batches import Batch, Candidates, History
from shortlist.data.dataset import Dataset, build_dataset
from shortlist.data.jagged import Jagged
from shortlist.data.log import read
from shortlist.data.schema import Column, Numeric
from shortlist.evaluation.benchmarks import record
from shortlist.evaluation.evidence import machine_lock
from shortlist.models.ranking.dnn import DNN, DNNConfig
from shortlist.training.config import TrainerConfig
from shortlist.training.optimisers import build_optimisers
from shortlist.training.sources import CandidateSource, _epoch_order

sys.path.insert(0, str(Path(__file__).parent))
from generated_log import LogShape, frames

RESULT = Path(__file__).parent / "results" / "loader.json"
GOAL = 0.95
ARMS = ("frozen", "live", "plain")
BATCH, HISTORY, SHOWN, BLOCK = 512, 50, 20, 8


def lessons(num_events: int) -> tuple[Dataset, CandidateSource]:
    """A generated log, and its past requests with the first target and random items as candidates."""
    made = frames(
        LogShape(events=num_events, users=max(num_events // 12, 10), items=min(20_000, num_events // 10), categories=50)
    )
    dataset = build_dataset(read(made.events, items=made.items, users=made.users))
    view, requests = dataset.view(), dataset.past_requests(max_per_user=5)
    rng = np.random.default_rng(0)
    rows = rng.integers(1, dataset.num_items + 1, (len(requests), SHOWN))
    rows[:, 0] = requests.target[requests.target_offsets[:-1]]
    labels = torch.zeros(rows.shape)
    labels[:, 0] = 1.0
    lengths = torch.full((len(requests),), SHOWN)
    pair = {"score": torch.from_numpy(rng.normal(size=rows.size).astype(np.float32))}
    candidates = Candidates(rows=Jagged.from_lengths(torch.from_numpy(rows).flatten(), lengths), pair=pair)
    source = CandidateSource(
        view.histories,
        view.users,
        requests,
        candidates,
        {"target": labels.flatten()},
        batch_size=BATCH,
        max_history=HISTORY,
    )
    return dataset, source


def plain_batch(source: CandidateSource, chosen: list[int]) -> Batch:
    """One request at a time, then stacked: what a map-style data set with a collate function does."""
    histories, requests, users = source.histories, source.requests, source.users
    events: dict[str, list[Tensor]] = {name: [] for name in ("item", "time", "action", "value", "group")}
    shown: dict[str, list[Tensor]] = {name: [] for name in ("rows", "label", "score")}
    user: dict[str, list[Tensor]] = {name: [] for name in users.columns}
    for r in chosen:
        end = int(requests.end[r])
        start = max(int(requests.start[r]), end - HISTORY)
        for name, pieces in events.items():
            pieces.append(torch.from_numpy(getattr(histories, name)[start:end].copy()))
        a, b = int(source.candidates.offsets[r]), int(source.candidates.offsets[r + 1])
        shown["rows"].append(source.candidates.values[a:b])
        shown["label"].append(source.labels["target"][a:b])
        shown["score"].append(source.pair["score"][a:b])
        for name, column in users.columns.items():
            assert isinstance(column, Tensor), "the generated users have no lists"
            user[name].append(column[int(requests.user[r])])
    cut = torch.tensor([len(piece) for piece in events["item"]])
    joined = {name: torch.cat(pieces) for name, pieces in {**events, **shown}.items()}
    user_fields: dict[str, Column] = {name: torch.stack(values) for name, values in user.items()}
    context: dict[str, Column] = {
        name: torch.tensor([column[r] for r in chosen]) for name, column in requests.context.items()
    }
    return Batch(
        user=torch.tensor([int(requests.user[r]) for r in chosen]),
        time=torch.tensor([int(requests.time[r]) for r in chosen]),
        history=History(
            items=Jagged.from_lengths(joined["item"], cut),
            time=joined["time"],
            action=joined["action"],
            value=joined["value"],
            group=joined["group"],
        ),
        user_fields=user_fields,
        context=context,
        candidates=Candidates(
            rows=Jagged.from_lengths(joined["rows"], torch.tensor([len(piece) for piece in shown["rows"]])),
            pair={"score": joined["score"]},
        ),
        labels={"target": joined["label"]},
    )


def same(ours: object, theirs: object) -> bool:
    """Whether two batches, or parts of them, hold the same tensors."""
    if isinstance(ours, Tensor):
        return isinstance(theirs, Tensor) and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, Mapping):
        return (
            isinstance(theirs, Mapping) and ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in ours)
        )
    if is_dataclass(ours):
        return type(ours) is type(theirs) and all(
            same(getattr(ours, f.name), getattr(theirs, f.name)) for f in fields(ours)
        )
    return ours is theirs


def measure(
    source: CandidateSource, model: DNN, num_batches: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of the clock per block and arm."""
    optimisers = build_optimisers(model, TrainerConfig(), list(model.parameters()))

    def step(batch: Batch) -> None:
        loss = torch.stack(list(model.losses(batch).values())).sum()
        model.zero_grad(set_to_none=True)
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()

    def timed(batches: Iterator[Batch]) -> float:
        began = clock()
        for batch in islice(batches, BLOCK):
            step(batch)
        return clock() - began

    order = source.kept[_epoch_order(len(source.kept), BATCH, source.seed, 0, None)]
    rows = [order[at : at + BATCH].tolist() for at in range(0, len(order), BATCH)]
    arms = {"live": source.batches(0), "plain": (plain_batch(source, chosen) for chosen in rows)}
    ready = source.batches(0)
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    for block in range(num_batches // BLOCK + 1):
        frozen = list(islice(ready, BLOCK))
        if block == 0:  # to warm up, and to be sure that all arms train on the same
            for batches in arms.values():
                built = list(islice(batches, BLOCK))
                assert all(same(ours, theirs) for ours, theirs in zip(frozen, built, strict=True))
            timed(iter(frozen))
            continue
        for name in (ARMS[(block + i) % len(ARMS)] for i in range(len(ARMS))):
            seconds[name].append(timed(arms[name] if name in arms else iter(frozen)))
    return seconds


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=2_000_000)
    parser.add_argument("--batches", type=int, default=240)
    parser.add_argument(
        "--quick", action="store_true", help="100,000 events, 24 batches; nothing is written unless --out is given"
    )
    parser.add_argument("--no-wait", action="store_true", help="do not wait for another measurement to end")
    parser.add_argument(
        "--cpu", action="store_true", help="CPU seconds of the process instead of the wall's, for a busy machine"
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    num_events, num_batches = (100_000, 24) if given.quick else (given.events, given.batches)
    torch.manual_seed(0)
    dataset, source = lessons(num_events)
    if source.steps_per_epoch() < num_batches + BLOCK:
        raise SystemExit(
            f"{num_events:,} events give {source.steps_per_epoch()} batches; ask for more events or fewer batches"
        )
    space = replace(dataset.view().space, pair_fields=(Numeric(name="score"),))
    model = DNN(DNNConfig(dim=8, widths=(32,), max_history=HISTORY), space)
    model.prepare(dataset.view())
    model.train()
    load = os.getloadavg()[0]
    with nullcontext() if given.no_wait or given.quick else machine_lock():
        seconds = measure(source, model, num_batches, time.process_time if given.cpu else time.perf_counter)
    per_batch = {name: float(np.median(blocks)) / BLOCK for name, blocks in seconds.items()}
    speed = {name: float(np.median(np.divide(seconds["frozen"], seconds[name]))) for name in ("live", "plain")}
    for name, value in per_batch.items():
        print(
            f"{name:7} {1e3 * value:8.2f} ms per batch of {BATCH}  {speed.get(name, 1.0):7.1%} of the speed of frozen batches"
        )
    figures = {
        "events": num_events, "batches": num_batches, "batch_size": BATCH, "load_before": load,
        "clock": "cpu" if given.cpu else "wall", "seconds_per_batch": per_batch, "speed_to_frozen": speed, "goal": GOAL,
        "goal_met": speed["live"] >= GOAL, "threads": torch.get_num_threads(),
    }  # fmt: skip
    record(RESULT, figures, quick=given.quick, out=given.out)


if __name__ == "__main__":
    main()
