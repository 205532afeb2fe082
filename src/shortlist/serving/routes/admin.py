"""What whoever runs the server may do: see and change the snapshot that is served, and look at the shadow. Off unless it is asked for."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import FastAPI, Response
from pydantic import BaseModel, ConfigDict, Field

from shortlist.errors import ConfigError
from shortlist.serving.routes.common import REFUSALS, Server, plain_json
from shortlist.serving.watching import Watcher

_VERSION = Field(pattern=r"^[0-9a-f]{12}$", description="A version of the place that is served.")


class PublishIn(BaseModel):
    """Which version to serve."""

    model_config = ConfigDict(extra="forbid")
    version: Annotated[str, _VERSION]


class RollbackIn(BaseModel):
    """Which version to go back to."""

    model_config = ConfigDict(extra="forbid")
    version: Annotated[str | None, _VERSION] = None
    """Without it, the one that was published before the current one."""


def add(app: FastAPI, server: Server) -> None:
    """GET /v1/admin/snapshots, POST /v1/admin/publish, POST /v1/admin/rollback and GET /v1/admin/shadow, where the settings allow them."""
    if not server.config.admin:
        return

    @app.get("/v1/admin/snapshots", responses={422: REFUSALS[422]}, response_model=None, tags=["admin"])
    def snapshots() -> Response:
        """Versions of the place that is served, which of them is current, and which this process serves."""
        return plain_json(_told(_watcher(server)))

    @app.post("/v1/admin/publish", responses=REFUSALS, response_model=None, tags=["admin"])
    def publish(body: PublishIn) -> Response:
        """Make a version the current one; this process serves it when the answer comes, others of the place follow within seconds."""
        watcher = _watcher(server)
        watcher.serve(body.version)
        return plain_json(_told(watcher))

    @app.post("/v1/admin/rollback", responses=REFUSALS, response_model=None, tags=["admin"])
    def rollback(body: RollbackIn) -> Response:
        """Go back to a version, else to the one that was published before the current one."""
        watcher = _watcher(server)
        watcher.rollback(body.version)
        return plain_json(_told(watcher))

    @app.get("/v1/admin/shadow", responses={422: REFUSALS[422]}, response_model=None, tags=["admin"])
    def shadow() -> Response:
        """How the answers of the shadow run compare with those that are served."""
        if server.shadow is None:
            raise ConfigError("no run is tried in the shadow; start the server with --shadow RUN")
        return plain_json(asdict(server.shadow.summary()))


def _watcher(server: Server) -> Watcher:
    if server.watcher is None:
        raise ConfigError(
            "this server serves a single run; publish runs to a place (shortlist publish RUN --to PLACE) and serve that"
        )
    return server.watcher


def _told(watcher: Watcher) -> dict[str, Any]:
    return {**asdict(watcher.state()), **asdict(watcher.following)}
