"""Experiments: which are there, and an end to one."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Body, FastAPI, Path, Response
from pydantic import BaseModel, ConfigDict, Field

from shortlist.cascade.trials import Trials
from shortlist.errors import ConfigError
from shortlist.serving.routes.common import REFUSALS, Server, plain_json
from shortlist.store.events import MAX_ID_CHARS

Name = Annotated[str, Path(min_length=1, max_length=MAX_ID_CHARS, description="Of an experiment.")]


class StopIn(BaseModel):
    """An end to an experiment."""

    model_config = ConfigDict(extra="forbid")
    reason: str = Field("by hand", min_length=1, max_length=500, description="Why, for the report.")


def add(app: FastAPI, server: Server) -> None:
    """GET /v1/experiments and POST /v1/experiments/{name}/stop."""

    @app.get("/v1/experiments", response_model=None, tags=["experiments"])
    def experiments() -> Response:
        """Experiments of this server: variants and shares, pages by variant since it started, and why those that are over were stopped."""
        return plain_json({"experiments": [] if server.trials is None else _told(server.trials)})

    @app.post("/v1/experiments/{name}/stop", responses=REFUSALS, response_model=None, tags=["experiments"])
    def stop(name: Name, body: Annotated[StopIn, Body()]) -> Response:
        """End an experiment for good: everyone is served as if it did not exist, here at once, on other servers within seconds."""
        if server.trials is None:
            raise ConfigError("this server runs no experiments; start it with --experiments FILE")
        server.trials.stop(name, body.reason)
        return plain_json({"experiments": _told(server.trials)})


def _told(trials: Trials) -> list[dict[str, Any]]:
    stopped, shown = trials.stopped, dict(trials.shown)
    return [
        {
            "name": name,
            "surface": one.settings.surface,
            "traffic": one.settings.traffic,
            "interleave": one.settings.interleave,
            "primary": one.primary,
            "shares": one.shares,
            "pages": {variant: count for (owner, variant), count in shown.items() if owner == name},
            "running": one.settings.running and name not in stopped,
            "stopped": stopped.get(name),
        }
        for name, one in trials.experiments.items()
    ]
