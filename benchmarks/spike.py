"""A spike of traffic on the real HTTP server: 1x, then 8x, then 1x again, where 1x is a quarter of what the server can bear.

    python benchmarks/spike.py RUN [--calm 30] [--spike 30] [--after 90] [--quick] [--out benchmarks/results/spike.json]

RUN is trained and calibrated (`shortlist train ... --config examples/budget.toml`, `shortlist calibrate`); without it one is made on the
built-in log. Server and load generator have one core each. Capacity is measured first, in a closed loop of 16 clients with the default
chain for everyone. Then three servers meet the same trace (the same times, the same users), one after another:

    fixed       every request gets the default chain
    prices      an allocator chooses chains at its prices; nothing reacts to load
    stress      the same with the stress cap: an overloaded server shrinks chains before it refuses anybody

A request fails where it is refused, has no answer within the time limit, or gets no page of the cascade. Quota is the mean calibrated
cost of the chains that answered in a second, against the mean of the calm before the spike.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from _server import ONE_THREAD, on_core, served
from shortlist.cascade.engine import LAST_RESORT
from shortlist.data.datasets import load
from shortlist.evaluation.benchmarks import record
from shortlist.evaluation.evidence import machine_lock
from shortlist.evaluation.load import Replies, closed_loop, open_loop
from shortlist.simulation.traffic import Audience, Steps, arrive

RESULT = Path(__file__).parent / "results" / "spike.json"
ARMS = {
    "fixed": ["--no-allocate"],
    "prices": [],
    "stress": ["--target-ms", "TARGET"],
}
BACK = 0.95
"""Of the calm quota: from then on the server has recovered."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """When which user asks."""

    times_N: np.ndarray
    paths: list[str]
    starts: tuple[float, float, float]
    """Where calm, spike and after begin."""
    end: float


@contextmanager
def server(run: Path, flags: list[str], limit_ms: float) -> Iterator[int]:
    """A server of the run on a core of its own; gives its port."""
    with tempfile.TemporaryDirectory() as folder:
        files = ("--events", f"{folder}/events.db", "--request-log", f"{folder}/requests.db")
        limit = ("--time-limit-ms", f"{limit_ms:g}")
        with served(run, *limit, *files, *flags, env=ONE_THREAD, first=lambda: on_core(1)) as made:
            yield made.port


def capacity(run: Path, users: list[str], num_requests: int, limit_ms: float) -> tuple[float, float]:
    """Requests per second that the fixed server bears, and milliseconds of one that comes alone."""
    paths = [f"/v1/recommend/{user}" for user in users]
    with server(run, ARMS["fixed"], limit_ms) as port:
        closed_loop(port, paths[: num_requests // 5], concurrency=16)
        alone = closed_loop(port, paths[: num_requests // 5], concurrency=1).percentile(50)
        began = time.perf_counter()
        replies = closed_loop(port, paths[:num_requests], concurrency=16)
        rate = float((replies.status == 200).sum()) / (time.perf_counter() - began)
    return rate, alone


def judged(replies: Replies, trace: Trace, costs: dict[str, float]) -> dict[str, Any]:
    """What a server did in each phase, and how long it took to come back."""
    pages = [
        json.loads(body) if status == 200 and body else None for status, body in zip(replies.status, replies.bodies)
    ]
    failed = np.array([page is None or page["chain"] == LAST_RESORT for page in pages])
    quota = np.array([np.nan if page is None else costs.get(page["chain"], np.nan) for page in pages])
    bounds = [*trace.starts, trace.end]
    phases = {}
    for name, start, end in zip(("calm", "spike", "after"), bounds, bounds[1:]):
        inside = (replies.due_s >= start) & (replies.due_s < end)
        latency = replies.latency_ms[inside & ~failed]
        phases[name] = {
            "requests": int(inside.sum()),
            "failed": round(float(failed[inside].mean()), 4),
            "p50_ms": round(float(np.percentile(latency, 50)), 2) if len(latency) else None,
            "p99_ms": round(float(np.percentile(latency, 99)), 2) if len(latency) else None,
            "quota_ms": round(float(np.nanmean(quota[inside])), 4) if np.isfinite(quota[inside]).any() else None,
        }
    calm = phases["calm"]["quota_ms"]
    return {**phases, "back_after_s": back_after(replies.due_s - trace.starts[2], quota, calm)}


def back_after(since_s: np.ndarray, quota: np.ndarray, calm: float | None) -> float | None:
    """Seconds after the spike from which on five seconds' mean quota is at BACK of the calm one; None = not within the trace."""
    if calm is None:
        return None
    for second in range(int(since_s.max()) - 4):
        inside = (since_s >= second) & (since_s < second + 5)
        if inside.any() and np.nanmean(quota[inside]) >= BACK * calm:
            return float(second)
    return None


