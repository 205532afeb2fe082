"""Time and memory from a generated log to a data set, beside the least pandas must do for the same arrays, in one run.

    python benchmarks/build_dataset.py [--events 5000000] [--quick] [--out benchmarks/results/build_dataset.json]

Each arm runs in a process of its own, so that its peak memory is its own. The pandas arm only numbers ids and sorts by user and time: it
infers no fields, makes no split and no requests.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

RESULT = Path(__file__).parent / "results" / "build_dataset.json"
ARMS = ("shortlist", "pandas")


def generate(path: Path, num_events: int, seed: int = 0) -> None:
    """A Parquet log: text ids with heavy tails, a year of seconds, a country per user, a category per item, a device per event."""
    rng = np.random.default_rng(seed)
    user = rng.zipf(1.3, num_events) % (num_events // 12)
    item = rng.zipf(1.2, num_events) % 100_000
    pl.DataFrame({
        "user_id": pl.Series(user).cast(pl.String) + "u",
        "item_id": pl.Series(item).cast(pl.String) + "i",
        "timestamp": rng.integers(1_600_000_000, 1_630_000_000, num_events),
        "country": pl.Series(user % 30).cast(pl.String),
        "category": item % 50,
        "device": rng.integers(0, 4, num_events),
    }).write_parquet(path)  # fmt: skip


def run_shortlist(path: Path) -> dict[str, float]:
    """Seconds per step of the whole way: read with checks, then cut, number, infer, encode, ask."""
    from shortlist.data.dataset import build_dataset
    from shortlist.data.log import read

    began = time.perf_counter()
    log = read(path)
    after_read = time.perf_counter()
    dataset = build_dataset(log)
    built = time.perf_counter()
    dataset.view()
    viewed = time.perf_counter()
    dataset.past_requests(max_per_user=5)
    asked = time.perf_counter()
    return {
        "read": after_read - began, "build": built - after_read, "view": viewed - built, "past_requests": asked - viewed,
        "total": built - began,
    }  # fmt: skip


def run_pandas(path: Path) -> dict[str, float]:
    """Seconds to read, number the ids and sort by user and time."""
    import pandas as pd

    began = time.perf_counter()
    frame = pd.read_parquet(path)
    after_read = time.perf_counter()
    frame["user"], _ = pd.factorize(frame["user_id"], sort=True)
    frame["item"], _ = pd.factorize(frame["item_id"], sort=True)
    ordered = frame.sort_values(["user", "timestamp"], kind="stable")
    ordered.groupby("user").size().cumsum().to_numpy()
    built = time.perf_counter()
    return {"read": after_read - began, "build": built - after_read, "total": built - began}


def measure(arm: str, path: Path) -> dict[str, float]:
    """Run one arm in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--arm", arm, "--log", str(path)], capture_output=True, text=True, check=True
    )
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Measure both arms and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=5_000_000)
    parser.add_argument("--quick", action="store_true", help="100,000 events; nothing is written unless --out is given")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        figures = run_shortlist(given.log) if given.arm == "shortlist" else run_pandas(given.log)
        figures["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(figures))
        return

    from shortlist.evaluation.benchmarks import record
    from shortlist.evaluation.evidence import machine_lock

    num_events = 100_000 if given.quick else given.events
    with tempfile.TemporaryDirectory() as folder, machine_lock():
        path = Path(folder) / "log.parquet"
        generate(path, num_events)
        arms = {arm: measure(arm, path) for arm in ARMS}
    for arm, figures in arms.items():
        print(f"{arm:10} " + "  ".join(f"{name} {value:.2f}" for name, value in figures.items()))
    record(RESULT, {"events": num_events, "seconds_by_arm": arms}, quick=given.quick, out=given.out)


if __name__ == "__main__":
    main()
