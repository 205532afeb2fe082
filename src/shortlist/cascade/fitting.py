"""Which systems a log can serve, and the cascade that is chosen where nobody says another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from shortlist.cascade.config import RunConfig
from shortlist.data.dataset import Dataset
from shortlist.data.schema import Image, Text
from shortlist.errors import ConfigError
from shortlist.registry import Entry, Need, find, systems
from shortlist.training.config import TrainerConfig

MISSING: Mapping[Need, str] = {
    "order": "the log has no times, so nobody knows what came first",
    "clock": "the log's times only give an order, no moments",
    "history": "no request has any past event",
    "user_fields": "the log has no user fields; give a table with --users",
    "item_fields": "the log has no item fields; give a table with --items",
    "context": "the log has no context fields; name columns that are known before the event under data.context",
    "pair": "no stage comes before it that could give user-item fields",
    "text": "the items have no text; give a table with titles or descriptions with --items",
    "image": "the items have no images",
}
"""Why a system can not be served, by what it needs."""

SMALL = 5_000
"""Fit requests below which rankers read no item ids."""
MOST_ITEMS_OF_EASE = 10_000
"""Catalogue above which a matrix of all pairs of items costs too much to be a default."""


def offers(dataset: Dataset) -> frozenset[Need]:
    """What the dataset has, in the words of the registry."""
    space = dataset.space
    readable = [f for f in space.items.fields if not isinstance(f, Text | Image)]
    requests = dataset.split.fit
    present: dict[Need, bool] = {
        "order": "timestamp" in dataset.schema.roles,
        "clock": space.has_clock,
        "history": bool(np.any(requests.end > requests.start)),
        "user_fields": bool(space.user_fields),
        "item_fields": bool(readable),
        "context": bool(space.context_fields),
        "pair": True,
        "text": any(isinstance(f, Text) for f in space.items.fields),
        "image": any(isinstance(f, Image) for f in space.items.fields),
    }
    return frozenset(need for need, there in present.items() if there)


def fits(entry: Entry, dataset: Dataset) -> str | None:
    """Why the log can not serve a system, in words; None where it can."""
    there = offers(dataset)
    for need, reason in MISSING.items():
        if need in entry.needs and need not in there:
            return reason
    return None


def check_fits(config: RunConfig, dataset: Dataset) -> None:
    """ConfigError for the first system that the log can not serve."""
    for name, choice in config.systems.items():
        reason = fits(choice.entry, dataset)
        if reason is not None:
            others = [e.name for e in systems(kind=choice.entry.kind) if fits(e, dataset) is None]
            raise ConfigError(
                f"{name} can not be used here: {reason}; choose another {choice.entry.kind}: {', '.join(others) or 'there is none'}"
            )


def default_config(dataset: Dataset, base: RunConfig | None = None) -> RunConfig:
    """A four-stage cascade from what the log offers; other sections as in `base`. A base that has stages is given back as it is."""
    base = base or RunConfig(data=dataset.config)
    if base.stages:
        return base
    table = base.to_table()
    stages, settings, trainers = _choose(dataset, base.surface.k)
    asked = {f.name for f in fields(TrainerConfig) if getattr(base.trainer, f.name) != f.default}
    trainers = {name: {k: v for k, v in of.items() if k not in asked} for name, of in trainers.items()}
    table |= {"stages": stages, "systems": settings}
    table["trainer"] |= trainers
    return RunConfig.from_table(table)


def _choose(dataset: Dataset, k: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Stages, settings of systems, and of their trainers, as tables.

    Counts and closed forms find most of what can be found on small logs in seconds; what is learned by gradient finds new items by
    their fields, or reads the order of events. With few requests to learn from, rankers without id tables do best. The order is the mean
    of a linear ranker (in curves of its pair fields), whose scores are at hand from pre-ranking, and a deep one.
    """
    num_requests = len(dataset.split.fit)
    is_small = num_requests < SMALL
    stages: dict[str, Any] = {
        "retrieval": {"systems": _retrievers(dataset), "keep": max(k, min(300, dataset.num_items))},
        "pre-ranking": {"systems": ["light"], "keep": max(k, min(100, dataset.num_items))},
        "ranking": {"systems": ["dnn", "light"], "keep": max(k, min(50, dataset.num_items))},
    }
    if _can(dataset, "mmr"):
        stages["re-ranking"] = {"systems": ["mmr"]}
    settings = {
        "light": {"system": "dnn", "widths": [], "use_ids": False},
        "dnn": {"use_ids": not is_small, "widths": [64] if is_small else [128, 64]},
        "mmr": {"relevance": 0.95},
    }
    for_rankers, for_sequences = _batch_size(num_requests), _batch_size(dataset.space.num_users)
    trainers = {
        "light": {"lr": 5e-3, "batch_size": for_rankers, "epochs": 10},
        "dnn": {"lr": 2e-3, "batch_size": for_rankers, "epochs": 10},
        "two-tower": {"epochs": 6, "patience": 2},
        "sasrec": {"batch_size": for_sequences, "epochs": 30},
    }
    used = {name for stage in stages.values() for name in stage["systems"]}
    return (
        stages,
        {name: table for name, table in settings.items() if name in used},
        {name: table for name, table in trainers.items() if name in used},
    )


def _batch_size(num_examples: int) -> int:
    """Small enough for some 50 steps an epoch: with fewer, an epoch teaches little."""
    return max(16, min(256, num_examples // 50))


def _retrievers(dataset: Dataset) -> list[str]:
    """What finds candidates, the most telling first: equals in the merged list keep this order."""
    wanted = ["personal-frequency" if dataset.repeats else "sasrec", "item-knn"]
    if dataset.num_items <= MOST_ITEMS_OF_EASE:
        wanted.append("ease")
    if "item_fields" in offers(dataset):
        wanted.append("two-tower")
    return [name for name in [*wanted, "popularity"] if _can(dataset, name)]


def _can(dataset: Dataset, name: str) -> bool:
    return fits(find(name), dataset) is None
