"""Time of one training step of an embedding table: row-wise sparse rules beside dense Adam, in the same run.

    python benchmarks/sparse_step.py [--rows 1000000] [--dim 16] [--ids 4096] [--repeats 31] [--threads 1] [--quick] [--out FILE]

A step is: read the rows of a batch of skewed ids, backward, update. The arms take turns, so that a disturbance meets all of them, and
are compared by their fastest step, which other work on the machine disturbs least; the load is recorded.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shortlist.evaluation.benchmarks import record
from shortlist.evaluation.evidence import machine_lock
from shortlist.training.optimisers import RowwiseAdagrad, RowwiseAdam

RESULT = Path(__file__).parent / "results" / "sparse_step.json"
Rule = Callable[[list[nn.Parameter]], Optimizer]
ARMS: dict[str, tuple[bool, Rule]] = {
    "dense Adam": (False, lambda p: torch.optim.Adam(p, lr=1e-3)),
    "dense Adam, fused": (False, lambda p: torch.optim.Adam(p, lr=1e-3, fused=True)),
    "torch SparseAdam": (True, lambda p: torch.optim.SparseAdam(p, lr=1e-3)),
    "row-wise Adam": (True, lambda p: RowwiseAdam(p, lr=1e-3)),
    "row-wise Adagrad": (True, lambda p: RowwiseAdagrad(p, lr=1e-3)),
}


def one_step(table: nn.Embedding, optimiser: Optimizer, ids: Tensor) -> float:
    """Milliseconds of one step."""
    began_at = time.perf_counter()
    optimiser.zero_grad(set_to_none=True)
    table(ids).square().sum().backward()
    optimiser.step()
    return 1e3 * (time.perf_counter() - began_at)


def skewed_ids(num_ids: int, num_rows: int, generator: torch.Generator) -> Tensor:
    """int64 [num_ids], log-uniform over the rows: a few ids are frequent, most are rare."""
    uniform = torch.rand(num_ids, generator=generator, dtype=torch.float64)
    return (num_rows**uniform).long() - 1


def measure(num_rows: int, dim: int, num_ids: int, repeats: int) -> list[dict[str, object]]:
    """One record per arm: fastest, median and slowest step in ms, and bytes of optimiser state."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    setups = {}
    for name, (sparse, rule) in ARMS.items():
        table = nn.Embedding(num_rows, dim, sparse=sparse)
        setups[name] = (table, rule(list(table.parameters())))
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    for repeat in range(repeats + 2):
        ids = skewed_ids(num_ids, num_rows, generator)
        for name, (table, optimiser) in setups.items():
            spent_ms = one_step(table, optimiser, ids)
            if repeat >= 2:  # the first two make the state and fill the caches
                times[name].append(spent_ms)
    baseline = min(times["dense Adam"])
    records: list[dict[str, object]] = []
    for name, (_, optimiser) in setups.items():
        tensors = [v for state in optimiser.state.values() for v in state.values() if isinstance(v, Tensor)]
        records.append(
            {
                "arm": name,
                "step_ms": {"low": min(times[name]), "median": median(times[name]), "high": max(times[name])},
                "times_faster_than_dense_adam": baseline / min(times[name]),
                "state_bytes": sum(t.numel() * t.element_size() for t in tensors),
            }
        )
    return records


def main() -> None:
    """Run, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--ids", type=int, default=4_096)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--quick", action="store_true", help="20,000 rows, 3 steps; nothing is written unless --out is given"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, repeats = (20_000, 3) if args.quick else (args.rows, args.repeats)
    load = os.getloadavg()[0]
    sizes = {}
    for num_rows in (rows // 10, rows):
        with machine_lock():
            sizes[str(num_rows)] = records = measure(num_rows, args.dim, args.ids, repeats)
        print(
            f"{num_rows:,} rows x {args.dim}, {args.ids:,} ids per step, {args.threads} thread(s), fastest of {repeats} steps"
        )
        for r in records:
            print(f"  {r['arm']:<20} {r['step_ms']['low']:9.2f} ms {r['times_faster_than_dense_adam']:8.1f} x"
                  f" {r['state_bytes'] / 1e6:9.1f} MB of state")  # fmt: skip
    settings = {"dim": args.dim, "ids": args.ids, "repeats": repeats, "threads": args.threads}
    record(RESULT, {"settings": settings, "load_before": load, "rows": sizes}, quick=args.quick, out=args.out)


if __name__ == "__main__":
    main()
