"""CAN's co-action units: all pairs, powers and past items in one product per layer, beside a loop over pairs, in one run.

    python benchmarks/co_action.py            # prints a table, writes benchmarks/results/co_action.json

Both arms give the same numbers, checked before anything is timed; they take turns, so that a busy moment hits both.

t candidates, M pairs, S past items, C orders, d width of a feed, P parameters of a micro network.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from shortlist.evaluation.benchmarks import record
from shortlist.evaluation.evidence import machine_lock
from shortlist.layers.co_action import CoAction, CoActionConfig, powers

RESULT = Path(__file__).parent / "results" / "co_action.json"


def looped(unit: CoAction, weight_tMP: Tensor, feed_tMSd: Tensor, is_real_tMS: Tensor) -> Tensor:
    """One pair and one order at a time, as one would write it first."""
    config = unit.config
    outputs = []
    for m in range(weight_tMP.shape[1]):
        by_order = []
        for order in range(1, config.orders + 1):
            hidden, at, made = feed_tMSd[:, m] ** order, 0, []
            sizes = list(pairwise((config.feed_dim, *config.widths)))
            for number, (before, after) in enumerate(sizes):
                matrix = weight_tMP[:, m, at : at + before * after].view(-1, before, after)
                at += before * after
                hidden = hidden @ matrix
                if number < len(sizes) - 1:
                    hidden = torch.tanh(hidden)
                made.append(hidden)
            by_order.append((torch.cat(made, 2) * is_real_tMS[:, m, :, None]).sum(1))
        outputs.append(torch.cat(by_order, 1))
    return torch.stack(outputs, 1)


def timed_ms(run: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    started = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - started)


@torch.no_grad()
def measure(num_candidates: int, num_pairs: int, lengths: tuple[int, ...], repeats: int) -> list[dict[str, object]]:
    """Both arms at every length of the past."""
    generator = torch.Generator().manual_seed(0)
    unit, rows = CoAction(CoActionConfig()), []
    for length in lengths:
        weight = torch.randn(num_candidates, num_pairs, unit.config.induction_width, generator=generator) * 0.1
        feed = torch.randn(num_candidates, num_pairs, length, unit.config.feed_dim, generator=generator)
        real = torch.rand(num_candidates, num_pairs, length, generator=generator) < 0.8
        arms: dict[str, Callable[[], Tensor]] = {
            "together": lambda w=weight, f=feed, r=real: unit(w, powers(f, unit.config.orders), r),  # type: ignore[misc]
            "pair by pair": lambda w=weight, f=feed, r=real: looped(unit, w, f, r),  # type: ignore[misc]
        }
        torch.testing.assert_close(arms["together"](), arms["pair by pair"](), rtol=1e-4, atol=1e-5)
        spent: dict[str, list[float]] = {name: [] for name in arms}
        for repeat in range(repeats + 2):
            for name, arm in arms.items():
                taken = timed_ms(arm)
                if repeat >= 2:  # the first two fill the caches
                    spent[name].append(taken)
        rows += [
            {"arm": name, "length": length, "ms": {"low": min(ms), "median": median(ms), "high": max(ms)}}
            for name, ms in spent.items()
        ]
    return rows


def main() -> None:
    """Run, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--quick", action="store_true", help="small, 3 rounds; nothing is written unless --out is given"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    num_candidates, num_pairs, lengths, repeats = (
        (32, 2, (5, 10), 3) if args.quick else (256, 8, (1, 10, 50), args.repeats)
    )
    load = os.getloadavg()[0]
    with machine_lock():
        arms = measure(num_candidates, num_pairs, lengths, repeats)
    for arm in arms:
        print(f"  {arm['arm']:<14} past of {arm['length']:>3}: {arm['ms']['median']:8.2f} ms")  # type: ignore[index]
    settings = {"candidates": num_candidates, "pairs": num_pairs, "repeats": repeats, "threads": args.threads}
    record(RESULT, {"settings": settings, "load_before": load, "arms": arms}, quick=args.quick, out=args.out)


if __name__ == "__main__":
    main()
