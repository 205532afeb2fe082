"""Allocators by name, and as folders: settings and chains as JSON, learned arrays as safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shortlist.cascade.allocation.base import Allocator, ChainSet
from shortlist.cascade.settings import build, plain
from shortlist.data.manifest import read_json
from shortlist.errors import ConfigError, DataError, ShortlistError, SnapshotError
from shortlist.registry import find, systems
from shortlist.store.snapshot import load_tensors, read_snapshot, save_tensors, write_snapshot

ABOUT, ARRAYS = "allocator.json", "allocator.safetensors"


def make_allocator(name: str, settings: Mapping[str, Any], chains: ChainSet, num_features: int) -> Allocator:
    """The registered allocator of that name.

    Args:
        name: as `shortlist systems` lists it.
        settings: over its defaults, as TOML gives them.
        chains: to choose from.
        num_features: F.

    Raises ConfigError: no allocator of that name, or a setting that it does not have or refuses.
    """
    entry = find(name)
    if not issubclass(entry.cls, Allocator):
        raise ConfigError(f"{name!r} is a {entry.kind}, not an allocator; `shortlist systems` lists them")
    allocator: Allocator = entry.cls(build(entry.cls.Config, settings, name), chains, num_features)
    return allocator


def name_of(allocator: Allocator) -> str:
    """The name it is registered under; ConfigError for a class that is not."""
    for entry in systems(kind=Allocator.kind):
        if entry.cls is type(allocator):
            return entry.name
    raise ConfigError(f"{type(allocator).__name__} is not registered; decorate it with @system to save it")


def save_allocator(folder: Path, allocator: Allocator) -> None:
    """Write an allocator with its chains, settings and what it learned; a folder that holds one is replaced as a whole.

    Raises SnapshotError where `folder` holds something else.
    """
    chains = allocator.chains
    about = {
        "name": name_of(allocator),
        "settings": plain(allocator.config),
        "num_features": allocator.num_features,
        "chains": {
            "names": list(chains.names),
            "stages": list(chains.stages),
            "model": chains.model_JK.tolist(),
            "count": chains.count_JK.tolist(),
            "costs": chains.costs_JC.tolist(),
        },
    }
    arrays = {name: torch.from_numpy(np.array(array, dtype=np.float64)) for name, array in allocator.state().items()}

    def write(inside: Path) -> None:
        (inside / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        save_tensors(inside / ARRAYS, arrays)

    write_snapshot(Path(folder), write)


def load_allocator(folder: Path) -> Allocator:
    """The allocator that `save_allocator` wrote; SnapshotError names the file that is missing, damaged or does not fit."""
    folder = Path(folder)
    read_snapshot(folder)
    about = read_json(folder / ABOUT, remedy="calibrate again")
    try:
        told = about["chains"]
        chains = ChainSet(
            names=tuple(told["names"]),
            stages=tuple(told["stages"]),
            model_JK=np.array(told["model"], dtype=np.int64),
            count_JK=np.array(told["count"], dtype=np.int64),
            costs_JC=np.array(told["costs"], dtype=np.float64),
        )
        allocator = make_allocator(about["name"], about["settings"], chains, about["num_features"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ShortlistError) and not isinstance(error, DataError):
            raise
        raise SnapshotError(f"{folder / ABOUT} does not describe an allocator ({error}); calibrate again") from error
    try:
        allocator.load_state({name: tensor.numpy() for name, tensor in load_tensors(folder / ARRAYS).items()})
    except DataError as error:
        raise SnapshotError(f"{folder / ARRAYS} does not fit {folder / ABOUT}: {error}") from error
    return allocator
