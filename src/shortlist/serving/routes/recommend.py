"""Pages for a person."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Path, Query, Response

from shortlist.cascade.answers import Answer
from shortlist.cascade.questions import Question
from shortlist.serving.routes.common import OVERLOADED, REFUSALS, Server, plain_json
from shortlist.serving.schemas import RecommendIn
from shortlist.store.events import MAX_ID_CHARS

ANSWERS: dict[int | str, dict[str, Any]] = {200: {"model": Answer}, 422: REFUSALS[422], **OVERLOADED}


def add(app: FastAPI, server: Server) -> None:
    """GET /v1/recommend/{user} and POST /v1/recommend."""

    @app.get("/v1/recommend/{user:path}", responses=ANSWERS, response_model=None, tags=["recommend"])
    async def recommend(
        user: Annotated[str, Path(min_length=1, max_length=MAX_ID_CHARS, description="Any id, known or not.")],
        k: Annotated[int | None, Query(ge=1, description="Items wanted; without it, a page of the surface.")] = None,
    ) -> Response:
        """The page of one user."""
        return plain_json((await server.ask(Question(user=user, k=k))).to_dict())

    @app.post("/v1/recommend", responses={**ANSWERS, **REFUSALS}, response_model=None, tags=["recommend"])
    async def recommend_with(body: RecommendIn) -> Response:
        """A page with a history, context, candidates, rules or a budget of the request's own."""
        return plain_json((await server.ask(body.question())).to_dict())
