"""Why an answered page looked as it did."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Path, Query, Response

from shortlist.cascade.why import Why, why
from shortlist.serving.problems import problem
from shortlist.serving.routes.common import REFUSALS, Server, plain_json
from shortlist.serving.schemas import Problem
from shortlist.store.events import MAX_ID_CHARS

ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"model": Why},
    404: {"model": Problem, "description": "The request is not, or no longer, in the log."},
    422: REFUSALS[422],
}


def add(app: FastAPI, server: Server) -> None:
    """GET /v1/explain/{request_id}."""

    @app.get("/v1/explain/{request_id}", responses=ANSWERS, response_model=None, tags=["explain"])
    def explain(
        request_id: Annotated[str, Path(min_length=1, max_length=64, description="As an answer gave it.")],
        item: Annotated[
            str | None,
            Query(
                min_length=1, max_length=MAX_ID_CHARS, description="An item, shown or not, to be told of in `asked`."
            ),
        ] = None,
    ) -> Response:
        """Who found each item at which place, what every stage made of it, what moved its score, and what rules did."""
        told = why(server.engine, request_id, item)
        if told is None:
            return problem(
                404, f"request {request_id!r} is not in the request log; only the newest answers are kept there"
            )
        return plain_json(told.to_dict())
