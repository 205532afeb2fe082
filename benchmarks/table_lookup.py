"""Look-ups and training steps of small embedding tables beside a row per id, and beside the plain sum of looked-up rows.

    python benchmarks/table_lookup.py            # prints a table, writes benchmarks/results/table_lookup.json

2^20 ids, 4,096 requests of 20 ids each, by Zipf. BH in 1, 2, 4 and 10 blocks, the hashing trick and two summed hashes; every form in
turn, so that a busy moment hits all of them. "plain" looks up all rows of an id and adds them in a second pass.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from shortlist.embeddings.base import Table, TableChoice, make_table
from shortlist.embeddings.bh import BHConfig, BHTable
from shortlist.embeddings.hashed import HashedConfig
from shortlist.embeddings.multi_hash import MultiHashConfig
from shortlist.evaluation.benchmarks import record
from shortlist.evaluation.evidence import machine_lock

RESULT = Path(__file__).parent / "results" / "table_lookup.json"
Form = Callable[[Tensor], Tensor]


def choices(num_ids: int) -> dict[str, TableChoice]:
    """Tables by name; BH with so many blocks of as many bits each."""
    bits = (num_ids - 1).bit_length()
    rows = {blocks: blocks << math.ceil(bits / blocks) for blocks in (1, 2, 4, 10)}
    return {
        "a row per id": TableChoice(),
        "hashing trick": HashedConfig(compression=num_ids / rows[2]),
        "two hashes": MultiHashConfig(compression=num_ids / rows[2]),
        **{f"BH, {blocks} blocks": BHConfig(compression=num_ids / rows[blocks]) for blocks in rows},
    }


def plain(table: BHTable) -> Form:
    """The same vectors in two passes."""
    return lambda ids: table.rows(table.codes(ids)).sum(-2)


def timed_ms(run: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    began = time.perf_counter()
    run()
    return (time.perf_counter() - began) * 1e3


def measure(num_ids: int, num_requests: int, dim: int, repeats: int) -> list[dict[str, object]]:
    """Every form: milliseconds of a look-up without gradients and of one with backward, and bytes."""
    generator = torch.Generator().manual_seed(0)
    share = torch.arange(1, num_ids + 1, dtype=torch.float64) ** -1.1
    draws = torch.searchsorted(
        (share / share.sum()).cumsum(0), torch.rand(num_requests * 20, generator=generator).double()
    )
    ids = 1 + torch.randperm(num_ids, generator=generator)[draws.clamp(max=num_ids - 1)].view(num_requests, 20)
    tables: dict[str, Table] = {name: make_table(num_ids + 1, dim, choice) for name, choice in choices(num_ids).items()}
    forms: dict[str, tuple[Table, Form]] = {name: (table, table) for name, table in tables.items()}
    for name, table in tables.items():
        if isinstance(table, BHTable) and len(table.blocks) > 1:
            forms[f"{name}, plain"] = (table, plain(table))
            torch.testing.assert_close(forms[f"{name}, plain"][1](ids), table(ids))
    look: dict[str, list[float]] = {name: [] for name in forms}
    learn: dict[str, list[float]] = {name: [] for name in forms}
    for repeat in range(repeats + 2):
        for name, (table, form) in forms.items():
            table.zero_grad()
            with torch.no_grad():
                looked = timed_ms(lambda form=form: form(ids))  # type: ignore[misc]
            learned = timed_ms(lambda form=form: form(ids).sum().backward())  # type: ignore[misc]
            if repeat >= 2:  # the first two fill the caches
                look[name].append(looked)
                learn[name].append(learned)
    single = min(look["a row per id"])
    return [
        {
            "arm": name,
            "blocks": len(table.blocks) if isinstance(table, BHTable) else None,
            "lookup_ms": {"low": min(look[name]), "median": median(look[name]), "high": max(look[name])},
            "step_ms": {"low": min(learn[name]), "median": median(learn[name]), "high": max(learn[name])},
            "times_a_single_lookup": min(look[name]) / single,
            "bytes": table.bytes(),
        }
        for name, (table, _) in forms.items()
    ]


def main() -> None:
    """Run, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--quick", action="store_true", help="2^14 ids, 3 rounds; nothing is written unless --out is given"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    num_ids, num_requests, repeats = (1 << 14, 64, 3) if args.quick else (1 << 20, 4_096, args.repeats)
    load = os.getloadavg()[0]
    with machine_lock():
        arms = measure(num_ids, num_requests, args.dim, repeats)
    for arm in arms:
        print(f"  {arm['arm']:<24} {arm['lookup_ms']['low']:8.2f} ms {arm['times_a_single_lookup']:6.2f} x  "  # type: ignore[index]
              f"step {arm['step_ms']['low']:8.2f} ms  {arm['bytes'] / 1e6:8.3f} MB")  # type: ignore[index,operator]  # fmt: skip
    settings = {"ids": num_ids, "requests": num_requests, "dim": args.dim, "repeats": repeats, "threads": args.threads}
    record(RESULT, {"settings": settings, "load_before": load, "arms": arms}, quick=args.quick, out=args.out)


if __name__ == "__main__":
    main()
