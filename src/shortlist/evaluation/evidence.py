"""The frame of every claim: one file in `evidence/` states it, `shortlist prove` runs it, one JSON object records it.

A claim file holds a module-level `CLAIM`, a function `run(lab)` that measures the arms, and a function `judge(arms)` that
gives the verdict from what was measured:

    CLAIM = Claim(name="loss_matters", systems=("sasrec",), claim="...", data="ml-100k", protocol="...", bar="...")

    def run(lab: Lab) -> None:
        for seed in lab.seeds:
            lab.measure("cross-entropy", seed, lambda: {"ndcg@10": train_and_test(seed, quick=lab.quick)})

    def judge(arms: Mapping[str, Arm]) -> Judgement:
        return hold_if(arms["cross-entropy"].metrics["ndcg@10"].mean > ..., "...")

What is measured once is kept beside the results until the claim is complete, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from shortlist.errors import ConfigError, DataError
from shortlist.machine import cpu_name
from shortlist.metrics import Interval
from shortlist.metrics.intervals import seed_interval
from shortlist.training.checkpoint import write_atomically

Verdict = Literal["holds", "fails", "partly"]
MEASURING = "SHORTLIST_MEASURING"
"""Environment variable of processes that run under the lock of the one that started them."""
REPORTED_PACKAGES = ("shortlist", "torch", "numpy", "polars")


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What is claimed and how it is tested, before anything is measured."""

    name: str
    """File name without .py."""
    systems: tuple[str, ...]
    """Registered names of the systems it speaks of."""
    claim: str
    """One sentence."""
    data: str
    """Data set, with its caveat."""
    protocol: str
    """Split, candidates, whether seen items are filtered, what is selected on what."""
    bar: str
    """What must be true for the claim to hold, with numbers."""
    published: Mapping[str, str | float | Mapping[str, float]] = field(default_factory=dict)
    """Published figures, named by arm or metric, each with its own protocol in mind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One system in one setting."""

    name: str
    metrics: Mapping[str, Interval]
    """By metric; over seeds where there are several, else over users where the arm gave an interval."""
    seeds: tuple[int, ...]
    per_seed: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """The single values behind the means, in the order of the seeds."""
    cost: Mapping[str, float] = field(default_factory=dict)
    """Seconds and whatever the arm states: FLOPs, parameters, bytes."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """Verdict and the sentence that gives its reason, with the numbers it rests on."""

    verdict: Verdict
    reason: str


def hold_if(condition: bool, reason: str) -> Judgement:
    """holds or fails, with the reason."""
    return Judgement("holds" if condition else "fails", reason)


class Lab:
    """What a claim's `run` works with: the seeds, whether it is quick, the data, and where measurements go.

    Args:
        claim: the claim being run.
        kept: file of finished measurements (JSON lines), or None to keep nothing.
        quick: ten-second version: one seed, small data; never a verdict on the full claim.
        say: where progress lines go.
    """

    def __init__(self, claim: Claim, *, kept: Path | None, quick: bool, say: Callable[[str], None] = print) -> None:
        self.claim = claim
        self.quick = quick
        self.seeds: tuple[int, ...] = (0,) if quick else (0, 1, 2)
        self._kept = kept
        self._say = say
        self._done: dict[tuple[str, int], dict[str, Any]] = {}
        if kept is not None and kept.exists():
            for line in kept.read_text().splitlines():
                record = json.loads(line)
                self._done[record["arm"], record["seed"]] = record
            say(f"{claim.name}: {len(self._done)} finished measurements found in {kept}; the run goes on from there")

    @property
    def data_root(self) -> Path:
        """Folder of the public data sets; DataError where SHORTLIST_DATA is not set."""
        root = os.environ.get("SHORTLIST_DATA")
        if not root:
            raise DataError(f"{self.claim.name} needs public data: set SHORTLIST_DATA to the folder that holds it")
        return Path(root)

    @property
    def scratch(self) -> Path | None:
        """Folder for checkpoints of long arms, so that one that was stopped resumes; None where nothing is kept."""
        return None if self._kept is None else self._kept.with_suffix(".work")

    def measure(
        self,
        arm: str,
        seed: int,
        run: Callable[[], Mapping[str, float | Interval]],
        cost: Mapping[str, float] | None = None,
    ) -> Mapping[str, float | Interval]:
        """Run one arm with one seed, unless it was finished before, and keep its metrics and seconds.

        Metrics are numbers, or Intervals where the arm knows its own interval over users. Keys that begin with "cost:" are costs.
        """
        if (arm, seed) not in self._done:
            started = time.perf_counter()
            metrics = run()
            record = {
                "arm": arm,
                "seed": seed,
                "metrics": {n: asdict(v) if isinstance(v, Interval) else float(v) for n, v in metrics.items()},
                "cost": {"seconds": time.perf_counter() - started, **(cost or {})},
            }
            self._done[arm, seed] = record
            if self._kept is not None:
                self._kept.parent.mkdir(parents=True, exist_ok=True)
                with self._kept.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
        metrics = {n: Interval(**v) if isinstance(v, dict) else v for n, v in self._done[arm, seed]["metrics"].items()}
        shown = ", ".join(f"{n} {v.mean if isinstance(v, Interval) else v:.4f}" for n, v in metrics.items())
        self._say(f"{self.claim.name}: {arm}, seed {seed}: {shown} ({self._done[arm, seed]['cost']['seconds']:.0f} s)")
        return metrics

    def arms(self) -> dict[str, Arm]:
        """All that was measured, by arm, in the order of first measurement."""
        names = list(dict.fromkeys(arm for arm, _ in self._done))
        return {name: self._arm(name) for name in names}

    def _arm(self, name: str) -> Arm:
        records = sorted((r for (arm, _), r in self._done.items() if arm == name), key=lambda r: r["seed"])
        metrics, per_seed = {}, {}
        for metric in [m for m in records[0]["metrics"] if not m.startswith("cost:")]:
            values = [r["metrics"][metric] for r in records]
            if any(isinstance(v, float) and math.isnan(v) for v in values):
                continue  # what one seed does not have, as a bar that it never reached, has no mean
            if isinstance(values[0], dict):
                means = tuple(v["mean"] for v in values)
                metrics[metric] = Interval(**values[0]) if len(values) == 1 else _pooled(values)
            else:
                means = tuple(values)
                metrics[metric] = seed_interval(means) if len(means) > 1 else Interval(means[0], means[0], means[0])
            per_seed[metric] = means
        costs = {
            m.removeprefix("cost:"): records[0]["metrics"][m] for m in records[0]["metrics"] if m.startswith("cost:")
        }
        seconds = sum(r["cost"]["seconds"] for r in records) / len(records)
        return Arm(
            name=name,
            metrics=metrics,
            seeds=tuple(r["seed"] for r in records),
            per_seed=per_seed,
            cost={**records[0]["cost"], **costs, "seconds": round(seconds, 2)},
        )


def _pooled(intervals: list[dict[str, float]]) -> Interval:
    """Several seeds that each know their interval over users: the seeds' t-interval or the mean interval, whichever is wider."""
    over_seeds = seed_interval([i["mean"] for i in intervals])
    low = sum(i["low"] for i in intervals) / len(intervals)
    high = sum(i["high"] for i in intervals) / len(intervals)
    return Interval(over_seeds.mean, min(low, over_seeds.low), max(high, over_seeds.high))


