"""A trained run on disk, and back.

RUN/dataset/                       schema, vocabularies, histories, requests
RUN/cascade.toml                   every setting of the run
RUN/systems/NAME.safetensors       weights and buffers of each system
RUN/systems/known_items.safetensors, systems.json      on which events each one was built
RUN/popular.safetensors            all items, most chosen first
RUN/indexes/NAME.faiss, indexes.json                   indexes of vector retrievers, where the catalogue is large
RUN/metrics.json                   what training measured
RUN/manifest.json                  see store/snapshot.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from shortlist.cascade.cascade import Cascade, stage_space
from shortlist.cascade.config import RunConfig
from shortlist.cascade.indexing import load_indexes, save_indexes, still_valid
from shortlist.data.dataset import Dataset
from shortlist.data.histories import View
from shortlist.data.manifest import read_json
from shortlist.data.schema import Space
from shortlist.errors import ConfigError, DataError, SnapshotError
from shortlist.models.base import System, load_weights
from shortlist.store.snapshot import REMEDY, Manifest, load_tensors, read_snapshot, save_tensors, write_snapshot

CONFIG, METRICS, POPULAR = "cascade.toml", "metrics.json", "popular.safetensors"
SYSTEMS = "systems"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trained cascade with the data it was trained on."""

    folder: Path
    dataset: Dataset
    config: RunConfig
    cascade: Cascade
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """What training measured; plain JSON."""
    version: str = ""
    """Of the snapshot; every answer carries it."""
    at_validation: Cascade | None = field(default=None, repr=False)
    """The cascade as it stood when the validation window began, where training has just made it; None for a run read from disk."""


def as_of(run: Run, window: Literal["fit", "valid", "test"]) -> Cascade:
    """The cascade as it stood when a window began, for judging it on that window.

    A run is served with counts of everything before the test window. Asked about an earlier window it would have counted the answers, so
    what learns no weights is counted again on the events before that window. Weights stay as they were trained.
    """
    if window == "test" or not run.config.learning.refresh:
        return run.cascade
    if window == "valid" and run.at_validation is not None:
        return run.at_validation
    view = run.dataset.view(window)
    systems = dict(run.cascade.systems)
    for name, system in run.cascade.systems.items():
        if not system.phases():
            systems[name] = make_system(run.config, name, view.space)
            systems[name].prepare(view)
    device = run.cascade.device
    return Cascade(
        run.config,
        run.dataset.space,
        {name: system.to(device) for name, system in systems.items()},
        popular=most_chosen(view),
        device=device,
        indexes=still_valid(run.cascade, systems),
    )


def most_chosen(view: View) -> Tensor:
    """int64 [n] all catalogue rows by their number of events, most first; equals by row."""
    counts = np.bincount(view.histories.item, minlength=view.space.num_items + 1)[1:]
    return torch.from_numpy(np.argsort(-counts, kind="stable") + 1)


def make_system(config: RunConfig, name: str, space: Space) -> System:
    """A new system of the run, not trained, with seeded first weights.

    Args:
        space: of the events it is built on; the pair fields of its stage are added here.
    """
    choice = config.systems[name]
    stage = next(stage.name for stage in config.stages if name in stage.systems)
    torch.manual_seed(config.trainer_of(name).seed)
    try:
        system: System = choice.entry.cls(choice.settings, stage_space(config, space, stage))
    except ConfigError as error:
        raise ConfigError(f"[systems.{name}] {error}") from error
    return system.eval()


