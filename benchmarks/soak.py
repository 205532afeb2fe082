"""Half an hour at half of what the server can bear: no error, and memory that does not grow.

    python benchmarks/soak.py [--minutes 30] [--share 0.5] [--quick] [--out benchmarks/results/soak.json]

A run of the built-in shop log (counts and popularity, an HSTU ranker that remembers users, MMR, two chains and an allocator) is served by a
process of its own with everything on: event store, request log, memories in the process and in a file, allocator, time limit. Server and
load generator have one core each. What the server can bear is measured first, in a closed loop of 16 clients with the same mix; then an
open loop asks at `--share` of it:

    pages of known and of new users, with and without rules; searches; similar items; explanations of earlier answers;
    events in batches, most of them of users nobody has heard of before; news of items and of users

Users come at a rate that fills whatever grows with them: the result says how many there were. What is bounded is filled to its bound
before the half hour begins (ids whose rows are remembered) or in its first fifth (memories), so that what is left to see is growth without
a bound. Samples of /proc are taken every 5 seconds; the first fifth is not looked at. Intervals are by means of stretches of time, since
samples resemble their neighbours (_memory.py). Errors are answers other than 200, and none in time.

The rule, fixed before any run was looked at, for resident memory (RSS) and for what is the process's alone (USS):

    flat     the 95 % interval of the slope contains 0 and is no wider than 50 bytes per request to either side, so that one entry kept per
             request, user or event would have been seen; or all of it lies within 10 bytes per request
    unclear  it contains 0 but is wider
    grows    else
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter, deque
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from _memory import MIB, Sample, Sampler, Slope, slope_of
from _server import ONE_THREAD, Served, environment, on_core, served
from shortlist.cascade.build import train_cascade
from shortlist.cascade.config import RunConfig
from shortlist.data.dataset import Dataset, build_dataset
from shortlist.data.datasets import load
from shortlist.evaluation.benchmarks import record
from shortlist.evaluation.evidence import machine_lock
from shortlist.evaluation.load import Ask, Post, Replies, closed_loop, open_loop

RESULT = Path(__file__).parent / "results" / "soak.json"
RUN = """
[surface]
k = 10
[trainer]
epochs = 1
[stages.retrieval]
systems = ["counts", "popularity"]
keep = 100
[stages.ranking]
systems = ["hstu-ranker"]
keep = 30
offers = [{systems = ["counts"], keep = 20}]
[stages.re-ranking]
systems = ["mmr"]
[systems.hstu-ranker]
dim = 16
max_history = 50
[systems.hstu-ranker.layers]
num_blocks = 1
num_heads = 1
"""
SHARES = {
    "known": 0.30,
    "new": 0.20,
    "ruled": 0.15,
    "similar": 0.08,
    "search": 0.08,
    "explain": 0.07,
    "events": 0.06,
    "items": 0.03,
    "users": 0.03,
}
"""Kinds of requests."""
PAGES = ("known", "new", "ruled", "search")
LIMIT_MS = 1_000.0
MEMORY_MIB = 8
"""Bound of memories in the process, and in the file."""
REMEMBERED_IDS = 200_000
"""Ids whose rows a server remembers at most; see cascade/pasts.py."""
EVENTS_PER_BATCH = 400
SAMPLE_S, WINDOW_S = 5.0, 15.0
WARM_UP = 0.2
"""Share of the time that slopes leave out."""
WIDE_BYTES, SMALL_BYTES = 50.0, 10.0
"""Per request; see the rule above."""


class Mix:
    """Draws requests, and remembers of the answers what later requests ask about."""

    def __init__(self, dataset: Dataset, seed: int = 0) -> None:
        self.lot = np.random.default_rng(seed)
        self.users = [str(user) for user in dataset.user_ids.ids.to_list()]
        self.items = [str(item) for item in dataset.item_ids.ids.to_list()]
        titles = [title for title in dataset.titles or [] if title]
        self.words = sorted({word for title in titles for word in title.lower().split() if word.isalpha()})
        self.num_new = self.num_events = 0
        self.known_asked: set[str] = set()
        self.answered: deque[str] = deque(maxlen=500)
        self.chains: Counter[str] = Counter()

    def draw(self, count: int) -> tuple[list[str], list[Ask]]:
        """Kinds and requests."""
        kinds = self.lot.choice(list(SHARES), count, p=list(SHARES.values())).tolist()
        if not self.answered:
            kinds = ["known" if kind == "explain" else kind for kind in kinds]
        return kinds, [self._request(kind) for kind in kinds]

    def learn(self, kinds: list[str], replies: Replies) -> int:
        """Note request ids of pages; how many pages were degraded."""
        num_degraded = 0
        for kind, status, body in zip(kinds, replies.status.tolist(), replies.bodies):
            if kind in PAGES and status == 200 and body is not None:
                page = json.loads(body)
                num_degraded += page["degraded"] is not None
                self.chains[page["chain"]] += 1
                self.answered.append(page["request_id"])
        return num_degraded

    def batch(self, count: int) -> Post:
        """Events, nine of ten of users that are new."""
        now, known = time.time(), self._some(self.users, count)
        is_new = (self.lot.random(count) < 0.9).tolist()
        events = [
            {
                "user": self._newcomer() if new else user,
                "item": item,
                "timestamp": now,
                "event_id": f"event-{self.num_events + place}",
            }
            for place, (new, user, item) in enumerate(zip(is_new, known, self._some(self.items, count)))
        ]
        self.num_events += count
        return _post("/v1/events", events)

    @property
    def num_users(self) -> int:
        """Distinct users in requests and events so far; known ones of events are not counted."""
        return self.num_new + len(self.known_asked)

    def _request(self, kind: str) -> Ask:
        match kind:
            case "known":
                return f"/v1/recommend/{self._known()}"
            case "new":
                return f"/v1/recommend/{self._new()}"
            case "ruled":
                user = self._known() if self.lot.random() < 0.5 else self._new()
                low = round(float(self.lot.uniform(0.5, 3.0)), 2)
                rules = {"deny": self._some(self.items, 5), "filters": [{"field": "price", "at_least": low}]}
                return _post("/v1/recommend", {"user": user, "k": 8, "rules": rules})
            case "similar":
                return f"/v1/similar/{self._one(self.items)}?k=8"
            case "search":
                return f"/v1/search?q={self._one(self.words)}+{self._one(self.words)}&user={self._known()}"
            case "explain":
                return f"/v1/explain/{self._one(self.answered)}"
            case "events":
                return self.batch(EVENTS_PER_BATCH)
            case "items":
                news = {"item": self._one(self.items), "title": f"{self._one(self.words)} {self._one(self.words)}"}
                attributes = {"price": round(float(self.lot.uniform(0.5, 20.0)), 2)}
                return _post("/v1/items", {**news, "attributes": attributes, "available": self.lot.random() < 0.9})
            case _:
                return _post("/v1/users", {"user": self._new(), "attributes": {"country": "France"}})

    def _known(self) -> str:
        user = self._one(self.users)
        self.known_asked.add(user)
        return user

    def _new(self) -> str:
        """Nobody has heard of them, or only events of late."""
        if self.num_new and self.lot.random() < 0.5:
            return f"visitor-{self.lot.integers(max(self.num_new - 10_000, 0), self.num_new)}"
        return self._newcomer()

    def _newcomer(self) -> str:
        self.num_new += 1
        return f"visitor-{self.num_new - 1}"

    def _one(self, things: Any) -> Any:
        return things[int(self.lot.integers(len(things)))]

    def _some(self, things: list[str], count: int) -> list[str]:
        return [things[place] for place in self.lot.integers(len(things), size=count).tolist()]


@dataclass(kw_only=True)
class Account:
    """What became of all requests."""

    due_s: list[float] = field(default_factory=list)
    """Since the start."""
    latency_ms: list[float] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    fine: list[bool] = field(default_factory=list)
    num_degraded: int = 0
    faults: list[str] = field(default_factory=list)
    """The first few answers that are errors."""

    def add(self, began_s: float, kinds: list[str], replies: Replies, num_degraded: int) -> None:
        """A window of the load, which began so long after the start."""
        self.due_s += (replies.due_s + began_s).tolist()
        self.latency_ms += replies.latency_ms.tolist()
        self.kinds += kinds
        self.fine += (replies.status == 200).tolist()
        self.num_degraded += num_degraded
        for place in np.flatnonzero(replies.status != 200)[: 20 - len(self.faults)].tolist():
            body = replies.bodies[place] or b""
            self.faults.append(f"{kinds[place]}: {replies.status[place]} {body.decode(errors='replace')[:200]}")

    def third(self, number: int, length_s: float) -> dict[str, Any]:
        """Requests due in one third of the time."""
        due, fine = np.array(self.due_s), np.array(self.fine)
        inside = (due >= number * length_s / 3) & (due < (number + 1) * length_s / 3)
        pages = inside & fine & np.isin(self.kinds, PAGES)
        times, of_pages = np.array(self.latency_ms)[inside & fine], np.array(self.latency_ms)[pages]
        return {
            "requests": int(inside.sum()),
            "errors": int((inside & ~fine).sum()),
            "p50_ms": _percentile(times, 50),
            "p99_ms": _percentile(times, 99),
            "pages_p50_ms": _percentile(of_pages, 50),
            "pages_p99_ms": _percentile(of_pages, 99),
        }


def make_run(folder: Path) -> Dataset:
    """The run on the built-in log, calibrated."""
    config = RunConfig.from_toml(RUN)
    dataset = build_dataset(load("builtin"), config.data_settings)
    train_cascade(dataset, config, folder, progress=False)
    command = [sys.executable, "-m", "shortlist.cli", "calibrate", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment())
    return dataset


def fill(port: int, mix: Mix, num_users: int) -> None:
    """Let the server hear of so many users."""
    batches: list[Ask] = [mix.batch(5_000) for _ in range(-(-num_users // 4_500))]
    replies = closed_loop(port, batches, concurrency=1)
    if (replies.status != 200).any():
        raise SystemExit("the server did not take the events that fill it")


def capacity(port: int, mix: Mix, num_requests: int) -> float:
    """Requests of the mix per second that the server bears."""
    for count in (num_requests // 4, num_requests):
        kinds, asks = mix.draw(count)
        began = time.perf_counter()
        replies = closed_loop(port, asks, concurrency=16)
        seconds = time.perf_counter() - began
        mix.learn(kinds, replies)
    return float((replies.status == 200).sum()) / seconds


def soak(port: int, mix: Mix, rate: float, length_s: float) -> tuple[Account, float, float]:
    """The open loop, window after window: what became of it, its seconds, and those between windows in which nothing was due."""
    account, lot = Account(), np.random.default_rng(1)
    began, busy_s, end_s = time.perf_counter(), 0.0, 0.0
    while (at_s := time.perf_counter() - began) < length_s:
        window_s = min(WINDOW_S, max(length_s - at_s, 1.0))
        kinds, asks = mix.draw(max(round(rate * window_s), 1))
        arrivals = np.sort(lot.uniform(0, window_s, len(asks)))
        start_s = time.perf_counter() - began
        replies = open_loop(port, arrivals, asks, timeout_s=10.0)
        account.add(start_s, kinds, replies, mix.learn(kinds, replies))
        busy_s += window_s
        end_s = time.perf_counter() - began
    return account, end_s, end_s - busy_s


def verdict(slope: Slope) -> str:
    """By the rule above; the slope is in bytes per request."""
    contains = slope.low <= 0 <= slope.high
    if contains and max(-slope.low, slope.high) <= WIDE_BYTES:
        return "flat"
    if max(abs(slope.low), abs(slope.high)) <= SMALL_BYTES:
        return "flat"
    return "unclear" if contains else "grows"


def memory(samples: list[Sample], rate: float) -> dict[str, Any]:
    """Slopes after the warm-up, in MiB an hour and in bytes per request, and by the rule what they mean."""
    at_s = np.array([one.at_s for one in samples]) - samples[0].at_s
    late = at_s >= WARM_UP * at_s[-1]
    told: dict[str, Any] = {}
    for name in ("rss", "uss", "pss", "anonymous"):
        value = np.array([getattr(one, name) for one in samples], dtype=np.float64)
        per_request = slope_of(at_s[late] * rate, value[late])
        hourly = 3_600 * rate / MIB
        told[name] = {
            "first_mib": round(float(value[0]) / MIB, 1),
            "warm_mib": round(float(value[late][0]) / MIB, 1),
            "last_mib": round(float(value[-1]) / MIB, 1),
            "most_mib": round(float(value.max()) / MIB, 1),
            "slope_mib_per_hour": [
                round(part * hourly, 2) for part in (per_request.slope, per_request.low, per_request.high)
            ],
            "slope_bytes_per_request": [
                round(part, 2) for part in (per_request.slope, per_request.low, per_request.high)
            ],
            "verdict": verdict(per_request),
        }
    return told


def measure(
    run: Path, dataset: Dataset, length_s: float, share: float, *, quick: bool
) -> tuple[dict[str, Any], list[Sample]]:
    """Fill, capacity, soak."""
    mix = Mix(dataset)
    folder = run.parent
    files = {"events": folder / "events.db", "requests": folder / "requests.db", "memories": folder / "memories.bin"}
    options: list[object] = [
        "--events",
        files["events"],
        "--request-log",
        files["requests"],
        "--memories",
        files["memories"],
    ]
    options += ["--memory-mib", MEMORY_MIB, "--memories-mib", MEMORY_MIB, "--time-limit-ms", LIMIT_MS]
    with served(run, *options, env=ONE_THREAD, first=partial(on_core, 1)) as server:
        fill(server.port, mix, 4_500 if quick else REMEMBERED_IDS + 10_000)
        bears = capacity(server.port, mix, 150 if quick else 2_000)
        before = mix.num_users, mix.num_events
        mix.chains.clear()
        sampler = Sampler(server.process.pid, files, 0.5 if quick else SAMPLE_S)
        account, seconds, idle_s = soak(server.port, mix, share * bears, length_s)
        samples = sampler.stop()
        bounds = counted(server)
    rate = len(account.due_s) / seconds
    users, events = mix.num_users - before[0], mix.num_events - before[1]
    found = memory(samples, rate)
    errors = len(account.fine) - sum(account.fine)
    told = {
        "settings": {
            "minutes": round(seconds / 60, 2),
            "share": share,
            "capacity_per_s": round(bears, 1),
            "requests_per_s": round(rate, 1),
            "mix": SHARES,
            "events_per_batch": EVENTS_PER_BATCH,
            "time_limit_ms": LIMIT_MS,
            "memory_mib": MEMORY_MIB,
            "between_windows_s": round(idle_s, 1),
            "warm_up": WARM_UP,
        },
        "requests": dict(Counter(account.kinds)),
        "errors": errors,
        "faults": account.faults,
        "degraded": account.num_degraded,
        "chains": dict(mix.chains),
        "distinct_users": users,
        "events": events,
        "ids_remembered_turned_over": round(users / REMEMBERED_IDS, 2),
        "thirds": [account.third(number, seconds) for number in range(3)],
        "memory": found,
        "files": {
            name: {
                "first_mib": round(samples[0].sizes[name] / MIB, 2),
                "last_mib": round(samples[-1].sizes[name] / MIB, 2),
            }
            for name in files
        },
        "descriptors": _span([one.num_files for one in samples]),
        "threads": _span([one.num_threads for one in samples]),
        "bounds": bounds,
        "bar": "0 errors; RSS and USS flat by the rule in the script",
        "holds": errors == 0 and all(found[name]["verdict"] == "flat" for name in ("rss", "uss")),
        "samples": {
            "minute": [round((one.at_s - samples[0].at_s) / 60, 3) for one in samples],
            "rss_mib": [round(one.rss / MIB, 2) for one in samples],
            "uss_mib": [round(one.uss / MIB, 2) for one in samples],
        },
    }
    return told, samples


def counted(server: Served) -> dict[str, float]:
    """What the server says of its bounds, and of what must stay 0."""
    with urllib.request.urlopen(f"{server.address}/metrics") as answer:
        text = answer.read().decode()
    names = "memory_bytes|memory_limit_bytes|memory_entries|request_log_dropped|workers_replaced|waiting"
    found = re.findall(rf"^shortlist_({names})(?:_total)?(?:{{place=\"(\w+)\"}})? (\S+)$", text, re.MULTILINE)
    return {f"{name} {place}".strip(): float(value) for name, place, value in found}


def draw(samples: list[Sample], place: Path) -> None:
    """Memory over time, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 2.8), layout="constrained")
    axis = figure.subplots()
    minutes = [(one.at_s - samples[0].at_s) / 60 for one in samples]
    for name in ("rss", "uss", "anonymous"):
        axis.plot(minutes, [getattr(one, name) / MIB for one in samples], label=name, linewidth=1.2)
    axis.axvline(WARM_UP * minutes[-1], color="grey", linewidth=0.8, linestyle=":")
    axis.set(xlabel="minutes", ylabel="MiB", ylim=(0, None))
    axis.legend(frameon=False)
    figure.savefig(place, metadata={"Date": None})


