"""What a report of trouble needs to know of the machine, and a quick check that the ground holds. Nothing personal is in it.

Every part is a plain dictionary and none may fail: what can not be found out says so in its place.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sqlite3
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from shortlist._version import __version__
from shortlist.data.datasets import data_root, data_sets
from shortlist.evaluation.evidence import surroundings
from shortlist.registry import ENVIRONMENT, systems

PACKAGE = "shortlist"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS", "CUDA_VISIBLE_DEVICES")
_NOT_FOR_USERS = ("dev",)
_REQUIREMENT = re.compile(r"""^(?P<name>[A-Za-z0-9][\w.-]*)[^;]*(?:;.*\bextra\s*==\s*["'](?P<extra>[\w-]+)["'])?""")


def examine() -> dict[str, Any]:
    """All of it, as plain JSON; the home folder is written ~."""
    base, extras = _packages(_requirements())
    report = {
        "shortlist": {"version": __version__, "installed_as": _installed()},
        "python": {"version": platform.python_version(), "platform": platform.platform()},
        "packages": base,
        "extras": extras,
        "torch": _torch_build(),
        "devices": _devices(),
        "threads": _threads(),
        "machine": _machine(surroundings()["hardware"]),
        "data": _data(),
        "systems": _systems(),
        "checks": _checks(),
    }
    tidy: dict[str, Any] = without_home(report, str(Path.home()))
    return tidy


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The same for a person, to be pasted whole."""
    own, python, machine = report["shortlist"], report["python"], report["machine"]
    yield f"shortlist {own['version']} ({own['installed_as']}), Python {python['version']}, {python['platform']}"
    yield (
        f"machine   {machine['cpu']}, {machine['cores']} cores ({machine['usable_cores']} usable), "
        f"{machine['memory_gib']} GiB memory ({machine['free_memory_gib']} free), "
        f"{machine['free_disk_gib']} GiB free disk here, {machine['free_temp_gib']} in {machine['temp']}"
    )
    build = report["torch"]
    yield f"torch     {build['version']}, CUDA {build['cuda'] or 'none'}, {build['capability']}"
    for device in report["devices"]:
        memory = f", {device['memory_gib']} GiB" if device["memory_gib"] else ""
        yield f"device    {device['device']}: {device['name']}{memory}"
    threads = report["threads"]
    named = [f"{name}={value}" for name, value in threads["environment"].items()]
    yield f"threads   torch {threads['torch']} ({threads['torch_between']} between); {', '.join(named) or 'no variable is set'}"
    yield "          a small training step: " + _steps_words(threads["step_ms"])
    yield "packages  " + ", ".join(f"{name} {version or 'MISSING'}" for name, version in report["packages"].items())
    for name, extra in report["extras"].items():
        there = ", ".join(f"{package} {version}" for package, version in extra["packages"].items() if version)
        missing = [package for package, version in extra["packages"].items() if not version]
        told = f"lacks {', '.join(missing)}; {extra['install']}" if missing else there
        yield f"extra     {name}: {told}"
    data = report["data"]
    yield f"data      SHORTLIST_DATA {data['folder'] or 'is not set'}; found {', '.join(data['found'])}"
    kinds = [f"{len(names)} {kind}" for kind, names in report["systems"]["by_kind"].items()]
    yield f"systems   {', '.join(kinds) or 'none'}; {ENVIRONMENT} {report['systems']['folders'] or 'is not set'}"
    if report["systems"]["problem"]:
        yield f"          PROBLEM: {report['systems']['problem']}"
    for name, told in report["checks"].items():
        yield f"check     {name}: {told}"


def without_home(thing: Any, home: str) -> Any:
    """The same JSON value with the home folder written ~ wherever it stands in a text."""
    if isinstance(thing, str):
        # A home of "/" or "" is no name of a person, and would stand everywhere.
        return re.sub(rf"{re.escape(home)}(?=/|$|\W)", "~", thing) if len(home) > 1 else thing
    if isinstance(thing, Mapping):
        return {key: without_home(value, home) for key, value in thing.items()}
    return [without_home(value, home) for value in thing] if isinstance(thing, list) else thing


def _installed() -> str:
    try:
        return f"package {metadata.version(PACKAGE)}"
    except metadata.PackageNotFoundError:
        return "not installed, run from its source"


def _requirements() -> Sequence[str]:
    try:
        return metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return []


def _packages(requirements: Sequence[str]) -> tuple[dict[str, str | None], dict[str, dict[str, Any]]]:
    """Versions of the base packages, and of those of each extra with the line that installs it; None = not there."""
    base: dict[str, str | None] = {}
    extras: dict[str, dict[str, str | None]] = defaultdict(dict)
    for requirement in requirements:
        found = _REQUIREMENT.match(requirement)
        if found is None or found["name"] == PACKAGE or found["extra"] in _NOT_FOR_USERS:
            continue
        group = base if found["extra"] is None else extras[found["extra"]]
        group[found["name"]] = _version(found["name"])
    told = {
        name: {"packages": packages, "install": f"pip install '{PACKAGE}[{name}]'"} for name, packages in extras.items()
    }
    return base, told


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _torch_build() -> dict[str, Any]:
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def _devices() -> list[dict[str, Any]]:
    """CPU first, then every card that torch sees; memory in GiB, None where it is the machine's."""
    found: list[dict[str, Any]] = [{"device": "cpu", "name": platform.machine(), "memory_gib": None}]
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        found.append({"device": f"cuda:{number}", "name": card.name, "memory_gib": _gib(card.total_memory)})
    return found


def _threads() -> dict[str, Any]:
    return {
        "torch": torch.get_num_threads(),
        "torch_between": torch.get_num_interop_threads(),
        "step_ms": step_ms(sorted({1, torch.get_num_threads()})),
        "environment": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
    }


def step_ms(counts: Sequence[int], steps: int = 40) -> dict[int, float]:
    """Median time of a step of a small ranker (forward, backward, SGD) by number of threads; the number is put back.

    The counts take turns, so that another process slows all of them alike.
    """
    before = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    x_BD = torch.randn(512, 64, generator=generator)
    layers = [torch.randn(64, 64, generator=generator).mul_(0.1).requires_grad_() for _ in range(3)]
    spent: dict[int, list[float]] = {count: [] for count in counts}
    try:
        for number in range(steps + 5):
            for count in counts:
                torch.set_num_threads(count)
                began = time.perf_counter()
                with torch.enable_grad():
                    y_BD = x_BD
                    for weight in layers:
                        y_BD = torch.relu(y_BD @ weight)
                    gradients = torch.autograd.grad(y_BD.square().mean(), layers)
                for weight, gradient in zip(layers, gradients):
                    weight.data.add_(gradient, alpha=-0.01)
                if number >= 5:
                    spent[count].append((time.perf_counter() - began) * 1e3)
    finally:
        torch.set_num_threads(before)
    return {count: round(statistics.median(times), 3) for count, times in spent.items()}


def _steps_words(measured: Mapping[Any, float]) -> str:
    """How threads help now, and what to do where they do not."""
    told = ", ".join(
        f"{ms:.2f} ms with {count} thread{'s' if int(count) > 1 else ''}" for count, ms in measured.items()
    )
    best = min(measured, key=lambda count: measured[count])
    helps = best == max(measured, key=int)
    return told if helps else f"{told}; --threads {best} (or OMP_NUM_THREADS={best}) is faster for small models now"


def _machine(hardware: Mapping[str, Any]) -> dict[str, Any]:
    affinity = getattr(os, "sched_getaffinity", None)
    temp = tempfile.gettempdir()
    try:
        free_memory: float | None = _gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
    except (ValueError, OSError):
        free_memory = None
    return {
        "cpu": hardware["cpu"],
        "cores": hardware["cores"],
        "usable_cores": len(affinity(0)) if affinity else hardware["cores"],
        "memory_gib": hardware["memory_gib"],
        "free_memory_gib": free_memory,
        "free_disk_gib": _gib(shutil.disk_usage(".").free),
        "free_temp_gib": _gib(shutil.disk_usage(temp).free),
        "temp": temp,
    }


def _data() -> dict[str, Any]:
    root = data_root()
    found = [facts.name for facts in data_sets() if facts.is_packaged or facts.find(root) is not None]
    return {"folder": None if root is None else str(root), "found": found}


def _systems() -> dict[str, Any]:
    """Names by kind; a folder of own systems that can not be read is told, not raised."""
    by_kind: dict[str, list[str]] = defaultdict(list)
    problem = None
    try:
        for entry in systems():
            by_kind[entry.kind].append(entry.name)
    except Exception as error:  # someone's own file may do anything
        problem = f"{type(error).__name__}: {error}"
    return {"by_kind": dict(sorted(by_kind.items())), "folders": os.environ.get(ENVIRONMENT), "problem": problem}


def _checks() -> dict[str, str]:
    """By name "ok", or what went wrong."""
    checks: dict[str, Callable[[Path], None]] = {
        "SQLite in WAL mode": check_sqlite,
        "write, fsync, rename": check_files,
    }
    for device in _devices():
        checks[f"tensor on {device['device']}"] = partial(check_tensor, device["device"])
    told = {}
    for name, check in checks.items():
        try:
            with tempfile.TemporaryDirectory(prefix="shortlist-doctor-") as folder:
                check(Path(folder))
            told[name] = "ok"
        except Exception as error:  # the point is to tell it
            told[name] = f"FAILED ({type(error).__name__}: {error})"
    return told


def check_tensor(device: str, _: Path) -> None:
    """Multiply two small matrices there; RuntimeError when the result is wrong."""
    square = torch.arange(4.0, device=device).view(2, 2)
    if (square @ square).tolist() != [[2.0, 3.0], [6.0, 11.0]]:
        raise RuntimeError("two matrices multiplied give a wrong result")


def check_sqlite(folder: Path) -> None:
    """Keep a row as the event store does; RuntimeError when write-ahead logging can not be had, as on some network drives."""
    connection = sqlite3.connect(folder / "events.db")
    try:
        (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
        if mode != "wal":
            raise RuntimeError(
                f"SQLite {sqlite3.sqlite_version} uses the journal mode {mode} here; event stores need WAL"
            )
        with connection:
            connection.execute("CREATE TABLE kept (number INTEGER)")
            connection.execute("INSERT INTO kept VALUES (7)")
        if connection.execute("SELECT number FROM kept").fetchall() != [(7,)]:
            raise RuntimeError("SQLite gives back other rows than it was given")
    finally:
        connection.close()


def check_files(folder: Path) -> None:
    """Replace a file as snapshots do; RuntimeError when the new content is not there."""
    old, new = folder / "file", folder / "file.tmp"
    old.write_bytes(b"old")
    with new.open("wb") as file:
        file.write(b"new")
        file.flush()
        os.fsync(file.fileno())
    new.replace(old)
    if old.read_bytes() != b"new" or new.exists():
        raise RuntimeError("a renamed file did not take the old one's place")
    if sys.platform != "win32":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _gib(num_bytes: float) -> float:
    return round(num_bytes / 2**30, 1)