def save_run(
    folder: Path, dataset: Dataset, config: RunConfig, cascade: Cascade, metrics: Mapping[str, Any]
) -> Manifest:
    """Write a snapshot into the place of `folder`; see `write_snapshot`."""

    def write(beside: Path) -> None:
        dataset.save(beside / "dataset")
        (beside / CONFIG).write_text(config.to_toml())
        (beside / METRICS).write_text(json.dumps(metrics, indent=1) + "\n")
        save_tensors(beside / POPULAR, {"rows": cascade.popular})
        save_indexes(beside, cascade.indexes)
        known: dict[str, Tensor] = {}
        about = {}
        for name, system in cascade.systems.items():
            save_tensors(beside / SYSTEMS / f"{name}.safetensors", system.state_dict())
            items = system.space.known_items.cpu()
            same = next((key for key, other in known.items() if torch.equal(other, items)), None)
            key = same or f"known_{len(known)}"
            known[key] = items
            about[name] = {"known_items": key, "num_users": system.space.num_users}
        save_tensors(beside / SYSTEMS / "known_items.safetensors", known)
        (beside / SYSTEMS / "systems.json").write_text(json.dumps(about, indent=1) + "\n")

    return write_snapshot(folder, write)


def load_run(folder: Path, *, device: torch.device | str = "cpu", verify: bool = True) -> Run:
    """Read what `train_cascade` wrote.

    Args:
        device: where the systems go.
        verify: compare the digest of every file; without it only presence and size.

    Raises:
        SnapshotError: damaged, incomplete, or of systems that have changed since; names the file.
    """
    folder = Path(folder)
    manifest = read_snapshot(folder, verify=verify)
    try:
        return _read_run(folder, manifest, device)
    except DataError as error:
        raise SnapshotError(f"{folder} is damaged: {error}; {REMEDY}") from error
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise SnapshotError(
            f"{folder} is damaged: its files do not fit each other ({type(error).__name__}: {error}); {REMEDY}"
        ) from error


def _read_run(folder: Path, manifest: Manifest, device: torch.device | str) -> Run:
    dataset = Dataset.load(folder / "dataset")
    config = RunConfig.from_toml(folder / CONFIG)
    known = load_tensors(folder / SYSTEMS / "known_items.safetensors")
    about = read_json(folder / SYSTEMS / "systems.json", remedy=REMEDY)
    systems = {}
    for name in config.systems:
        path = folder / SYSTEMS / f"{name}.safetensors"
        try:
            space = replace(
                dataset.space, known_items=known[about[name]["known_items"]], num_users=about[name]["num_users"]
            )
        except KeyError as error:
            raise SnapshotError(f"{folder / SYSTEMS / 'systems.json'} says nothing of {error}; {REMEDY}") from error
        systems[name] = make_system(config, name, space)
        try:
            load_weights(systems[name], load_tensors(path))
        except (ValueError, RuntimeError) as error:
            if isinstance(error, SnapshotError):
                raise
            raise SnapshotError(
                f"{path} does not fit the system {name!r} of this version ({error}); train again"
            ) from error
        systems[name].to(device)
    popular = load_tensors(folder / POPULAR)["rows"]
    _check_sizes(folder, dataset, popular)
    return Run(
        folder=folder,
        dataset=dataset,
        config=config,
        cascade=Cascade(config, dataset.space, systems, popular=popular, device=device, indexes=load_indexes(folder)),
        metrics=read_json(folder / METRICS, remedy=REMEDY),
        version=manifest.version,
    )


def _check_sizes(folder: Path, dataset: Dataset, popular: Tensor) -> None:
    """SnapshotError where tables do not hold the rows that others point to; else that came out while somebody asks."""
    space, titles = dataset.space, dataset.titles
    counts = {
        "dataset/items.parquet": (len(dataset.item_ids), space.num_items),
        "dataset/users.parquet": (len(dataset.user_ids), len(dataset.histories.offsets) - 2),
        "dataset/titles.parquet": (space.num_items + 1 if titles is None else len(titles), space.num_items + 1),
    }
    for name, (found, wanted) in counts.items():
        if found != wanted:
            raise SnapshotError(f"{folder / name} is damaged: it has {found:,} rows where {wanted:,} belong; {REMEDY}")
    fits = popular.dtype == torch.int64 and popular.dim() == 1
    if not fits or (len(popular) and not 1 <= int(popular.min()) <= int(popular.max()) <= space.num_items):
        raise SnapshotError(f"{folder / POPULAR} is damaged: it does not hold rows of the catalogue; {REMEDY}")
