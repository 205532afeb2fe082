"""Pages for a person who typed something."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from fastapi import FastAPI, Query, Response
from pydantic import Field

from shortlist.cascade.questions import Question
from shortlist.serving.routes.common import REFUSALS, Server, plain_json
from shortlist.serving.routes.recommend import ANSWERS
from shortlist.serving.schemas import RecommendIn
from shortlist.store.events import MAX_ID_CHARS

Typed = Annotated[str, Query(min_length=1, description="What somebody typed.")]


class SearchIn(RecommendIn):
    """A request for a page of items that match a query; the rest as for a page without one."""

    query: str = Field(min_length=1, strict=True, description="What somebody typed.")

    def question(self) -> Question:
        """As the engine takes it."""
        return replace(super().question(), query=self.query)


def add(app: FastAPI, server: Server) -> None:
    """GET and POST /v1/search."""

    @app.get("/v1/search", responses=ANSWERS, response_model=None, tags=["search"])
    async def search(
        q: Typed,
        user: Annotated[
            str | None,
            Query(min_length=1, max_length=MAX_ID_CHARS, description="Any id; without it, nobody in particular."),
        ] = None,
        k: Annotated[int | None, Query(ge=1, description="Items wanted; without it, a page of the surface.")] = None,
    ) -> Response:
        """Items whose text matches, in an order that knows the user; none where none matches, and `note` says so."""
        return plain_json((await server.ask(Question(user=user, k=k, query=q))).to_dict())

    @app.post("/v1/search", responses={**ANSWERS, **REFUSALS}, response_model=None, tags=["search"])
    async def search_with(body: SearchIn) -> Response:
        """The same with a history, context, candidates, rules or a budget of the request's own."""
        return plain_json((await server.ask(body.question())).to_dict())
