"""Time of a decision, alone and in a batch of 16, for every allocator beside the fixed chain; and of a price, beside the plain form.

    python benchmarks/allocation.py            # prints tables, writes benchmarks/results/allocation.json

Three stages, 12 and 100 chains, the features that calibration makes, default settings with exploration and floor; arms take turns, so
that a busy moment hits all of them. Prices: bisection over 100,000 requests with 10 chains, and the same steps with one row per request.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from shortlist.cascade.allocation import solver
from shortlist.cascade.allocation.base import Allocator, Budget, ChainSet, Float, Outcomes
from shortlist.cascade.allocation.contexts import CONTEXT_NAMES
from shortlist.cascade.allocation.saved import make_allocator
from shortlist.evaluation.benchmarks import record
from shortlist.evaluation.evidence import machine_lock

RESULT = Path(__file__).parent / "results" / "allocation.json"
F = len(CONTEXT_NAMES)
ALLOCATORS: dict[str, tuple[str, dict[str, Any]]] = {
    "fixed": ("fixed", {}),
    "mixture": ("mixture", {}),
    "dcaf": ("dcaf", {}),
    "queue-only": ("queue-only", {"reward": {"epochs": 1}}),
    "greenflow": ("greenflow", {"reward": {"epochs": 1}}),
    "greenflow, linear": ("greenflow", {"model": "linear"}),
    "greenflow, plain network": ("greenflow", {"model": "plain", "reward": {"epochs": 1}}),
}


def chain_set(num_chains: int) -> ChainSet:
    """So many chains out of all with one, two and three models and five counts per stage, spread over their costs."""
    rows = [
        (models, counts)
        for models in product(range(1), range(2), range(3))
        for counts in product((100, 200, 300, 500, 800), (50, 80, 120, 200, 300), (10, 20, 30, 50, 80))
        if counts[0] >= counts[1] >= counts[2]
    ]
    model_JK, count_JK = (np.array([row[i] for row in rows]) for i in range(2))
    mflop_J = 0.3 + (count_JK * np.array([0.002, 0.01, 0.1]) * (1 + model_JK)).sum(1)
    order = np.argsort(mflop_J, kind="stable")[np.linspace(0, len(rows) - 1, num_chains).round().astype(int)]
    return ChainSet(
        names=tuple(str(i) for i in range(len(rows))),
        stages=("retrieval", "pre-ranking", "ranking"),
        model_JK=model_JK,
        count_JK=count_JK,
        costs_JC=np.stack([mflop_J, 0.2 * mflop_J], 1),
    ).select(order)


def outcomes(chains: ChainSet, number: int) -> Outcomes:
    """Of any requests: what is timed does not depend on what was learned."""
    rng = np.random.default_rng(0)
    worth_R1 = rng.lognormal(size=(number, 1))
    return Outcomes(
        contexts_RF=rng.normal(size=(number, F)).astype(np.float32),
        rewards_RJ=worth_R1 * np.log1p(chains.costs_JC[:, 0] / worth_R1),
        users_R=np.arange(number),
        times_R=np.arange(number),
    )


def built(chains: ChainSet, past: Outcomes) -> dict[str, Allocator]:
    """Every allocator, fitted and aimed at the middle of the costs."""
    made = {}
    for arm, (name, settings) in ALLOCATORS.items():
        allocator = make_allocator(name, settings, chains, F)
        allocator.fit(past)
        allocator.aim(Budget(ms=float(np.median(chains.costs_JC[:, 1]))), past.contexts_RF)
        made[arm] = allocator
    return made


def decisions(num_chains: int, repeats: int, past_requests: int) -> list[dict[str, Any]]:
    """Microseconds of one call for one request, and per request of one call for 16."""
    chains = chain_set(num_chains)
    past = outcomes(chains, past_requests)
    arms = built(chains, past)
    batches = {"alone": past.contexts_RF[:1], "of_16": past.contexts_RF[:16]}
    took: dict[str, dict[str, list[float]]] = {arm: {name: [] for name in batches} for arm in arms}
    rng = np.random.default_rng(0)
    for repeat in range(repeats + 20):
        for arm, allocator in arms.items():
            for name, contexts_RF in batches.items():
                seconds = _seconds(lambda a=allocator, x=contexts_RF: a.choose(x, rng=rng))  # type: ignore[misc]
                if repeat >= 20:
                    took[arm][name].append(seconds * 1e6 / len(contexts_RF))
    return [
        {
            "arm": arm,
            "chains": num_chains,
            **{f"{name}_us": {"median": median(v), "p99": float(np.quantile(v, 0.99))} for name, v in times.items()},
        }
        for arm, times in took.items()
    ]


def plain_price(values_RJ: Float, costs_J: Float, budget: float) -> float:
    """Bisection as one writes it down: values minus paid, the best of each row, the mean cost."""
    low, high = 0.0, float(((values_RJ - values_RJ[:, :1])[:, 1:] / (costs_J[1:] - costs_J[0])).max()) * (1 + 1e-6)
    while high - low > solver.WIDTH * high:
        middle = 0.5 * (low + high)
        fits = costs_J[(values_RJ - middle * costs_J).argmax(1)].mean() <= budget
        low, high = (low, middle) if fits else (middle, high)
    return high


def prices(num_requests: int, num_chains: int, repeats: int) -> dict[str, Any]:
    """Seconds of both forms, which must agree, and of two resources and of filling."""
    rng = np.random.default_rng(0)
    values_RJ = rng.lognormal(0, 1, (num_requests, 1)) * np.sort(rng.random((num_requests, num_chains)), 1)
    costs_J = np.geomspace(1, 50, num_chains)
    two_JC, budget = np.stack([costs_J, costs_J**0.5], 1), np.array([12.0])
    exact = solver.solve(values_RJ, costs_J, budget).prices_C[0]
    np.testing.assert_allclose(plain_price(values_RJ, costs_J, 12.0), exact, rtol=1e-9)
    forms: dict[str, Callable[[], object]] = {
        "bisection": lambda: solver.solve(values_RJ, costs_J, budget),
        "bisection, plain": lambda: plain_price(values_RJ, costs_J, 12.0),
        "bisection, filled": lambda: solver.solve(values_RJ, costs_J, budget, fill=True),
        "two resources": lambda: solver.solve(values_RJ, two_JC, np.array([12.0, 3.1])),
    }
    took: dict[str, list[float]] = {form: [] for form in forms}
    for _ in range(repeats):
        for form, run in forms.items():
            took[form].append(_seconds(run))
    seconds = {form: {"low": min(v), "median": median(v), "high": max(v)} for form, v in took.items()}
    return {"requests": num_requests, "chains": num_chains, "seconds": seconds}


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    """Run, print tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="fewer repeats; nothing is written unless --out is given")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    repeats, past, requests, rounds = (30, 300, 10_000, 1) if args.quick else (args.repeats, 2_000, 100_000, 7)
    with machine_lock():
        arms = [row for num_chains in (12, 100) for row in decisions(num_chains, repeats, past)]
        price = prices(requests, 10, rounds)
    print(f"  {'':<26} chains   alone (p99)         of 16, per request (p99)")
    for row in arms:
        alone, of_16 = row["alone_us"], row["of_16_us"]
        print(
            f"  {row['arm']:<26} {row['chains']:>6} {alone['median']:7.1f} ({alone['p99']:.1f}) us  "
            f"{of_16['median']:7.1f} ({of_16['p99']:.1f}) us"
        )
    for form, seconds in price["seconds"].items():
        print(f"  {form:<26} {price['requests']:,} x {price['chains']}: {seconds['median']:.3f} s")
    settings = {"features": F, "repeats": repeats, "threads": args.threads}
    record(RESULT, {"settings": settings, "arms": arms, "prices": price}, quick=args.quick, out=args.out)


if __name__ == "__main__":
    main()
