"""Which systems a log can serve, and the cascade that is chosen where nobody says another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from shortlist.cascade.config import RunConfig
from shortlist.data.dataset import Dataset
from shortlist.data.schema import Image, Text
from shortlist.errors import ConfigError
from shortlist.registry import Entry, Need, systems

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
    table |= {"stages": stages, "systems": settings}
    table["trainer"] |= trainers
    return RunConfig.from_table(table)


def _choose(dataset: Dataset, k: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    raise NotImplementedError
