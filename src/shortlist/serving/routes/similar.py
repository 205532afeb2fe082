"""Items like an item."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Path, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from shortlist.cascade.rules import Rules
from shortlist.cascade.similar import Similar
from shortlist.serving.routes.common import REFUSALS, Server, plain_json
from shortlist.serving.schemas import Id
from shortlist.store.events import MAX_ID_CHARS

ANSWERS: dict[int | str, dict[str, Any]] = {200: {"model": Similar}, 422: REFUSALS[422]}


class SimilarIn(BaseModel):
    """A request for items like an item."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    item: Id
    k: int | None = Field(None, ge=1, strict=True, description="Items wanted; without it, a page of the surface.")
    rules: Rules | None = Field(
        None, description="Over the surface's own; what is said of seen items has no meaning here."
    )


def add(app: FastAPI, server: Server) -> None:
    """GET /v1/similar/{item} and POST /v1/similar."""

    @app.get("/v1/similar/{item:path}", responses=ANSWERS, response_model=None, tags=["similar"])
    def similar(
        item: Annotated[str, Path(min_length=1, max_length=MAX_ID_CHARS, description="Any id, known or not.")],
        k: Annotated[int | None, Query(ge=1, description="Items wanted; without it, a page of the surface.")] = None,
    ) -> Response:
        """The items most like one. Of an unknown item the list is empty, and `ignored` says so."""
        return plain_json(server.engine.similar(item, k).to_dict())

    @app.post("/v1/similar", responses={**ANSWERS, **REFUSALS}, response_model=None, tags=["similar"])
    def similar_with(body: SimilarIn) -> Response:
        """The same with rules of the request's own."""
        return plain_json(server.engine.similar(body.item, body.k, rules=body.rules).to_dict())
