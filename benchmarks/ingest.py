"""Events per second and peak memory from a file to a data set, out of core and in memory, by id type, beside plain pandas.

    python benchmarks/ingest.py [--events 20000000] [--quick] [--no-wait] [--out benchmarks/results/ingest.json]

Arms, each in a process of its own:
    ingest         `shortlist.data.ingest`: out of core, Parquet to events, memory-mapped histories and vocabularies
    memory         `read` and `encode_events`: all of the log in memory, with its checks
    pandas         read, factorize both ids, sort by user and time, np.save: the least that gives comparable arrays
    ingest-build   `build_dataset` on what the first arm wrote: what `train` then does
    memory-build   `read` and `build_dataset`: what `train` does without it

Memory is what the process holds of its own at its highest, less what it holds after its imports, stated in bytes and in multiples of
one int64 column of the log. Goals on 2 idle cores, for the first arm: integer ids 1 M events/s, text ids 0.5 M events/s.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import polars as pl

RESULT = Path(__file__).parent / "results" / "ingest.json"
ARMS = ("ingest", "memory", "pandas", "ingest-build", "memory-build")
KINDS = ("integer", "text")
GOAL = {"integer": 1e6, "text": 0.5e6}
COLUMN_BYTES = 8


def generate(path: Path, num_events: int, kind: str, seed: int = 0) -> None:
    """user, item, second and action of every event in time order, users and items with heavy tails, written in row groups."""
    rng = np.random.default_rng(seed)
    user = rng.zipf(1.3, num_events) % max(num_events // 12, 2)
    item = rng.zipf(1.2, num_events) % 100_000
    ids = {"user_id": pl.Series(user), "item_id": pl.Series(item)}
    if kind == "text":
        ids = {"user_id": ids["user_id"].cast(pl.String) + "u", "item_id": ids["item_id"].cast(pl.String) + "i"}
    time_s = np.sort(rng.integers(1_600_000_000, 1_630_000_000, num_events))
    action = pl.Series(["view", "cart", "buy"]).gather(rng.choice(3, num_events, p=[0.8, 0.13, 0.07]))
    pl.DataFrame({**ids, "timestamp": time_s, "action": action}).write_parquet(path, row_group_size=500_000)


def run_ingest(path: Path, folder: Path) -> int:
    """Out of core."""
    from shortlist.data.ingest import ingest

    return ingest(path, path.with_suffix(".folder")).histories.num_events


def run_ingest_build(path: Path, folder: Path) -> int:
    """What is cut and encoded from the folder that the first arm wrote."""
    from shortlist.data.dataset import build_dataset
    from shortlist.data.ingested import Ingested

    return build_dataset(Ingested.load(path.with_suffix(".folder"))).histories.num_events


def run_memory_build(path: Path, folder: Path) -> int:
    """The same from the file."""
    from shortlist.data.dataset import build_dataset
    from shortlist.data.log import read

    return build_dataset(read(path)).histories.num_events


def run_memory(path: Path, folder: Path) -> int:
    """All at once, saved as the other arms do."""
    from shortlist.data.encode import encode_events
    from shortlist.data.log import read
    from shortlist.data.vocabulary import Vocabulary

    log = read(path)
    items, users = Vocabulary.build(log.events["item_id"]), Vocabulary.build(log.events["user_id"])
    histories = encode_events(log, items, users).histories
    histories.save(folder / "histories")
    items.save(folder / "items.parquet")
    users.save(folder / "users.parquet")
    return histories.num_events


def run_pandas(path: Path, folder: Path) -> int:
    """No checks, no groups."""
    import pandas as pd

    frame = pd.read_parquet(path)
    frame["user"], users = pd.factorize(frame["user_id"], sort=True)
    frame["item"], items = pd.factorize(frame["item_id"], sort=True)
    frame["act"], _ = pd.factorize(frame["action"], sort=True)
    ordered = frame.sort_values(["user", "timestamp"], kind="stable")
    np.save(folder / "offsets.npy", ordered.groupby("user").size().cumsum().to_numpy())
    for name in ("item", "timestamp", "act"):
        np.save(folder / f"{name}.npy", ordered[name].to_numpy())
    for name, ids in (("users", users), ("items", items)):
        pd.DataFrame({"id": ids}).to_parquet(folder / f"{name}.parquet")
    return len(ordered)


class PeakMemory:
    """The most that this process holds of its own (RssAnon), looked at every few milliseconds: memory maps of files do not count."""

    def __init__(self) -> None:
        self.start = self.peak = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @staticmethod
    def _now() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("/proc/self/status has no RssAnon; this benchmark runs on Linux")

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, self._now())

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def work(arm: str, path: Path) -> dict[str, float]:
    """One arm in this process."""
    import importlib

    runs = {
        "ingest": run_ingest, "memory": run_memory, "pandas": run_pandas, "ingest-build": run_ingest_build,
        "memory-build": run_memory_build,
    }  # fmt: skip
    for module in ("pandas",) if arm == "pandas" else ("shortlist.data.ingest", "shortlist.data.dataset"):
        importlib.import_module(module)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, PeakMemory() as memory:
        began, began_cpu = time.perf_counter(), time.process_time()
        events = runs[arm](path, Path(folder))
        seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    added = memory.peak - memory.start
    return {
        "seconds": seconds, "cpu_seconds": cpu, "events_per_s": events / seconds, "events_per_cpu_s": events / cpu,
        "peak_bytes": added, "peak_columns": added / (COLUMN_BYTES * events),
    }  # fmt: skip


def main() -> None:
    """Measure all arms and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=20_000_000)
    parser.add_argument("--quick", action="store_true", help="300,000 events; nothing is written unless --out is given")
    parser.add_argument("--no-wait", action="store_true", help="do not wait for another measurement to end")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        print(json.dumps(work(given.arm, given.log)))
        return

    from shortlist.evaluation.benchmarks import record
    from shortlist.evaluation.evidence import machine_lock

    num_events = 300_000 if given.quick else given.events
    load = os.getloadavg()[0]
    results: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name, nullcontext() if given.no_wait or given.quick else machine_lock():
        for kind in KINDS:
            path = Path(name) / f"{kind}.parquet"
            generate(path, num_events, kind)
            results[kind] = {}
            for arm in ARMS:
                command = [sys.executable, __file__, "--arm", arm, "--log", str(path)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                figures = json.loads(done.stdout.splitlines()[-1])
                results[kind][arm] = figures
                print(
                    f"{kind:8} {arm:12} {figures['seconds']:6.2f} s  {figures['events_per_s'] / 1e6:5.2f} M events/s  "
                    f"({figures['events_per_cpu_s'] / 1e6:.2f} M per CPU second)  {figures['peak_columns']:5.1f} columns of memory"
                )
            path.unlink()
            shutil.rmtree(path.with_suffix(".folder"))
    met = {kind: results[kind]["ingest"]["events_per_s"] >= GOAL[kind] for kind in KINDS}
    about = {"events": num_events, "load_before": load, "goal_events_per_s": GOAL, "goal_met": met}
    record(RESULT, {**about, "by_id_type": results}, quick=given.quick, out=given.out)


if __name__ == "__main__":
    main()
