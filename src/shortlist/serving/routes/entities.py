"""Items and users as they are now: told at any time, in force from the next answer on."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, TypeVar

from fastapi import Body, FastAPI, Path, Response
from pydantic import BaseModel, ConfigDict, Discriminator, Field, StrictBool, StrictInt, StrictStr, Tag

from shortlist.cascade.upkeep import Forgotten, Upkeep, Upserted
from shortlist.errors import ConfigError, DataError
from shortlist.serving.routes.common import REFUSALS, Server, plain_json
from shortlist.serving.schemas import Finite, Id, Problem, Text
from shortlist.store.catalogue import MAX_ATTRIBUTES, ItemUpdate
from shortlist.store.events import MAX_ID_CHARS

_T = TypeVar("_T")
Plain = StrictBool | StrictInt | Finite | StrictStr
Attributes = Annotated[
    dict[Text, Plain | list[Plain] | None],
    Field(
        max_length=MAX_ATTRIBUTES,
        description="Values by column of the table that the run was trained with; null = missing.",
    ),
]


class ItemIn(BaseModel):
    """What is new about an item; what is left out stays as it was."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    item: Id
    title: Annotated[str, Field(strict=True, max_length=4_096)] | None = None
    attributes: Attributes = {}
    available: bool = Field(default=True, strict=True, description="False = shown no more.")

    def update(self) -> ItemUpdate:
        """As the store takes it."""
        return ItemUpdate(item=self.item, title=self.title, attributes=self.attributes, available=self.available)


class UserIn(BaseModel):
    """What is new about a user; what is left out stays as it was."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    user: Id
    attributes: Attributes


def _one_or_many(given: Any) -> str:
    return "(many)" if isinstance(given, list) else "(one)"


Items = Annotated[Annotated[ItemIn, Tag("(one)")] | Annotated[list[ItemIn], Tag("(many)")], Discriminator(_one_or_many)]
Users = Annotated[Annotated[UserIn, Tag("(one)")] | Annotated[list[UserIn], Tag("(many)")], Discriminator(_one_or_many)]
AnId = Annotated[str, Path(min_length=1, max_length=MAX_ID_CHARS, description="Any id, known or not.")]
UNAVAILABLE: dict[int | str, dict[str, Any]] = {
    503: {"model": Problem, "description": "Nothing can be kept now; nothing of this was."}
}
OUTCOMES: dict[int | str, dict[str, Any]] = {200: {"model": Upserted}, **REFUSALS, **UNAVAILABLE}


def add(app: FastAPI, server: Server) -> None:
    """POST /v1/items, DELETE /v1/items/{item}, POST /v1/users and DELETE /v1/users/{user}."""
    engine, most = server.engine, server.config.max_events

    def upkeep() -> Upkeep:
        if engine.upkeep is None:
            raise ConfigError("this server keeps nothing; start it with --events PATH")
        return engine.upkeep

    def listed(body: _T | list[_T]) -> list[_T]:
        given = body if isinstance(body, list) else [body]
        if len(given) > most:
            raise DataError(f"{len(given):,} entries in one body; at most {most:,} are taken")
        return given

    @app.post("/v1/items", responses=OUTCOMES, response_model=None, tags=["items and users"])
    def upsert_items(body: Annotated[Items, Body()]) -> Response:
        """Keep titles, attributes and availability of one item or a list of them; rules and titles follow from the next answer on."""
        updates = [item.update() for item in listed(body)]
        return plain_json(asdict(upkeep().upsert_items(engine.live, updates)))

    @app.delete("/v1/items/{item:path}", responses=OUTCOMES, response_model=None, tags=["items and users"])
    def remove_item(item: AnId) -> Response:
        """Show an item no more; telling of it again brings it back."""
        return plain_json(asdict(upkeep().remove_items(engine.live, [item])))

    @app.post("/v1/users", responses=OUTCOMES, response_model=None, tags=["items and users"])
    def upsert_users(body: Annotated[Users, Body()]) -> Response:
        """Keep attributes of one user or a list of them; rankers read them from the next answer on."""
        attributes: dict[str, dict[str, Any]] = {}
        for user in listed(body):
            attributes.setdefault(user.user, {}).update(user.attributes)
        return plain_json(asdict(upkeep().upsert_users(engine.live, attributes)))

    @app.delete(
        "/v1/users/{user:path}",
        responses={200: {"model": Forgotten}, 422: REFUSALS[422], **UNAVAILABLE},
        response_model=None,
        tags=["items and users"],
    )
    def forget_user(user: AnId) -> Response:
        """Wipe a user's attributes, events, answers and memories from the files, and know the user no more."""
        return plain_json(asdict(engine.forget(user)))