def evidence_folder(given: Path | None = None) -> Path:
    """The folder of claims: the given one, or `evidence/` of the clone one stands in. ConfigError where there is none."""
    folder = given or Path("evidence")
    if not folder.is_dir():
        raise ConfigError(f"no folder of claims at {folder.resolve()}: run inside a clone, or give --evidence DIR")
    return folder


def claim_files(folder: Path) -> dict[str, Path]:
    """Claim files by name."""
    return {p.stem: p for p in sorted(folder.glob("*.py")) if not p.name.startswith("_")}


def load_claim(path: Path) -> tuple[Claim, ModuleType]:
    """Import a claim file; ConfigError names what it lacks."""
    spec = importlib.util.spec_from_file_location(f"shortlist_evidence_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} can not be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent))  # a claim may share arms with its neighbour
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    for name in ("CLAIM", "run", "judge"):
        if not hasattr(module, name):
            raise ConfigError(f"{path} has no {name}; a claim file has CLAIM, run(lab) and judge(arms)")
    if module.CLAIM.name != path.stem:
        raise ConfigError(
            f"{path} states a claim called {module.CLAIM.name!r}; the file and the claim carry the same name"
        )
    return module.CLAIM, module


def prove(
    path: Path, *, quick: bool = False, fresh: bool = False, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Run one claim and return its record (see `record`); a full run also writes `results/NAME.json` beside the claim.

    Args:
        path: the claim file.
        quick: ten-second form; its record says so and is not written among the full results.
        fresh: forget measurements of an earlier, unfinished run of this same file.
        say: where progress lines go.
    """
    claim, module = load_claim(path)
    kept = None if quick else _kept(path)
    if kept is not None and fresh:
        _forget(kept)
    started = time.perf_counter()
    with machine_lock(say):
        lab = Lab(claim, kept=kept, quick=quick, say=say)
        module.run(lab)
    arms = lab.arms()
    judgement = module.judge(arms)
    result = record(claim, arms, judgement, quick=quick, seconds=time.perf_counter() - started)
    if kept is not None:
        write_json(path.parent / "results" / f"{claim.name}.json", result)
        _forget(kept)
    return result


def judge_again(path: Path) -> dict[str, Any]:
    """The recorded measurements of a claim under its present `judge`, written back; nothing is measured.

    Raises ConfigError where no result is recorded.
    """
    claim, module = load_claim(path)
    file = path.parent / "results" / f"{claim.name}.json"
    if not file.exists():
        raise ConfigError(f"{claim.name} has no recorded result to judge; run `shortlist prove {claim.name}` first")
    result: dict[str, Any] = json.loads(file.read_text())
    arms = {
        arm["name"]: Arm(
            name=arm["name"],
            metrics={m: Interval(v["mean"], v["low"], v["high"]) for m, v in arm["metrics"].items()},
            seeds=tuple(range(max(v["seeds"] for v in arm["metrics"].values()))),
            per_seed={m: tuple(v["values"]) for m, v in arm["metrics"].items()},
            cost=arm["cost"],
        )
        for arm in result["arms"]
    }
    judgement: Judgement = module.judge(arms)
    told = {"claim": claim.claim, "systems": list(claim.systems), "published": dict(claim.published), "bar": claim.bar}
    result |= {**told, "verdict": judgement.verdict, "reason": judgement.reason}
    write_json(file, result)
    return result


def _kept(path: Path) -> Path:
    """Where a claim's measurements wait for it to be complete; another place when the claim's file has changed."""
    return (
        path.parent / "results" / ".partial" / f"{path.stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.jsonl"
    )


def _forget(kept: Path) -> None:
    kept.unlink(missing_ok=True)
    shutil.rmtree(kept.with_suffix(".work"), ignore_errors=True)


def record(
    claim: Claim, arms: Mapping[str, Arm], judgement: Judgement, *, quick: bool, seconds: float
) -> dict[str, Any]:
    """The JSON object of a result: the claim, its arms with mean, low, high and seeds, the verdict, and where it was run."""
    rows = [
        {
            "name": arm.name,
            "metrics": {
                metric: {**asdict(interval), "seeds": len(arm.seeds), "values": list(arm.per_seed.get(metric, ()))}
                for metric, interval in arm.metrics.items()
            },
            "cost": dict(arm.cost),
        }
        for arm in arms.values()
    ]
    return {
        "name": claim.name,
        "systems": list(claim.systems),
        "claim": claim.claim,
        "data": claim.data,
        "protocol": claim.protocol,
        "published": dict(claim.published),
        "arms": rows,
        "bar": claim.bar,
        "verdict": judgement.verdict,
        "reason": judgement.reason,
        "quick": quick,
        "seconds": round(seconds, 1),
        **surroundings(),
    }


def surroundings() -> dict[str, Any]:
    """Hardware, versions, commit and date: what a figure needs to be quoted."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {"python": platform.python_version()}
    for package in REPORTED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "hardware": {
            "device": device,
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        },
        "versions": versions,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


@contextmanager
def machine_lock(say: Callable[[str], None] = print) -> Iterator[None]:
    """Nothing else of ours that is timed runs meanwhile on this machine: waits for its turn, and says so.

    Processes started by the holder count as the holder: they find MEASURING in their environment and do not wait for it.
    """
    if MEASURING in os.environ:
        yield
        return
    path = Path(tempfile.gettempdir()) / "shortlist-measuring.lock"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another measurement runs on this machine; waiting for it to end")
            fcntl.flock(file, fcntl.LOCK_EX)
        os.environ[MEASURING] = str(os.getpid())
        try:
            yield
        finally:
            del os.environ[MEASURING]
            fcntl.flock(file, fcntl.LOCK_UN)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write beside and rename, so that a reader sees the old file or the new one. ConfigError where a folder stands there."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file to write to")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def results(folder: Path) -> list[dict[str, Any]]:
    """All recorded full results of a folder of claims, by name; DataError names a file that is not one."""
    found = []
    for path in sorted((folder / "results").glob("*.json")):
        try:
            found.append(json.loads(path.read_text()))
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is not a result ({error}); run `shortlist prove {path.stem}` again") from error
    return found


def listing(folder: Path) -> list[dict[str, Any]]:
    """Every claim of a folder with its systems and recorded verdict ("not run" where there is none)."""
    recorded = {result["name"]: result for result in results(folder)}
    rows = []
    for name, path in claim_files(folder).items():
        claim, _ = load_claim(path)
        result = recorded.get(name)
        rows.append(
            {
                "name": name,
                "systems": list(claim.systems),
                "claim": claim.claim,
                "verdict": result["verdict"] if result else "not run",
                "date": result["date"] if result else None,
            }
        )
    return rows


def listing_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The same as lines of text."""
    width = max((len(row["name"]) for row in rows), default=0)
    return [f"{row['name']:{width}}  {row['verdict']:8}  {row['claim']}" for row in rows] or ["no claims here"]


def results_page(folder: Path) -> str:
    """Markdown of all results: claim, published figure, ours, baselines, verdict and command. The text of docs/evidence.md."""
    lines = [
        "# Evidence",
        "",
        "Made by `shortlist prove --page` from `evidence/results/`; do not edit. Means with 95 % intervals, over seeds where there are",
        "several, else over users. A claim that fails stays here with the reason found.",
        "",
    ]
    for result in results(folder):
        lines += results_section(result)
    return "\n".join(lines)


def results_section(result: Mapping[str, Any], *, level: int = 2) -> list[str]:
    """Lines of Markdown of one result, under a heading of that level."""
    lines = [f"{'#' * level} {result['name']}: {result['verdict']}", "", result["claim"], ""]
    metrics = list(dict.fromkeys(m for arm in result["arms"] for m in arm["metrics"]))
    lines += ["| arm | " + " | ".join(metrics) + " | seeds | seconds |", "|---" * (len(metrics) + 3) + "|"]
    for arm in result["arms"]:
        cells = [_cell(arm["metrics"].get(metric)) for metric in metrics]
        seeds = max((m["seeds"] for m in arm["metrics"].values()), default=0)
        lines.append(f"| {arm['name']} | " + " | ".join(cells) + f" | {seeds} | {arm['cost'].get('seconds', 0):.0f} |")
    for name, figure in result["published"].items():
        shown = ", ".join(f"{k} {v}" for k, v in figure.items()) if isinstance(figure, dict) else figure
        lines.append(f"| *published: {name}* | {shown} " + "| " * (len(metrics) + 1) + "|")
    where = result["hardware"]
    lines += [
        "",
        f"Bar: {result['bar']} **{result['verdict'].capitalize()}**: {result['reason']}",
        "",
        f"Data: {result['data']}. Protocol: {result['protocol']}. ",
        f"`shortlist prove {result['name']}`, {result['seconds'] / 60:.0f} min on "
        f"{where['cores']} cores ({where['cpu']}, {where['device']}), {result['date']}, commit {result['commit'][:9]}.",
        "",
    ]
    return lines


def _cell(metric: Mapping[str, float] | None) -> str:
    if metric is None:
        return ""
    if metric["low"] == metric["high"]:
        return f"{metric['mean']:.4f}"
    return f"{metric['mean']:.4f} ({metric['low']:.4f} to {metric['high']:.4f})"


def _commit() -> str:
    try:
        run = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return run.stdout.strip()
