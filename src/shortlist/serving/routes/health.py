"""What the served run was made of and how good it was, and what stands beside it now. Off unless the settings allow the admin's routes."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Response

from shortlist.cascade.engine import Engine
from shortlist.cascade.live import Live
from shortlist.cascade.run import METRICS
from shortlist.serving.routes.common import Server, plain_json
from shortlist.store.events import StoreUnavailable


def add(app: FastAPI, server: Server) -> None:
    """GET /v1/admin/health, where the settings allow it."""
    if not server.config.admin:
        return

    @app.get("/v1/admin/health", response_model=None, tags=["admin"])
    def health() -> Response:
        """Sizes and windows of the data, what training measured, problems of the files, and events kept since."""
        return plain_json(_told(server.engine))


def _told(engine: Engine) -> dict[str, Any]:
    live = engine.live
    data = live.dataset
    num_events = None
    problems = list(live.problems)
    try:
        num_events = None if engine.events is None else len(engine.events)
    except StoreUnavailable as error:
        problems.append(str(error))
    metrics, problem = _metrics(live)
    return {
        "snapshot_version": live.version,
        "data": {
            "users": data.space.num_users,
            "items": data.num_items,
            "events": data.histories.num_events,
            "actions": list(data.space.actions),
            "items_with_title": None if data.titles is None else sum(map(bool, data.titles)),
        },
        "windows": dict(data.plan.now) if data.space.has_clock else {},
        "split": data.split.note,
        "events_kept": num_events,
        "metrics": metrics,
        "problems": problems if problem is None else [*problems, problem],
    }


def _metrics(live: Live) -> tuple[dict[str, Any] | None, str | None]:
    """What training measured, and what is wrong with the file."""
    if live.folder is None:
        return None, None
    try:
        found = json.loads((live.folder / METRICS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return None, f"{METRICS} of the run can not be read ({error}); train it again"
    return (found, None) if isinstance(found, dict) else (None, f"{METRICS} of the run is no table; train it again")
