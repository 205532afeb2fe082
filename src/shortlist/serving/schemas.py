"""Bodies that the server takes, checked before anything is done with them."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    WithJsonSchema,
)

from shortlist.cascade.allocation.base import Budget
from shortlist.cascade.pasts import PastEvent
from shortlist.cascade.questions import Question
from shortlist.cascade.rules import Rules
from shortlist.errors import ConfigError
from shortlist.store.events import MAX_ID_CHARS, MAX_TIMESTAMP, Event

Text = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=MAX_ID_CHARS)]


def _id_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _seconds(value: Any) -> Any:
    """Seconds from a number or ISO 8601 text; without a zone it is UTC."""
    if isinstance(value, str):
        moment = datetime.fromisoformat(value)
        value = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < MAX_TIMESTAMP:
        raise ValueError("it must be seconds since 1970 (not milliseconds) or ISO 8601 text")
    return value


_TEXT_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_ID_CHARS}
Id = Annotated[Text, BeforeValidator(_id_text), WithJsonSchema({"anyOf": [_TEXT_SCHEMA, {"type": "integer"}]})]
"""Text or a whole number; both find the same item."""
Time = Annotated[
    float,
    BeforeValidator(_seconds),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "format": "date-time"}]}),
]
"""Seconds since 1970 UTC, or ISO 8601."""
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class PastIn(_Body):
    """An event of a history that a request brings."""

    item: Id
    timestamp: Time | None = None
    action: Text | None = None
    value: Finite | None = None

    def past(self) -> PastEvent:
        """As the engine takes it."""
        return PastEvent(item=self.item, timestamp=self.timestamp, action=self.action, value=self.value)


PastOrId = Annotated[
    Annotated[Id, Tag("(id)")] | Annotated[PastIn, Tag("(event)")],
    Discriminator(lambda given: "(event)" if isinstance(given, dict | PastIn) else "(id)"),
]


class RecommendIn(_Body):
    """A request for a page."""

    user: Id | None = Field(None, description="Who is asking; an unknown one is a person without a past.")
    k: int | None = Field(None, ge=1, strict=True, description="Items wanted; without it, a page of the surface.")
    history: list[PastOrId] | None = Field(
        None,
        description="What the user did, oldest first, in place of what is on record: item ids, or objects with times.",
    )
    context: dict[Text, str | bool | int | Finite | None] | None = Field(
        None, description="Values of the context columns the run was trained with."
    )
    candidates: list[Id] | None = Field(None, min_length=1, description="The only items to choose from.")
    allow: list[Id] | None = Field(None, description="Only these items may be shown; an empty list allows none.")
    deny: list[Id] = Field(default=[], description="None of these items may be shown.")
    seen: Literal["keep", "drop"] | None = Field(
        None, description="Whether items of the user's history may be shown; without it, as the surface says."
    )
    rules: Rules | None = Field(
        None,
        description="Which items may be shown and how the page is laid out, over the surface's own rules; allow, deny and seen "
        "beside it are short for rules that only name those.",
    )
    at: Time | None = Field(None, description="Moment to answer for: later events are not read. Without it, now.")

    budget_ms: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="What this request may cost at most, in milliseconds of compute."
    )
    budget_mflop: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="What this request may cost at most, in 1e6 FLOPs."
    )
    chain: Text | None = Field(None, description="Chain to answer by; without it, the allocator's choice.")
    session: Id | None = Field(
        None, description="Whom experiments tell apart where no user is named: a session, a device."
    )

    def question(self) -> Question:
        """As the engine takes it."""
        return Question(
            user=self.user,
            k=self.k,
            history=self.past(),
            context=self.context or {},
            candidates=self.candidates,
            rules=self.ruled(),
            at=self.at,
            budget=Budget(ms=self.budget_ms, mflop=self.budget_mflop),
            chain=self.chain,
            session=self.session,
        )

    def ruled(self) -> Rules:
        """As the engine takes them; ConfigError where they are given in both ways."""
        if self.rules is None:
            return Rules(allow=self.allow, deny=self.deny, seen=self.seen)
        if self.allow is not None or self.deny or self.seen is not None:
            raise ConfigError("give either rules, or allow, deny and seen, not both")
        return self.rules

    def past(self) -> list[str | PastEvent] | None:
        """As the engine takes it."""
        if self.history is None:
            return None
        return [event.past() if isinstance(event, PastIn) else event for event in self.history]


class EventIn(_Body):
    """One thing a user did."""

    user: Id
    item: Id
    timestamp: Time | None = Field(None, description="When; without it, now.")
    action: Text | None = Field(None, description="What; without it, the first action of the log.")
    value: Finite | None = Field(None, description="Money or another worth; without it, 1.")
    event_id: Text | None = Field(None, description="Your own number: an event sent again under it is kept once.")

    def event(self) -> Event:
        """As the store takes it."""
        return Event(
            user=self.user,
            item=self.item,
            timestamp=time.time() if self.timestamp is None else self.timestamp,
            action=self.action,
            value=self.value,
            event_id=self.event_id,
        )


OneOrMany = Annotated[
    Annotated[EventIn, Tag("(one)")] | Annotated[list[EventIn], Tag("(many)")],
    Discriminator(lambda given: "(many)" if isinstance(given, list) else "(one)"),
]


class RecordedOut(BaseModel):
    """What became of events; all of them are durable."""

    num_new: int
    num_repeated: int
    num_unknown_users: int
    num_unknown_items: int
    num_unknown_actions: int


class Problem(BaseModel):
    """Why a request was not answered."""

    error: str