def make_run(folder: Path) -> Path:
    """The cascade of examples/budget.toml on the built-in log, calibrated."""
    config = Path(__file__).parent.parent / "examples" / "budget.toml"
    for command in (["train", "builtin", "--config", str(config), "--out", str(folder)], ["calibrate", str(folder)]):
        subprocess.run([sys.executable, "-m", "shortlist.cli", *command], check=True, stdout=subprocess.DEVNULL)
    return folder


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--calm", type=float, default=30.0)
    parser.add_argument("--spike", type=float, default=30.0)
    parser.add_argument("--after", type=float, default=90.0)
    parser.add_argument("--limit-ms", type=float, default=250.0, help="time within which a request must be answered")
    parser.add_argument(
        "--quick", action="store_true", help="6 + 6 + 12 seconds, nothing written unless --out is given"
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lengths = (6.0, 6.0, 12.0) if arguments.quick else (arguments.calm, arguments.spike, arguments.after)
    with tempfile.TemporaryDirectory() as temporary, machine_lock():
        run = arguments.run or make_run(Path(temporary) / "run")
        on_core(0)
        told = measure(run, lengths, arguments.limit_ms, num_requests=400 if arguments.quick else 2_000)
    print(json.dumps(told, indent=1))
    record(RESULT, told, quick=arguments.quick, out=arguments.out)


def measure(run: Path, lengths: tuple[float, float, float], limit_ms: float, *, num_requests: int) -> dict[str, Any]:
    """Capacity, then the three arms on one trace."""
    rng = np.random.default_rng(0)
    known = load("builtin").events.select("user_id").unique("user_id", maintain_order=True)["user_id"].to_list()
    users = rng.choice([str(user) for user in known], num_requests).tolist()
    rate, alone_ms = capacity(run, users, num_requests, limit_ms)
    starts = (0.0, lengths[0], lengths[0] + lengths[1])
    end = sum(lengths)
    steps = Steps(per_second=rate / 4, at=starts, factors=(1.0, 8.0, 1.0))
    everyone = Audience.by_activity(np.ones(num_requests), 1, at=(0.0,), shares=((1.0,),))
    arrivals = arrive(steps, everyone, start=0.0, end=end, seed=0)
    paths = [f"/v1/recommend/{users[number % num_requests]}" for number in arrivals.user.tolist()]
    trace = Trace(times_N=arrivals.time, paths=paths, starts=starts, end=end)
    costs_of = json.loads((run.with_name(f"{run.name}.allocation") / "costs.json").read_text())
    costs = dict(zip(costs_of["chains"], costs_of["alone"]))
    target_ms = max(4 * alone_ms, limit_ms / 5)
    arms = {}
    for name, flags in ARMS.items():
        with server(run, [f"{target_ms:g}" if flag == "TARGET" else flag for flag in flags], limit_ms) as port:
            closed_loop(port, paths[:100], concurrency=2)  # what is computed on first use
            replies = open_loop(port, trace.times_N, trace.paths, timeout_s=limit_ms / 1e3 + 0.05)
        arms[name] = judged(replies, trace, costs)
    return {
        "settings": {
            "seconds": lengths,
            "capacity_per_s": round(rate, 1),
            "alone_ms": round(alone_ms, 2),
            "time_limit_ms": limit_ms,
            "target_ms": round(target_ms, 1),
            "requests": len(paths),
        },
        "arms": arms,
    }


if __name__ == "__main__":
    main()
