"""Requests lost and slowed while the snapshot behind a server is swapped again and again, beside the same load without a swap.

    python benchmarks/hot_swap.py [--seconds 120] [--rate 40] [--every 10] [--workers 1] [--quick] [--out benchmarks/results/hot_swap.json]

Two runs of the built-in shop log are published to a place, and a server of the place answers an open loop of requests over loopback: they
come when they come, so one that waits for a swap is counted with all its waiting. In the arm `swaps` the current version changes every
few seconds and the server follows by itself; in the arm `still` it stays. `follow_s` is the time from the change of the place to the first
answer of the new version, `near_a_swap` are requests due within two seconds of one. The bar: no failed request.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from _server import served
from shortlist.cascade.build import train_cascade
from shortlist.cascade.config import RunConfig
from shortlist.data.dataset import build_dataset
from shortlist.data.datasets import load
from shortlist.evaluation.benchmarks import record
from shortlist.evaluation.evidence import machine_lock
from shortlist.evaluation.load import Replies, open_loop
from shortlist.store.published import Place

RESULT = Path(__file__).parent / "results" / "hot_swap.json"
RUN = """
[surface]
k = 10
[stages.retrieval]
systems = ["personal-frequency", "counts", "popularity"]
keep = 300
[stages.ranking]
systems = ["personal-frequency", "counts"]
keep = 50
[stages.re-ranking]
systems = ["mmr"]
"""
NEAR_S = 2.0
"""Seconds after a swap in which requests count as near it."""


def make_place(folder: Path) -> tuple[Place, list[str], list[Any]]:
    """A place with two versions, and users of the log."""
    config, place, versions = RunConfig.from_toml(RUN), Place(folder / "place"), []
    dataset = build_dataset(load("builtin"), config.data_settings)
    for keep in (50, 40):
        run = folder / f"run-{keep}"
        train_cascade(dataset, config.override(f"ranking.keep={keep}"), run, progress=False)
        versions.append(place.publish(run).version)
    return place, versions, dataset.user_ids.ids.to_list()


class Swaps:
    """Changes the current version of a place every few seconds, in a thread; when it did so, on the clock of the load."""

    def __init__(self, place: Place, versions: list[str], every_s: float) -> None:
        self.place, self.versions, self.every_s = place, versions, every_s
        self.at_s: list[float] = []
        self.to: list[str] = []
        self._done = threading.Event()
        self._began = time.perf_counter()
        self._thread = threading.Thread(target=self._swap, daemon=True)
        self._thread.start()

    def _swap(self) -> None:
        while not self._done.wait(self.every_s):
            current = self.place.state().current
            wanted = next(version for version in self.versions if version != current)
            self.at_s.append(time.perf_counter() - self._began)
            self.to.append(wanted)
            self.place.select(wanted)

    def stop(self) -> None:
        """No further swap."""
        self._done.set()
        self._thread.join()


def arm(name: str, port: int, users: list[Any], seconds: float, rate: float, swaps: Swaps | None) -> dict[str, Any]:
    """One arm: the load, and what became of it."""
    lot = np.random.default_rng(0)
    arrivals = np.cumsum(lot.exponential(1 / rate, int(seconds * rate)))
    paths = [f"/v1/recommend/{user}?k=10" for user in lot.choice(users, len(arrivals))]
    replies = open_loop(port, arrivals, paths)
    if swaps is not None:
        swaps.stop()
    pages = [None if body is None else json.loads(body) for body in replies.bodies]
    found = {
        "arm": name,
        "requests": len(arrivals),
        "failed": int((replies.status != 200).sum()),
        "degraded": sum(page is not None and page.get("degraded") is not None for page in pages),
        "p50_ms": round(replies.percentile(50), 2),
        "p99_ms": round(replies.percentile(99), 2),
        "max_ms": round(float(replies.latency_ms.max()), 2),
    }
    return found if swaps is None else {**found, **near(replies, pages, swaps)}


def near(replies: Replies, pages: list[Any], swaps: Swaps) -> dict[str, Any]:
    """What the swaps did: how soon they were followed, and to requests near them."""
    done_s = replies.due_s + replies.latency_ms / 1e3
    versions = np.array([page["snapshot_version"] if page else "" for page in pages])
    follow = []
    for at, wanted in zip(swaps.at_s, swaps.to):
        later = done_s[(versions == wanted) & (done_s > at)]
        if len(later):
            follow.append(float(later.min() - at))
    is_near = np.zeros(len(done_s), dtype=bool)
    for at in swaps.at_s:
        is_near |= (replies.due_s >= at) & (replies.due_s < at + NEAR_S)
    times = replies.latency_ms[is_near & (replies.status == 200)]
    return {
        "swaps": len(swaps.at_s),
        "followed": len(follow),
        "follow_s": round(float(np.median(follow)), 2) if follow else None,
        "near_a_swap": {
            "requests": len(times),
            "p99_ms": round(float(np.percentile(times, 99)), 2) if len(times) else None,
        },
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="of each arm")
    parser.add_argument("--rate", type=float, default=40.0, help="requests a second")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between swaps")
    parser.add_argument("--workers", type=int, default=1, help="processes of the server")
    parser.add_argument("--quick", action="store_true", help="a few seconds, nothing written unless --out is given")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    seconds, rate, every = (4.0, 20.0, 1.5) if arguments.quick else (arguments.seconds, arguments.rate, arguments.every)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary, machine_lock():
        place, versions, users = make_place(Path(temporary))
        with served(place.folder, "--workers", arguments.workers) as server:
            port = server.port
            open_loop(
                port, np.linspace(0, 1, 20), [f"/v1/recommend/{user}" for user in users[:20]]
            )  # wakes everything up
            load_before = os.getloadavg()[0]
            arms = [
                arm("still", port, users, seconds, rate, None),
                arm("swaps", port, users, seconds, rate, Swaps(place, versions, every)),
            ]
    for one in arms:
        print("  ".join(f"{name} {value}" for name, value in one.items()))
    figures = {
        "settings": {"seconds": seconds, "rate": rate, "every_s": every, "workers": arguments.workers, "threads": 1},
        "arms": arms,
        "bar": "no failed request",
        "holds": all(one["failed"] == 0 for one in arms),
        "load_average": load_before,
    }
    record(RESULT, figures, quick=arguments.quick, out=arguments.out)


if __name__ == "__main__":
    main()
