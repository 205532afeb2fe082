"""What users did."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import Body, FastAPI, Response

from shortlist.errors import DataError
from shortlist.serving.routes.common import REFUSALS, Server, plain_json
from shortlist.serving.schemas import OneOrMany, Problem, RecordedOut


def add(app: FastAPI, server: Server) -> None:
    """POST /v1/events."""
    engine, metrics, max_events = server.engine, server.metrics, server.config.max_events
    outcomes: dict[int | str, dict[str, Any]] = {
        200: {"model": RecordedOut},
        **REFUSALS,
        503: {"model": Problem, "description": "Events can not be kept now; none of these were."},
    }

    @app.post("/v1/events", responses=outcomes, response_model=None, tags=["events"])
    def record(body: Annotated[OneOrMany, Body()]) -> Response:
        """Keep one event or a list of them. When this answers, they are durable and count in the users' next pages."""
        events = body if isinstance(body, list) else [body]
        if len(events) > max_events:
            raise DataError(f"{len(events):,} events in one body; at most {max_events:,} are taken")
        recorded = engine.record([event.event() for event in events])
        metrics.events(recorded)
        return plain_json(asdict(recorded))
