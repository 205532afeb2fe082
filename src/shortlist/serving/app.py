"""The HTTP surface: a thin skin on the engine.

    GET  /v1/recommend/{user}?k=10     POST /v1/recommend     POST /v1/events
    GET  /v1/search?q=red+mug          POST /v1/search
    POST /v1/ads, /v1/ads/click        GET, PUT /v1/ads/campaigns       GET, DELETE /v1/ads/campaigns/{campaign}
    GET  /v1/similar/{item}?k=10       POST /v1/similar       GET  /v1/explain/{request_id}
    POST /v1/items  DELETE /v1/items/{item}      POST /v1/users  DELETE /v1/users/{user}
    GET  /v1/admin/health, budget, budget/curve               PUT  /v1/admin/budget
    GET  /v1/admin/snapshots, shadow   POST /v1/admin/publish, rollback                       (where the settings allow it)
    GET  /v1/experiments               POST /v1/experiments/{name}/stop
    GET  /v1/health/live               GET  /v1/health/ready  GET  /metrics     GET /docs

Requests for pages are answered in batches by a few workers (batching.py); other routes are plain functions, so they run in a pool of
threads and a slow one keeps nobody else waiting. Errors are {"error": "one sentence"}: 400 not JSON, 413 too long, 415 not declared
as JSON, 422 not what was asked for, 503 events can not be kept now, or too many requests wait. An unknown id is no error. The page at
/docs and all it needs come from this server.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio.to_thread
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware

from shortlist._version import __version__
from shortlist.cascade.engine import Engine
from shortlist.cascade.trials import Trials
from shortlist.serving.batching import Batcher
from shortlist.serving.budgeting import Budgets
from shortlist.serving.experimenting import TrialNumbers
from shortlist.serving.gate import Gate, add_error_handlers
from shortlist.serving.guard import describe_keys
from shortlist.serving.metrics import Metrics
from shortlist.serving.routes import (
    admin,
    ads,
    budget,
    entities,
    events,
    experiments,
    explain,
    health,
    recommend,
    search,
    similar,
    state,
)
from shortlist.serving.routes.common import Server
from shortlist.serving.settings import ServerConfig
from shortlist.serving.shadow import Shadow, ShadowNumbers
from shortlist.serving.watching import Watcher, WatcherNumbers


def create_app(
    engine: Engine,
    config: ServerConfig | None = None,
    *,
    watcher: Watcher | None = None,
    shadow: Shadow | None = None,
    budgets: Budgets | None = None,
    trials: Trials | None = None,
) -> FastAPI:
    """The application for `engine`, which stays the caller's to close, and so do what follows its place and the shadow beside it."""
    config = config or ServerConfig()
    answering = engine if trials is None else trials
    batcher = Batcher(lambda questions, left_ms: answering.answer(questions, deadline_ms=left_ms), config)
    metrics = Metrics(engine, batcher)
    if watcher is not None:
        metrics.registry.register(WatcherNumbers(watcher))
    if shadow is not None:
        metrics.registry.register(ShadowNumbers(shadow))
    if trials is not None:
        metrics.registry.register(TrialNumbers(trials))

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
    app.add_middleware(Gate, metrics=metrics, config=config)
    if config.keys is not None:
        describe_keys(app)
    if config.cors:  # around the gate: a browser asks without a key whether it may ask
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["authorization", "content-type", "x-api-key", "x-request-id"],
            expose_headers=["retry-after", "x-request-id"],
        )
    add_error_handlers(app)
    server = Server(
        engine=engine,
        batcher=batcher,
        metrics=metrics,
        config=config,
        budgets=budgets or Budgets(engine),
        watcher=watcher,
        shadow=shadow,
        trials=trials,
    )
    for routes in (
        recommend,
        search,
        ads,
        similar,
        explain,
        events,
        entities,
        state,
        admin,
        budget,
        experiments,
        health,
    ):
        routes.add(app, server)
    return app
