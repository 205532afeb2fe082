"""What requests may cost on average: seen and set while the server runs. Off unless the settings allow the admin's routes."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from pydantic import BaseModel, ConfigDict, Field

from shortlist.cascade.allocation.base import RESOURCES, Budget
from shortlist.cascade.allocation.calibration import allocation_path
from shortlist.cascade.engine import Engine
from shortlist.cascade.live import Live
from shortlist.serving.routes.common import REFUSALS, Server, plain_json


class BudgetIn(BaseModel):
    """What a request may cost on average; without any limit, as the run was calibrated."""

    model_config = ConfigDict(extra="forbid")

    ms: float | None = Field(None, gt=0, allow_inf_nan=False, strict=True, description="Milliseconds of compute.")
    mflop: float | None = Field(None, gt=0, allow_inf_nan=False, strict=True, description="1e6 FLOPs.")


def add(app: FastAPI, server: Server) -> None:
    """GET and PUT /v1/admin/budget, and GET /v1/admin/budget/curve, where the settings allow them."""
    if not server.config.admin:
        return

    @app.get("/v1/admin/budget", response_model=None, tags=["admin"])
    def budget() -> Response:
        """The budget, the prices and the cap that hold now, and the chains with what each costs."""
        return plain_json(_told(server.engine))

    @app.put("/v1/admin/budget", responses=REFUSALS, response_model=None, tags=["admin"])
    def set_budget(body: BudgetIn) -> Response:
        """Let a request cost this much on average from now on, until the server stops; refused where the run is not calibrated."""
        server.budgets.set(Budget(ms=body.ms, mflop=body.mflop))
        return plain_json(_told(server.engine))

    @app.get("/v1/admin/budget/curve", response_model=None, tags=["admin"])
    def curve() -> Response:
        """Quality against cost: the chains as they were calibrated, and what `shortlist budget` found of the allocators."""
        return plain_json(_curve(server.engine.live))


def _told(engine: Engine) -> dict[str, Any]:
    live = engine.live
    governor = live.governor
    if governor is None:
        why = (
            live.problems[0] if live.problems else "this run is not calibrated, so every request gets the default chain"
        )
        return {"snapshot_version": live.version, "is_calibrated": False, "why": why}
    chains = governor.allocator.chains
    return {
        "snapshot_version": live.version,
        "is_calibrated": True,
        "budget": asdict(governor.allocator.budget),
        "calibrated": asdict(governor.calibrated),
        "follows_traffic": governor.prices is not None,
        "prices": dict(zip(RESOURCES, governor.allocator.prices_C.tolist())),
        "cap_ms": governor.cap_ms,
        "chains": [
            {"name": name, **dict(zip(RESOURCES, costs))} for name, costs in zip(chains.names, chains.costs_JC.tolist())
        ],
    }


def _curve(live: Live) -> dict[str, Any]:
    """What files beside the run say; null for what is not there."""
    told: dict[str, Any] = {"snapshot_version": live.version, "calibration": None, "report": None}
    if live.folder is None:
        return told
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = _read(allocation_path(live.folder) / "summary.json")
        if found["version"] == live.version:
            chains = [{key: chain[key] for key in ("name", "ms", "mflop", "worth")} for chain in found["chains"]]
            told["calibration"] = {"worth": found["worth"], "default": found["default"]["name"], "chains": chains}
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = _read(live.folder.with_name(f"{live.folder.name}-report") / "budget.json")
        if found["calibration"]["version"] == live.version:
            told["report"] = {key: found[key] for key in ("sentence", "window", "frontier")}
    return told


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
