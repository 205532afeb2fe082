"""What a request costs by the length of the past: rankers that search, with what they keep, beside attention to every event.

`shortlist prove sim_request_time`; needs no data. Weights are not trained: time does not depend on them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch

from shortlist.data.batches import Batch, request_batch
from shortlist.data.histories import Histories, Requests
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Categorical, FieldTable, Space
from shortlist.evaluation.evidence import Arm, Claim, Judgement, Lab
from shortlist.layers.scoring import HeadConfig
from shortlist.models.base import Ranker, Remembering, RequestShape
from shortlist.registry import find

LENGTHS = (200, 1_000, 10_000)
NUM_ITEMS, NUM_ATTRIBUTES, NUM_CANDIDATES = 20_000, 200, 100
FULL = "DIN, all events"
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "DIN, newest 50": ("din", {"max_history": 50, "widths": (64,)}),
    FULL: ("din", {"widths": (64,)}),
    "SIM hard": ("sim", {"search": "hard"}),
    "SIM soft": ("sim", {"search": "soft"}),
    "ETA": ("eta", {}),
    "SDIM": ("sdim", {}),
    "TWIN, 1 head": ("twin", {"num_heads": 1}),
    "TWIN, 2 heads": ("twin", {"num_heads": 2}),
    "MIMN": ("mimn", {}),
}
SLOPE, SPEED = 1.1, 3.0
FLAT = ("SDIM", "MIMN")

CLAIM = Claim(
    name="sim_request_time",
    systems=("sim", "eta", "sdim", "twin", "mimn", "din"),
    claim="With its table kept SDIM answers a request in the same time whatever the length of the past, and searches answer a long one "
    "several times faster than attention to every event.",
    data=f"random pasts of 200 to 10,000 events of {NUM_ITEMS:,} items in {NUM_ATTRIBUTES} attributes",
    protocol="One request of 100 candidates on one thread, width 32, one hidden layer of 64, 50 events found, 20 newest read whole. "
    "Median of 30 requests, arms in turn, item vectors and hashes kept. The user side apart from the candidates; of systems that "
    "remember, the user side with one new event since the last request.",
    bar=f"SDIM's candidates take at 10,000 events at most {SLOPE} x their time at 200; ETA and TWIN with one head take at 10,000 events in "
    f"all at most 1 / {SPEED:.0f} of DIN on all events",
    published={"training speed against DIN on 1,024 events (Cao et al. 2022)": {"ETA": 3.7, "SDIM": 11.4}},
)


def run(lab: Lab) -> None:
    """All arms take turns per length; each arm's figures are then kept."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        lengths = LENGTHS[:2] if lab.quick else LENGTHS
        rounds = 3 if lab.quick else 30
        found: dict[str, dict[str, float]] = {}

        def figures_of(name: str) -> dict[str, float]:
            if not found:
                found.update(timed(lengths, rounds))
            return found[name]

        for name in ARMS:
            lab.measure(name, 0, partial(figures_of, name))
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def timed(lengths: tuple[int, ...], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of user side and candidates by arm and length."""
    figures: dict[str, dict[str, float]] = {name: {} for name in ARMS}
    for length in lengths:
        batch, before = request_of(length), request_of(length, short_of=1)
        models = {name: model_of(name, length) for name in ARMS}
        jobs: dict[tuple[str, str], Callable[[], object]] = {}
        for name, model in models.items():
            state = model.user_state(batch)
            jobs[name, "user"] = partial(model.user_state, batch)
            jobs[name, "candidates"] = partial(model.score_candidates, state, batch.candidates)
            if isinstance(model, Remembering):
                _, memories = model.recall(before, [None])
                jobs[name, "remembered user"] = partial(model.recall, batch, memories)
        seconds: dict[tuple[str, str], list[float]] = {job: [] for job in jobs}
        for turn in range(rounds + 1):
            for job, work in jobs.items():
                # The slow recurrence once is enough.
                if job == ("MIMN", "user") and turn > 2:
                    continue
                began = time.perf_counter()
                work()
                if turn:
                    seconds[job].append(time.perf_counter() - began)
        for (name, what), times in seconds.items():
            figures[name][f"{what} ms, {length:,}"] = 1e3 * median(times)
        for name, model in models.items():
            shape = RequestShape(num_history=length, num_candidates=NUM_CANDIDATES, num_items=NUM_ITEMS)
            figures[name][f"cost:mflop, {length:,}"] = model.cost(shape).flops(NUM_CANDIDATES) / 1e6
            cached = model.cost(shape, cached=True).flops(NUM_CANDIDATES) / 1e6
            figures[name][f"cost:mflop cached, {length:,}"] = cached
    return figures


def model_of(name: str, length: int) -> Ranker:
    """An untrained ranker over the attributed items, which reads so many events."""
    system, settings = ARMS[name]
    entry = find(system)
    base: dict[str, Any] = {"dim": 32, "max_history": length}
    if system != "din":
        base["head"] = HeadConfig(widths=(64,))
    torch.manual_seed(0)
    model: Ranker = entry.cls(entry.config({**base, **settings}), space())
    return model.eval()


def space() -> Space:
    """Items with one attribute."""
    attribute_N = torch.randint(1, NUM_ATTRIBUTES + 1, (NUM_ITEMS + 1,), generator=torch.Generator().manual_seed(0))
    items = FieldTable(NUM_ITEMS + 1, (Categorical(name="shelf", size=NUM_ATTRIBUTES),), {"shelf": attribute_N})
    return Space(items=items, known_items=torch.arange(NUM_ITEMS + 1) > 0, num_users=1)


def request_of(length: int, short_of: int = 0) -> Batch:
    """One request after `length` events, less the newest few, with 100 candidates."""
    rng = np.random.default_rng(length)
    item, clock = rng.integers(1, NUM_ITEMS + 1, length), np.arange(length) * 3_600
    ones, none = np.ones(length, dtype=np.int64), np.zeros(0, dtype=np.int64)
    histories = Histories(
        offsets=np.array([0, 0, length]), item=item, time=clock, group=clock, action=ones, value=ones.astype(np.float32)
    )
    requests = Requests(
        user=np.array([1]),
        time=np.array([length * 3_600]),
        start=np.array([0]),
        end=np.array([length - short_of]),
        target_offsets=np.zeros(2, dtype=np.int64),
        target=none,
        target_value=none.astype(np.float32),
    )
    batch = request_batch(histories, FieldTable(2), requests, max_history=length)
    rows = torch.from_numpy(rng.integers(1, NUM_ITEMS + 1, NUM_CANDIDATES))
    return batch.with_candidates(Jagged(rows, torch.tensor([0, NUM_CANDIDATES])))


def judge(arms: Mapping[str, Arm]) -> Judgement:
    """The bar at the longest past that was timed."""
    ms = {name: {metric: interval.mean for metric, interval in arm.metrics.items()} for name, arm in arms.items()}
    longest = max(LENGTHS, key=lambda n: f"user ms, {n:,}" in ms[FULL] and n)
    end, begin = f"{longest:,}", f"{LENGTHS[0]:,}"
    whole = {name: f[f"user ms, {end}"] + f[f"candidates ms, {end}"] for name, f in ms.items()}
    slope = ms["SDIM"][f"candidates ms, {end}"] / ms["SDIM"][f"candidates ms, {begin}"]
    failures = [] if slope <= SLOPE else [f"SDIM's candidates take {slope:.2f} x as long at {end} events"]
    for name in ("ETA", "TWIN, 1 head"):
        if whole[name] * SPEED > whole[FULL]:
            failures.append(f"{name} is only {whole[FULL] / whole[name]:.1f} x as fast as DIN on all {end} events")
    told = ", ".join(f"{name} {ms_in_all:.1f}" for name, ms_in_all in whole.items())
    kept = ", ".join(
        f"{name} {ms[name][f'remembered user ms, {end}'] + ms[name][f'candidates ms, {end}']:.1f}" for name in FLAT
    )
    return Judgement(
        "fails" if failures else "holds",
        ". ".join(
            [
                *failures,
                f"Milliseconds of a request at {end} events: {told}",
                f"with memories and one new event: {kept}",
                f"SDIM's candidates at {end} against {begin} events: {slope:.2f} x",
            ]
        )
        + ".",
    )