def _post(path: str, content: Any) -> Post:
    return Post(path, json.dumps(content).encode())


def _percentile(values: Any, share: float) -> float | None:
    return round(float(np.percentile(values, share)), 2) if len(values) else None


def _span(values: list[int]) -> dict[str, int]:
    """Where a count began and ended, and its extremes after the warm-up."""
    late = values[int(WARM_UP * len(values)) :]
    return {"first": values[0], "least": min(late), "most": max(late), "last": values[-1]}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--share", type=float, default=0.5, help="of what the server can bear")
    parser.add_argument("--quick", action="store_true", help="15 seconds, nothing written unless --out is given")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary, nullcontext() if arguments.quick else machine_lock():
        run = Path(temporary) / "run"
        dataset = make_run(run)
        on_core(0)
        length_s = 15.0 if arguments.quick else 60 * arguments.minutes
        told, samples = measure(run, dataset, length_s, arguments.share, quick=arguments.quick)
    print(json.dumps({name: part for name, part in told.items() if name != "samples"}, indent=1))
    written = record(RESULT, told, quick=arguments.quick, out=arguments.out)
    if written is not None:
        draw(samples, written.with_suffix(".svg"))
    if not arguments.quick and not told["holds"]:
        print("the bar does not hold")


if __name__ == "__main__":
    main()
