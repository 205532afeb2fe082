"""The HTTP surface: a thin skin on the engine.

    GET  /v1/recommend/{user}?k=10     POST /v1/recommend     POST /v1/events
    GET  /v1/search?q=red+mug          POST /v1/search
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

from shortlist._version import __version__
from shortlist.cascade.engine import Engine
from shortlist.serving.batching import Batcher
from shortlist.serving.gate import Gate, add_error_handlers
from shortlist.serving.metrics import Metrics
from shortlist.serving.routes import events, recommend, search, state
from shortlist.serving.routes.common import Server
from shortlist.serving.settings import ServerConfig


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
    server = Server(engine=engine, batcher=batcher, metrics=metrics, config=config)
    for routes in (recommend, search, events, state):
        routes.add(app, server)
    return app
