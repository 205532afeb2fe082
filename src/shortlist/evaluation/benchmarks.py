"""The frame of every benchmark: one script in `benchmarks/` times both arms, `shortlist bench` runs it, one JSON file records it.

A script is a benchmark when it has a module-level RESULT, the file where a full run is recorded. It takes --quick (small, for a look;
never recorded) and --out FILE, and ends with

    record(RESULT, {"arms": ...}, quick=given.quick, out=given.out)

which adds the command, hardware, versions, commit and date. `machine_lock` (evaluation/evidence.py) keeps other measurements away.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from shortlist.errors import ConfigError, DataError
from shortlist.evaluation.evidence import MEASURING, machine_lock, surroundings, write_json
from shortlist.registry import nearest


def record(result: Path, figures: Mapping[str, Any], *, quick: bool, out: Path | None = None) -> Path | None:
    """Write figures with all that is needed to quote them; called by a benchmark at its end.

    Args:
        result: file of the recorded full run.
        figures: JSON values; "name" and "command" are added, and replaced where they are there.
        quick: a small run: its figures go to `out` or nowhere.
        out: in place of `result`.

    Returns: where they are; None where nothing was written.
    """
    place = out or (None if quick else result)
    if place is not None:
        command = " ".join(["python", f"benchmarks/{result.stem}.py", *sys.argv[1:]])
        about = {"name": result.stem, "command": command, "quick": quick}
        write_json(place, {**figures, **about, **surroundings()})
    return place


def benchmark_folder(given: Path | None = None) -> Path:
    """The folder of benchmarks: the given one, or `benchmarks/` of the clone one stands in. ConfigError where there is none."""
    folder = given or Path("benchmarks")
    if not folder.is_dir():
        raise ConfigError(
            f"no folder of benchmarks at {folder.resolve()}: run inside a clone, or give --benchmarks DIR"
        )
    return folder


def listing(folder: Path) -> list[dict[str, Any]]:
    """Every benchmark: name, first line of its docstring, whether it has a quick form, and of its recorded result date and device."""
    rows = []
    for path in sorted(folder.glob("*.py")):
        tree = _parsed(path)
        if not _has_result(tree):
            continue
        recorded = _recorded(folder, path.stem) or {}
        hardware = recorded.get("hardware", {})
        rows.append(
            {
                "name": path.stem,
                "about": (ast.get_docstring(tree) or "").split("\n")[0],
                "quick": "--quick" in path.read_text(),
                "date": recorded.get("date"),
                "device": hardware.get("device"),
                "cpu": hardware.get("cpu"),
            }
        )
    return rows


def listing_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The same as lines of text."""
    width = max((len(row["name"]) for row in rows), default=0)
    lines = []
    for row in rows:
        where = ", ".join(filter(None, [row["date"], row["device"], row["cpu"]])) or "not recorded"
        lines += [
            f"{row['name']:{width}}  {row['about']}",
            f"{'':{width}}  {where}{'' if row['quick'] else '; no --quick'}",
        ]
    return lines or ["no benchmarks here"]


def run(
    folder: Path, name: str, *, quick: bool = False, say: Callable[[str], None] = print, live: bool = True
) -> dict[str, Any]:
    """Run a benchmark in a process of its own; a full run waits for the machine's lock and is recorded by the script.

    Args:
        folder: of benchmarks.
        name: of the script, without .py.
        quick: its small form; takes no lock, since its figures are not recorded.
        say: where messages go.
        live: let the script print as it goes; else what it prints is kept in the result.

    Returns: name, quick, seconds, `result` (what it wrote; None where it wrote nothing) and `output` ("" when live).

    Raises:
        ConfigError: no such benchmark, or it has no quick form.
        DataError: the script failed.
    """
    known = {row["name"]: row for row in listing(folder)}
    if name not in known:
        raise ConfigError(f"no benchmark named {name!r} in {folder}: {nearest(name, list(known))}")
    if quick and not known[name]["quick"]:
        raise ConfigError(f"the benchmark {name} has no quick form; leave --quick out")
    with tempfile.TemporaryDirectory() as scratch, nullcontext() if quick else machine_lock(say):
        out = Path(scratch) / "result.json"
        words = [sys.executable, str((folder / f"{name}.py").resolve())]
        began = time.perf_counter()
        done = subprocess.run(
            [*words, "--quick", "--out", str(out)] if quick else words,
            stdout=None if live else subprocess.PIPE,
            env={**os.environ, MEASURING: str(os.getpid())},
            text=True,
        )
        seconds = time.perf_counter() - began
        if done.returncode:
            raise DataError(f"the benchmark {name} failed with exit code {done.returncode}; its message stands above")
        written = _read(out) if quick else _recorded(folder, name)
    return {"name": name, "quick": quick, "seconds": round(seconds, 1), "result": written, "output": done.stdout or ""}


def _parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text())
    except SyntaxError as error:
        raise DataError(f"{path} is not Python ({error}); mend it or move it away") from error


def _has_result(tree: ast.Module) -> bool:
    """Whether RESULT is assigned at the top level."""
    targets = [t for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
    return any(isinstance(target, ast.Name) and target.id == "RESULT" for target in targets)


def _recorded(folder: Path, name: str) -> dict[str, Any] | None:
    return _read(folder / "results" / f"{name}.json")


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not a result ({error}); run `shortlist bench {path.stem}` again") from error
    return content
