"""How the server is."""

from __future__ import annotations

from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST

from shortlist.serving.gate import problem
from shortlist.serving.routes.common import Server, plain_json
from shortlist.serving.schemas import Problem
from shortlist.store.events import StoreUnavailable


def add(app: FastAPI, server: Server) -> None:
    """GET /v1/health/live, /v1/health/ready and /metrics."""
    engine = server.engine

    @app.get("/v1/health/live", tags=["state"])
    async def live() -> dict[str, str]:
        """The process answers."""
        return {"status": "alive"}

    @app.get(
        "/v1/health/ready",
        response_model=None,
        responses={503: {"model": Problem, "description": "Pages are answered, but events can not be kept."}},
        tags=["state"],
    )
    def ready() -> Response:
        """Pages can be made and events kept."""
        if engine.events is not None:
            try:
                engine.events.history(["shortlist"])
            except StoreUnavailable as error:
                return problem(503, str(error))
        return plain_json(
            {
                "status": "ready",
                "snapshot_version": engine.snapshot_version,
                "keeps_events": engine.events is not None,
                "keeps_requests": engine.request_log is not None,
            }
        )

    @app.get("/metrics", response_class=Response, tags=["state"])
    def numbers() -> Response:
        """Counters and histograms in Prometheus' text format."""
        return Response(server.metrics.text(), media_type=CONTENT_TYPE_LATEST)
