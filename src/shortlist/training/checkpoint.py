"""The complete state of a training run as a folder: nothing pickled, never half-written, refused by name when damaged.

    RUN/checkpoint-000017/
        weights.safetensors      parameters and buffers
        optimiser.safetensors    moments and accumulators, named "optimiser/parameter/name"
        random.safetensors       state of torch's generators
        best.safetensors         the best weights so far, where there are any
        state.json               place in training, scalars of the optimisers, curve
        manifest.json            format, version that wrote it, sha256 of every file above

A checkpoint is written under another name, flushed to disk and renamed; the one before is deleted only then. The number rises with
every checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shortlist._version import __version__
from shortlist.errors import SnapshotError

FORMAT = 1
"""Rises when the files above change their meaning."""
PREFIX = "checkpoint-"
Tensors = dict[str, Tensor]


@dataclass(kw_only=True, slots=True)
class Checkpoint:
    """Everything that training needs to go on as if it had not stopped."""

    settings: dict[str, Any]
    """What the run was started with, as JSON; a resumed run must have the same."""
    place: dict[str, Any]
    """Phase, epoch, step, running sums, scores and the curve, as JSON."""
    weights: Tensors
    """Parameters and persistent buffers by name."""
    optimisers: list[dict[str, Any]] = field(default_factory=list)
    """`state_dict()` of each optimiser."""
    random: Tensors = field(default_factory=dict)
    """uint8 states of torch's generators: "cpu", and "cuda:0" ... where used."""
    best: Tensors | None = None
    """The best weights so far."""


def random_state(device: torch.device) -> Tensors:
    """States of the generators that training on `device` draws from: uint8 by name."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state[f"cuda:{device.index or 0}"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Put the generators back; one of a device that is not here is skipped, since its draws can not be repeated elsewhere."""
    for name, value in state.items():
        if name == "cpu":
            torch.set_rng_state(value)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(value, name)


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write the next checkpoint into `folder` (made if absent), delete those before, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f".{PREFIX}*"):
        shutil.rmtree(leftover)
    before = _checkpoints(folder)
    number = _number(before[-1]) + 1 if before else 1
    final = folder / f"{PREFIX}{number:06d}"
    fresh = folder / f".{final.name}"
    fresh.mkdir()
    tensors, scalars = _split_optimisers(checkpoint.optimisers)
    _save_tensors(fresh / "weights.safetensors", checkpoint.weights)
    _save_tensors(fresh / "optimiser.safetensors", tensors)
    _save_tensors(fresh / "random.safetensors", checkpoint.random)
    if checkpoint.best is not None:
        _save_tensors(fresh / "best.safetensors", checkpoint.best)
    _save_json(
        fresh / "state.json", {"settings": checkpoint.settings, "place": checkpoint.place, "optimisers": scalars}
    )
    hashes = {path.name: _sha256(path) for path in sorted(fresh.iterdir())}
    _save_json(fresh / "manifest.json", {"format": FORMAT, "written_by": __version__, "sha256": hashes})
    for path in fresh.iterdir():
        _flush(path)
    _flush(fresh)
    fresh.rename(final)
    _flush(folder)
    for old in before:
        shutil.rmtree(old)
    return final


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in `folder`, tensors on the CPU; None where there is none.

    Raises SnapshotError that names the file when one is missing, damaged or of another format.
    """
    found = _checkpoints(folder)
    if not found:
        return None
    newest = found[-1]
    manifest = _load_json(newest / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise SnapshotError(
            f"{newest} has format {manifest.get('format')} (written by version {manifest.get('written_by')}), this version "
            f"{__version__} reads format {FORMAT}; go on with the version that wrote it, or delete the folder and train again"
        )
    for name, expected in manifest["sha256"].items():
        path = newest / name
        if not path.is_file():
            raise _damaged(path, "the file is missing")
        if _sha256(path) != expected:
            raise _damaged(path, "its checksum is not the one in the manifest")
    state = _load_json(newest / "state.json")
    return Checkpoint(
        settings=state["settings"],
        place=state["place"],
        weights=_load_tensors(newest / "weights.safetensors"),
        optimisers=_join_optimisers(_load_tensors(newest / "optimiser.safetensors"), state["optimisers"]),
        random=_load_tensors(newest / "random.safetensors"),
        best=_load_tensors(newest / "best.safetensors") if "best.safetensors" in manifest["sha256"] else None,
    )


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file whole: a reader sees the old one or the new one."""
    fresh = path.with_name(f".{path.name}")
    fresh.write_text(text, encoding="utf-8")
    _flush(fresh)
    fresh.replace(path)


def _checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [p for p in folder.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=_number)


def _number(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))


def _split_optimisers(states: list[dict[str, Any]]) -> tuple[Tensors, list[dict[str, Any]]]:
    """State dicts as named tensors and what is left, which JSON can hold."""
    tensors: Tensors = {}
    scalars: list[dict[str, Any]] = []
    for number, state in enumerate(states):
        rest: dict[str, dict[str, Any]] = {}
        for parameter, values in state["state"].items():
            rest[str(parameter)] = {name: v for name, v in values.items() if not isinstance(v, Tensor)}
            tensors |= {f"{number}/{parameter}/{name}": v for name, v in values.items() if isinstance(v, Tensor)}
        scalars.append({"state": rest, "param_groups": state["param_groups"]})
    return tensors, scalars


def _join_optimisers(tensors: Tensors, scalars: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The state dicts again; JSON's lists become the tuples they were, apart from the lists of parameters."""
    states: list[dict[str, Any]] = []
    for rest in scalars:
        groups = [
            {k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in group.items()}
            for group in rest["param_groups"]
        ]
        states.append({"state": {int(p): dict(values) for p, values in rest["state"].items()}, "param_groups": groups})
    for name, value in tensors.items():
        number, parameter, key = name.split("/")
        states[int(number)]["state"][int(parameter)][key] = value
    return states


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Copies, because safetensors refuses tensors that share memory, as tied weights do.
    save_file({name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}, path)


def _load_tensors(path: Path) -> Tensors:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from error


def _save_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, allow_nan=False, indent=1), encoding="utf-8")


def _load_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(path, "it holds no object")
    return content


def _damaged(path: Path, reason: str) -> SnapshotError:
    return SnapshotError(
        f"checkpoint file {path} can not be read ({reason}); delete {path.parent} and train again, or restore it from a copy"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Force a file or a folder's list of names to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
