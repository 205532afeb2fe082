"""A catalogue of 1,000,000 items: seconds, peak memory and recall of evaluating 1,000 requests, exactly and by index, and of counting.

    python benchmarks/large_catalogue.py [--items 1000000] [--requests 1000] [--dim 64] [--arms exact ivf hnsw] [--quick] [--out FILE]

The log is generated: a user keeps to a few groups of near items, drawn by Zipf's law. Item vectors are planted (group centres, noise,
lengths that differ), and a user's vector is the mean of the latest items' vectors, so a search finds something and its neighbourhoods are
neither empty nor plain. All vector arms go through the cascade's own search with one stage; those of counting systems through `evaluate`.
Each arm reads the data set from disk in a process of its own, so that its peak memory is its own; indexes are built on one thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from _request_systems import FileVectors
from shortlist.cascade.cascade import Cascade
from shortlist.cascade.config import RunConfig
from shortlist.cascade.indexing import build_indexes
from shortlist.cascade.lessons import chunks, make_batch, sample
from shortlist.data.dataset import Dataset, build_dataset
from shortlist.data.log import read
from shortlist.evaluation.benchmarks import record
from shortlist.evaluation.evaluate import evaluate
from shortlist.evaluation.evidence import machine_lock
from shortlist.evaluation.runs import evaluate_counted
from shortlist.models.base import VectorRetriever

RESULT = Path(__file__).parent / "results" / "large_catalogue.json"
VECTORS = "vectors.npy"
KINDS = ("exact", "ivf", "hnsw")
ARMS = ("exact", "ivf", "popularity", "personal-frequency", "counts", "item-knn", "hnsw")
USERS, DAYS, ITEMS_OF_GROUP, K, KEEP = 4_000, 30, 100, 10, 100
LIMIT_GIB = 2.0


def make(folder: Path, num_items: int, dim: int, seed: int = 0) -> None:
    """The data set and the vectors of its rows."""
    rng = np.random.default_rng(seed)
    num_groups = max(num_items // ITEMS_OF_GROUP, 1)
    liked = rng.zipf(1.2, (USERS, 3)) % num_groups
    user = np.repeat(np.arange(USERS), DAYS)
    group = liked[user, rng.integers(3, size=len(user))]
    item = group * ITEMS_OF_GROUP + rng.zipf(1.3, len(user)) % ITEMS_OF_GROUP
    at = 1_600_000_000 + 86_400 * np.tile(np.arange(DAYS), USERS) + user
    events = pl.DataFrame({"user_id": user, "item_id": item % num_items, "timestamp": at})
    config = RunConfig.from_toml('[surface]\nrepeats = "no"').data_settings
    dataset = build_dataset(read(events, items=pl.DataFrame({"item_id": np.arange(num_items)})), config)
    dataset.save(folder / "dataset")
    group_of_row = np.zeros(dataset.num_items + 1, dtype=np.int64)
    group_of_row[1:] = np.array(dataset.item_ids.decode(np.arange(1, dataset.num_items + 1)), dtype=np.int64)
    group_of_row //= ITEMS_OF_GROUP
    # Groups of groups, as shelves lie in departments.
    centre = rng.normal(size=(num_groups // 50 + 1, dim))[np.arange(num_groups) // 50] + rng.normal(
        size=(num_groups, dim)
    )
    item_Nd = (centre[group_of_row] + 0.6 * rng.normal(size=(dataset.num_items + 1, dim))).astype(np.float32)
    item_Nd *= np.exp(0.2 * rng.normal(size=(len(item_Nd), 1))).astype(np.float32)
    np.save(folder / VECTORS, item_Nd / np.linalg.norm(item_Nd, axis=1).mean())


def run_vectors(folder: Path, kind: str, num_requests: int) -> dict[str, Any]:
    """One way of searching vectors, through the cascade."""
    dataset = Dataset.load(folder / "dataset")
    config = RunConfig.from_table({
        "surface": {"k": K},
        "index": {"kind": kind, "when_short": "warn"},
        "stages": {"retrieval": {"systems": ["file-vectors"], "keep": KEEP}},
        "systems": {"file-vectors": {"path": str(folder / VECTORS)}},
    })  # fmt: skip
    model = FileVectors(config.systems["file-vectors"].settings, dataset.space).eval()
    cascade = Cascade(config, dataset.space, {"file-vectors": model})

    def queries(retriever: VectorRetriever, most: int):
        asked = sample(dataset.split.valid, most, 0)
        for index in chunks(len(asked), dataset.num_items):
            yield make_batch(dataset, asked.select(index), retriever.max_history)

    began = time.perf_counter()
    cascade.indexes, reports = build_indexes(cascade, queries)
    prepared = time.perf_counter() - began
    report = evaluate(lambda batch, _: cascade.run(batch, k=K).rows, dataset, name=kind, k=K, max_requests=num_requests)
    found = {"prepare_seconds": prepared} | judged(report)
    for made in reports.values():
        found |= {
            f"recall@{KEEP}": round(made.recall, 4), "index_used": made.in_use, "index_build_seconds": made.build_seconds,
            "effort": made.effort, "products_per_request": round(made.num_scored),
        }  # fmt: skip
    return found


def run_counted(folder: Path, name: str, num_requests: int) -> dict[str, Any]:
    """A system that counts."""
    began = time.perf_counter()
    report = evaluate_counted(name, Dataset.load(folder / "dataset"), k=K, max_requests=num_requests)
    return {"prepare_seconds": time.perf_counter() - began - report.seconds} | judged(report)


def judged(report: Any) -> dict[str, Any]:
    """Time of the pages and their quality."""
    ms = 1e3 * report.seconds / report.num_requests
    return {
        "requests": report.num_requests, "evaluate_seconds": report.seconds, "ms_per_request": ms,
        f"ndcg@{K}": report.metrics[f"ndcg@{K}"].mean,
    }  # fmt: skip


def arm(folder: Path, name: str, num_requests: int, threads: int) -> dict[str, Any]:
    """One arm, in this process."""
    torch.set_num_threads(threads)
    run = run_vectors if name in KINDS else run_counted
    found = run(folder, name, num_requests)
    peak_gib = peak_kib() / 2**20
    numbers = {key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}
    return {"arm": name, **numbers, "peak_gib": round(peak_gib, 3), "within_limit": peak_gib <= LIMIT_GIB}


def peak_kib() -> int:
    """Most memory that this process had; getrusage would also count what its parent had when it started this one."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--requests", type=int, default=1_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--arms", nargs="*", default=ARMS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument(
        "--quick", action="store_true", help="20,000 items, 100 requests; nothing is written unless --out is given"
    )
    parser.add_argument("--no-wait", action="store_true", help="do not wait for another measurement to end")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--arm", nargs=2, metavar=("FOLDER", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(arm(Path(options.arm[0]), options.arm[1], options.requests, options.threads)))
        return
    if options.quick:
        options.items, options.requests = 20_000, 100
    lock = nullcontext() if options.no_wait or options.quick else machine_lock()
    with tempfile.TemporaryDirectory() as folder, lock:
        began = time.perf_counter()
        make(Path(folder), options.items, options.dim)
        print(f"data made in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        settings = {key: getattr(options, key) for key in ("items", "requests", "dim", "threads", "note")}
        arms: list[dict[str, Any]] = []
        for name in options.arms:
            own = [sys.executable, __file__, "--arm", folder, name]
            own += ["--requests", str(options.requests), "--threads", str(options.threads)]
            done = subprocess.run(own, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr}")
            arms.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(arms[-1]), file=sys.stderr, flush=True)
            figures = {"settings": settings, "limit_gib": LIMIT_GIB, "arms": arms}
            record(RESULT, figures, quick=options.quick, out=options.out)  # a later arm may be stopped


if __name__ == "__main__":
    main()
