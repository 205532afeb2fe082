"""Health of the data: what the served run was trained on, how good it was, and what came since."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from shortlist.serving.console import look
from shortlist.serving.console.app import Console
from shortlist.serving.console.client import Health

EVERY_S = 10.0
PARTS = {"fit": "later stages learn from", "valid": "validation from", "test": "test from", "end": "the log ends"}


def show(console: Console) -> None:
    """Lay the page out."""

    def update(health: Health) -> None:
        body.set_content(_body(health))

    with console.fresh(console.api.health, update, every_s=EVERY_S):
        body = console.ui.html(sanitize=False)


def _body(health: Health) -> str:
    data = health.data
    sizes = {"users": look.count(data.users), "items": look.count(data.items), "events": look.count(data.events)}
    if data.items_with_title is not None:
        sizes["items with a title"] = look.share(data.items_with_title / max(data.items, 1))
    if health.events_kept is not None:
        sizes["events kept since"] = look.count(health.events_kept)
    problems = "".join(look.paragraph(look.sentence(one), "problem") for one in health.problems if one)
    windows = [[PARTS.get(name, name), _moment(at)] for name, at in health.windows.items()]
    about = f"Snapshot {health.snapshot_version}; actions: {', '.join(data.actions) or 'none named'}."
    return (
        problems
        + look.tiles(sizes)
        + look.paragraph(about)
        + look.paragraph(health.split, "soft")
        + look.tables(look.table("Windows (UTC)", ["part", "moment"], windows), *_measured(health.metrics or {}))
    )


def _measured(metrics: Mapping[str, Any]) -> list[str]:
    """Tables of what training wrote into metrics.json; what it did not write is left out."""
    valid = metrics.get("validation") or {}
    rows = [
        [name, look.number(value)]
        for name, value in valid.items()
        if isinstance(value, int | float) and name != "requests"
    ]
    costs = valid.get("cost") or {}
    stages = [
        [
            stage,
            look.number(costs.get(stage, {}).get("ms")),
            look.number(costs.get(stage, {}).get("mflop")),
            look.share(float(gone)),
        ]
        for stage, gone in (valid.get("lost_at") or {}).items()
        if stage != "shown"
    ]
    systems = [
        [str(one.get("name")), str(one.get("stage")), look.number(one.get("ndcg")), look.number(one.get("seconds"))]
        for one in metrics.get("systems") or ()
    ]
    return [
        look.table(f"Validation, {look.count(valid.get('requests'))} requests", ["metric", "value"], rows),
        look.table("Stages in validation", ["stage", "ms", "MFLOP", "held-out items lost"], stages),
        look.table("Systems alone", ["system", "stage", "NDCG", "training, s"], systems),
    ]


def _moment(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")
