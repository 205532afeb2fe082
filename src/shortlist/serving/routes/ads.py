"""Ads for a page, the clicks on them, and the campaigns behind."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import Body, FastAPI, Path, Response
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from shortlist.cascade.ads import AdCandidate, AdsAnswer
from shortlist.cascade.pasts import PastEvent
from shortlist.cascade.rules import NO_RULES, Rules
from shortlist.errors import DataError
from shortlist.serving.problems import problem
from shortlist.serving.routes.common import REFUSALS, Server, plain_json
from shortlist.serving.schemas import Finite, Id, PastIn, PastOrId, Problem, Text, Time
from shortlist.store.ads import MAX_ITEMS, MAX_MONEY, Campaign, Charge
from shortlist.store.events import MAX_ID_CHARS

Money = Annotated[float, Field(ge=0, le=MAX_MONEY, allow_inf_nan=False, strict=True)]
UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "There is no such campaign."}}
UNAVAILABLE: dict[int | str, dict[str, Any]] = {
    503: {"model": Problem, "description": "Nothing can be kept now; nothing of this was."}
}
Name = Annotated[str, Path(min_length=1, max_length=MAX_ID_CHARS, description="Name of a campaign.")]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class AdCandidateIn(_Body):
    """An item that takes part in the auction."""

    campaign: Text = Field(description="Registered or not; one that is not has no budget.")
    item: Id
    bid: Money | None = Field(None, description="The most a click may cost; without it, the registered campaign's.")

    def candidate(self) -> AdCandidate:
        """As the engine takes it."""
        return AdCandidate(campaign=self.campaign, item=self.item, bid=self.bid)


class AdsIn(_Body):
    """A request for ads."""

    user: Id | None = Field(None, description="Who sees the page; an unknown one is a person without a past.")
    slots: int = Field(1, ge=1, strict=True, description="Places wanted.")
    candidates: list[AdCandidateIn] | None = Field(
        None, min_length=1, description="The only items that take part; without it, those of all registered campaigns."
    )
    history: list[PastOrId] | None = Field(
        None, description="What the user did, oldest first, in place of what is on record."
    )
    context: dict[Text, str | bool | int | Finite | None] | None = Field(
        None, description="Values of the context columns the run was trained with."
    )
    rules: Rules | None = Field(None, description="Which items may be shown, over the surface's own rules.")

    def past(self) -> list[str | PastEvent] | None:
        """As the engine takes it."""
        if self.history is None:
            return None
        return [event.past() if isinstance(event, PastIn) else event for event in self.history]


class ClickIn(_Body):
    """A click on an ad."""

    request_id: Text = Field(description="Of the answer that held the ad.")
    slot: int = Field(ge=1, le=2**31 - 1, strict=True, description="Place of the ad.")


class CampaignIn(_Body):
    """A campaign as it is to be."""

    campaign: Text
    budget: Money = Field(description="All that its clicks may cost together.")
    bid: Money = Field(description="The most that one click may cost.")
    items: list[Id] = Field(min_length=1, max_length=MAX_ITEMS, description="What may be shown for it.")
    reserve: Money = Field(0.0, description="Least price of a click.")
    start: Time | None = Field(None, description="When it begins; without it, at once.")
    end: Time | None = Field(
        None, description="When it ends; without it, when its money is spent, and it is not paced."
    )
    pacing: Literal["bid", "throttle", "none"] = "bid"
    max_per_day: int | None = Field(None, ge=1, le=10**6, strict=True, description="Most ads of it for one user a day.")

    def kept(self) -> Campaign:
        """As the store takes it."""
        return Campaign(**{**dict(self), "items": tuple(self.items)})


class CampaignOut(CampaignIn):
    """A campaign and its money."""

    spent: float = Field(description="Charged for clicks.")
    reserved: float = Field(description="Set aside for clicks on ads that people still see.")
    expected: float = Field(description="What of that is likely to be charged.")
    left: float = Field(description="What a click may cost now.")


OneOrMany = Annotated[
    Annotated[CampaignIn, Tag("(one)")] | Annotated[list[CampaignIn], Tag("(many)")],
    Discriminator(lambda given: "(many)" if isinstance(given, list) else "(one)"),
]


def add(app: FastAPI, server: Server) -> None:
    """POST /v1/ads and /v1/ads/click; GET and PUT /v1/ads/campaigns; GET and DELETE /v1/ads/campaigns/{campaign}."""
    ads, most = server.engine.ads, server.config.max_events

    @app.post("/v1/ads", responses={200: {"model": AdsAnswer}, **REFUSALS}, response_model=None, tags=["ads"])
    def choose(body: AdsIn) -> Response:
        """Ads for a page, best place first: by calibrated chance of a click x bid, each at the least price that keeps its place."""
        answer = ads(
            body.user,
            body.slots,
            candidates=None if body.candidates is None else [candidate.candidate() for candidate in body.candidates],
            history=body.past(),
            context=body.context,
            rules=body.rules or NO_RULES,
            deadline_ms=server.config.time_limit_ms,
        )
        server.metrics.ads(answer)
        return plain_json(answer.to_dict())

    @app.post(
        "/v1/ads/click",
        responses={200: {"model": Charge}, **REFUSALS, **UNAVAILABLE},
        response_model=None,
        tags=["ads"],
    )
    def click(body: ClickIn) -> Response:
        """Charge a click, once however often it is told. When this answers, the charge is durable."""
        charge = ads.click(body.request_id, body.slot)
        server.metrics.click(charge)
        return plain_json(asdict(charge))

    @app.get(
        "/v1/ads/campaigns",
        responses={200: {"model": list[CampaignOut]}, **UNAVAILABLE},
        response_model=None,
        tags=["ads"],
    )
    def campaigns() -> Response:
        """All campaigns and their money, by name."""
        return plain_json([account.to_dict() for account in ads.kept.accounts()])

    @app.put(
        "/v1/ads/campaigns",
        responses={200: {"model": list[CampaignOut]}, **REFUSALS, **UNAVAILABLE},
        response_model=None,
        tags=["ads"],
    )
    def put(body: Annotated[OneOrMany, Body()]) -> Response:
        """Keep one campaign or a list of them, new or in place of what they were; all or none. What was spent stays spent."""
        given = body if isinstance(body, list) else [body]
        if len(given) > most:
            raise DataError(f"{len(given):,} campaigns in one body; at most {most:,} are taken")
        return plain_json([account.to_dict() for account in ads.kept.put(*(campaign.kept() for campaign in given))])

    @app.get(
        "/v1/ads/campaigns/{campaign:path}",
        responses={200: {"model": CampaignOut}, 422: REFUSALS[422], **UNKNOWN, **UNAVAILABLE},
        response_model=None,
        tags=["ads"],
    )
    def campaign_of(campaign: Name) -> Response:
        """One campaign and its money."""
        account = ads.kept.account(campaign)
        return _missing(campaign) if account is None else plain_json(account.to_dict())

    @app.delete(
        "/v1/ads/campaigns/{campaign:path}",
        responses={200: {"model": CampaignOut}, 422: REFUSALS[422], **UNKNOWN, **UNAVAILABLE},
        response_model=None,
        tags=["ads"],
    )
    def remove(campaign: Name) -> Response:
        """End a campaign and tell how it stands: it is shown no more, clicks on what people still see are charged."""
        account = ads.kept.account(campaign)
        if account is None or not ads.kept.remove(campaign):
            return _missing(campaign)
        return plain_json(account.to_dict())


def _missing(campaign: str) -> Response:
    return problem(404, f"there is no campaign {campaign!r:.80}")
