"""The HTTP surface: a thin skin on the engine.

    GET  /v1/recommend/{user}?k=10     POST /v1/recommend     POST /v1/events
    GET  /v1/health/live               GET  /v1/health/ready  GET  /metrics     GET /docs

Requests for pages are answered in batches by a few workers (batching.py); other routes are plain functions, so they run in a pool of
threads and a slow one keeps nobody else waiting. Errors are {"error": "one sentence"}: 400 not JSON, 413 too long, 415 not declared
as JSON, 422 not what was asked for, 503 events can not be kept now, or too many requests wait. An unknown id is no error. The page at
/docs and all it needs come from this server.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Annotated, Any

import anyio.to_thread
from fastapi import Body, FastAPI, Path, Query, Response
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST

from shortlist._version import __version__
from shortlist.cascade.answers import Answer
from shortlist.cascade.engine import LAST_RESORT, Engine
from shortlist.cascade.questions import Question
from shortlist.errors import DataError
from shortlist.serving.batching import Batcher, Late, Overloaded
from shortlist.serving.gate import Gate, add_error_handlers, problem
from shortlist.serving.metrics import Metrics
from shortlist.serving.schemas import OneOrMany, Problem, RecommendIn, RecordedOut
from shortlist.serving.settings import ServerConfig
from shortlist.store.events import MAX_ID_CHARS, StoreUnavailable

REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The body is not JSON."},
    413: {"model": Problem, "description": "The body is too long."},
    415: {"model": Problem, "description": "The body is not declared as JSON."},
    422: {"model": Problem, "description": "Something in the request is not what it should be."},
}


def create_app(engine: Engine, config: ServerConfig | None = None) -> FastAPI:
    """The application for `engine`, which stays the caller's to close."""
    config = config or ServerConfig()
    batcher = Batcher(lambda questions, left_ms: engine.answer(questions, deadline_ms=left_ms), config)
    metrics = Metrics(engine, batcher)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = config.num_threads
        yield
        batcher.close()

    app = FastAPIOffline(
        title="Shortlist",
        version=__version__,
        description="Recommendations from a trained cascade.",
        redoc_url=None,
        lifespan=lifespan,
    )
    app.add_middleware(Gate, metrics=metrics, max_body_bytes=config.max_body_bytes)
    add_error_handlers(app)
    _add_recommend(app, engine, batcher, metrics)
    _add_events(app, engine, metrics, config.max_events)
    _add_state(app, engine, metrics)
    return app


def _add_recommend(app: FastAPI, engine: Engine, batcher: Batcher, metrics: Metrics) -> None:
    answers: dict[int | str, dict[str, Any]] = {
        200: {"model": Answer},
        422: REFUSALS[422],
        503: {"model": Problem, "description": "More requests wait than can be answered in time."},
    }

    async def answer(question: Question) -> Response:
        began = time.perf_counter()
        try:
            made = await batcher.ask(question)
        except Late as error:
            made = engine.last_resort(question, str(error))
        except Overloaded:
            engine.answered((time.perf_counter() - began) * 1e3, failed=True)
            raise
        engine.answered((time.perf_counter() - began) * 1e3, failed=made.chain == LAST_RESORT)
        metrics.page(made)
        return _json(made.to_dict())

    @app.get("/v1/recommend/{user:path}", responses=answers, response_model=None, tags=["recommend"])
    async def recommend(
        user: Annotated[str, Path(min_length=1, max_length=MAX_ID_CHARS, description="Any id, known or not.")],
        k: Annotated[int | None, Query(ge=1, description="Items wanted; without it, a page of the surface.")] = None,
    ) -> Response:
        """The page of one user."""
        return await answer(Question(user=user, k=k))

    @app.post("/v1/recommend", responses={**answers, **REFUSALS}, response_model=None, tags=["recommend"])
    async def recommend_with(body: RecommendIn) -> Response:
        """A page with a history, context, candidates, rules or a budget of the request's own."""
        return await answer(body.question())


def _add_events(app: FastAPI, engine: Engine, metrics: Metrics, max_events: int) -> None:
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
        return _json(asdict(recorded))


def _add_state(app: FastAPI, engine: Engine, metrics: Metrics) -> None:
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
        return _json(
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
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _json(content: dict[str, Any]) -> Response:
    """Plain values as they are: the engine made them, so nothing has to be checked again on the way out."""
    return Response(json.dumps(content, ensure_ascii=False, allow_nan=False), media_type="application/json")
