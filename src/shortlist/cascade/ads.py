"""Ads: an auction among campaigns for the places of a page, by what each is likely to bring.

    engine.ads("u7", 2)                                                        registered campaigns compete
    engine.ads("u7", 2, candidates=[AdCandidate(campaign="c", item="b2", bid=0.8)])      or those that the request names
    engine.ads.click(answer.request_id, slot=1)                                charges the price of that click, once

    scores     the run's ranking stage scores all candidates for this user
    chances    the run's calibration makes probabilities of a click of them           cascade/click_chance.py
    bidders    campaigns that run and have money                                      cascade/bidders.py
    pacing     bids follow how each spends beside its plan, plans follow traffic      cascade/pacing.py
    auction    places by bid x chance, at the next one's price                        cascade/auction.py
    money      the prices are set aside before anybody sees an ad                     store/campaigns.py

A campaign that can not set its price aside leaves the auction, which is then held again without it, so that every price that is shown
is the price among those who can pay. What breaks on the way leaves fewer or no ads, and `degraded` says why.

C candidates, N distinct items of theirs, W places that somebody got.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shortlist.cascade.auction import NOBODY, AuctionConfig, Outcome, hold
from shortlist.cascade.bidders import AdCandidate as AdCandidate
from shortlist.cascade.bidders import Bidders, enter, names_of, wishes_brought, wishes_of_all
from shortlist.cascade.click_chance import Calibration, clicks_path, judged_systems, scores_of
from shortlist.cascade.knowing import Known, reason_of, rulings_of
from shortlist.cascade.live import Live
from shortlist.cascade.meter import StageReport
from shortlist.cascade.pacing import PacingConfig
from shortlist.cascade.pasts import PastEvent
from shortlist.cascade.questions import Asked, Question, check
from shortlist.cascade.rules import NO_RULES, Rules
from shortlist.data.histories import Int
from shortlist.data.jagged import Jagged
from shortlist.data.vocabulary import Id
from shortlist.errors import ConfigError
from shortlist.store.ads import MICROS, Account, Campaign, Charge, Refused, Showing
from shortlist.store.campaigns import CampaignStore
from shortlist.store.events import StoreUnavailable

if TYPE_CHECKING:
    from shortlist.cascade.engine import Engine

Float = NDArray[np.float64]
LOOK_S = 1.0
"""Seconds between two looks for money that was set aside and is free again."""
Finding = Callable[[Live, Asked, list[str]], Known]
"""What is known of who asks; problems are added to the list."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdsConfig:
    """How ads are chosen and paid."""

    auction: AuctionConfig = field(default_factory=AuctionConfig)
    """Reserve and places."""
    pacing: PacingConfig = field(default_factory=PacingConfig)
    """How spend follows the plans."""
    click_window_s: float = 600.0
    """Seconds for which the price of an ad's click is set aside; a later click is charged where there is money left."""
    max_slots: int = 20
    """Most places of a page."""
    max_candidates: int = 1_000
    """Most items that are scored for a request: of more, those with the highest bids."""

    def __post_init__(self) -> None:
        if not 0 < self.click_window_s <= 86_400:
            raise ConfigError(f"click_window_s must be above 0 and at most a day, got {self.click_window_s}")
        for name in ("max_slots", "max_candidates"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ad:
    """One place of a page and how it was won. Money in units of currency."""

    slot: int
    """From 1, the best."""
    campaign: str
    item_id: Id
    title: str | None
    bid: float
    """As it stood in the auction: paced, and no more than the campaign has left."""
    probability: float
    """Calibrated chance of a click at this place."""
    ecpm: float
    """1,000 x bid x probability."""
    price: float
    """What a click costs."""
    propensity: float
    """Chance with which the campaign took part; below 1 where it is throttled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdsAnswer:
    """Ads of a page and how they came about."""

    request_id: str
    user: Id | None
    ads: tuple[Ad, ...]
    """Best place first; fewer than asked where nobody else bids enough."""
    num_candidates: int
    """Items that took part in the auction."""
    removed: Mapping[str, int]
    """Campaigns kept out by schedule, budget, pacing, reserve or frequency, and items by each rule of the request or of the surface."""
    ignored: Mapping[str, int]
    """Ids of the request or of campaigns that match nothing."""
    propensity: float
    """Chance of just these campaigns taking part; below 1 where some are throttled."""
    snapshot_version: str
    stages: tuple[StageReport, ...]
    degraded: str | None
    """What went wrong on the way; None when nothing did."""
    spent_ms: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = {f: getattr(self, f) for f in AdsAnswer.__slots__ if f not in ("ads", "stages")}
        return {
            **plain,
            "ads": [{f: getattr(ad, f) for f in Ad.__slots__} for ad in self.ads],
            "stages": [{f: getattr(stage, f) for f in StageReport.__slots__} for stage in self.stages],
        }


class Ads:
    """The ads of an engine: call it for a page; safe to use from many threads.

    Args:
        engine: whose run scores.
        known: finds out about users as the engine does.
        config: rules of the auction.
    """

    def __init__(self, engine: Engine, known: Finding, config: AdsConfig | None = None) -> None:
        self.config = config or AdsConfig()
        self.store = None if engine.events is None else CampaignStore(engine.events.database)
        """Campaigns and their money; None = the engine keeps nothing, and prices are only told."""
        self._engine, self._find_out = engine, known
        self._looked = 0.0
        self._calibration: Calibration | None = None
        self._rows: dict[str, tuple[Campaign, Live, Int]] = {}

    def __call__(
        self,
        user: Id | None,
        slots: int = 1,
        *,
        candidates: Sequence[AdCandidate] | None = None,
        history: Sequence[Id | tuple[Id, float] | PastEvent] | None = None,
        context: Mapping[str, Any] | None = None,
        rules: Rules | None = None,
        deadline_ms: float | None = None,
    ) -> AdsAnswer:
        """Ads for one user, known or not; the price of a click on each is set aside when this returns.

        Args:
            user: id; None = nobody in particular.
            slots: places.
            candidates: the only items that take part; None = those of all registered campaigns.
            history: what the user did, in place of what is on record; as for `Engine.recommend`.
            context: raw values of the run's context columns.
            rules: which items may be shown; items of the user's past may be, unless they say otherwise.
            deadline_ms: time after which no stage is waited for; the mean click rate then stands for every chance.

        Raises:
            ConfigError: too many slots or candidates, the run's scores are not calibrated, or there is neither a store of campaigns nor
                candidates.
            DataError: a candidate has no bid and its campaign is not registered.
        """
        began = time.perf_counter()
        live, now, request_id = self._engine.live, time.time(), uuid.uuid4().hex
        limits = [ms for ms in (deadline_ms, self._engine.config.deadline_ms) if ms is not None]
        calibration = self.calibration(live)
        asked = self._check(live, user, slots, candidates, history, context, rules)
        problems = list(live.problems)
        entered = self._entered(live, candidates, now, request_id, problems)
        reports: tuple[StageReport, ...] = ()
        if len(entered.row_C):
            rows, chances, reports = self._chances(
                live, calibration, asked, entered, min(limits, default=None), problems
            )
            at_C = np.minimum(np.searchsorted(rows, entered.row_C), max(len(rows) - 1, 0))
            permitted_C = rows[at_C] == entered.row_C if len(rows) else np.zeros(len(at_C), dtype=bool)
            entered.keep(permitted_C)
            chance_C = chances[at_C[permitted_C]]
        else:
            chance_C = np.zeros(0)
        num_candidates = len(entered.row_C)
        outcome, chance_W = self._held(live, request_id, user, slots, entered, chance_C, problems)
        return AdsAnswer(
            request_id=request_id,
            user=user,
            ads=self._ads(live, entered, outcome, chance_W),
            num_candidates=num_candidates,
            removed=entered.removed,
            ignored=entered.ignored,
            propensity=entered.draw,
            snapshot_version=live.version,
            stages=reports,
            degraded="; ".join(problems) or None,
            spent_ms=(time.perf_counter() - began) * 1e3,
        )

    def click(self, request_id: str, slot: int) -> Charge:
        """Charge a click on an ad of an answer, once however often it is told; durable when this returns.

        Raises ConfigError where nothing is kept, DataError where no such ad is known, StoreUnavailable where it has to be told again.
        """
        return self.kept.click(request_id, slot)

    @property
    def kept(self) -> CampaignStore:
        """The store of campaigns; ConfigError where the engine keeps nothing."""
        if self.store is None:
            raise ConfigError(
                "this engine keeps no campaigns; open it with events=PATH (on the command line: --events PATH)"
            )
        return self.store

    def calibration(self, live: Live) -> Calibration:
        """What makes chances of the run's scores, read when it is first asked for.

        Raises ConfigError where the run is not calibrated, SnapshotError where the calibration is another version's.
        """
        made = self._calibration
        if made is None or made.version != live.version:
            path = None if live.folder is None else clicks_path(live.folder)
            if path is None or not path.exists():
                raise ConfigError(
                    f"ads need chances of clicks, and the scores of {live.folder or 'this run'} are not calibrated: "
                    "run `shortlist ads` on it"
                )
            made = self._calibration = Calibration.load(path, version=live.version)
        return made

    def use(self, calibration: Calibration) -> None:
        """Take a calibration from memory, for a run that has no folder."""
        self._calibration = calibration

    # -- who takes part ------------------------------------------------------------------------------------------

    def _check(
        self,
        live: Live,
        user: Id | None,
        slots: int,
        candidates: Sequence[AdCandidate] | None,
        history: Sequence[Id | tuple[Id, float] | PastEvent] | None,
        context: Mapping[str, Any] | None,
        rules: Rules | None,
    ) -> Asked:
        if not 1 <= slots <= self.config.max_slots:
            raise ConfigError(f"slots must be from 1 to {self.config.max_slots}, got {slots}")
        if candidates is None and self.store is None:
            raise ConfigError("name the candidates, or open the engine with events=PATH and register campaigns")
        if candidates is not None and len(candidates) > self._engine.config.max_ids:
            raise ConfigError(f"{len(candidates):,} candidates; at most {self._engine.config.max_ids:,} are taken")
        question = Question(user=user, k=1, history=history, context=context or {}, rules=rules or NO_RULES)
        asked = check(live, question, self._engine.config)
        keeps = asked.rules.seen is None and asked.rules.seen_days is None
        return replace(asked, rules=replace(asked.rules, seen="keep")) if keeps else asked

    def _entered(
        self, live: Live, candidates: Sequence[AdCandidate] | None, now: float, request_id: str, problems: list[str]
    ) -> Bidders:
        """Campaigns that run, have money and were drawn, with what they bid for each item."""
        named = names_of(candidates or ())
        accounts: list[Account] = []
        ended: set[str] = set()
        if self.store is not None:
            try:
                if abs(now - self._looked) > LOOK_S:
                    self._looked = now
                    self.store.give_back(now=now)
                accounts = self.store.accounts()
                ended = self.store.ended(named) if named else ended
            except StoreUnavailable as error:
                problems.append(f"campaigns can not be read, so there are no ads: {error}")
                return Bidders()
        by_name = {account.campaign.campaign: account for account in accounts}
        wishes = (
            wishes_of_all(by_name, partial(self._rows_of, live))
            if candidates is None
            else wishes_brought(live, candidates, by_name)
        )
        return enter(
            wishes,
            by_name,
            ended,
            now=now,
            reserve=self.config.auction.reserve,
            pacing=self.config.pacing,
            most=self.config.max_candidates,
            rng=np.random.default_rng(int(request_id, 16)),
            traffic_H=live.traffic_H,
        )

    def _rows_of(self, live: Live, campaign: Campaign) -> Int:
        """Catalogue rows of a campaign's items, 0 where unknown; worked out once for each run."""
        found = self._rows.get(campaign.campaign)
        if found is None or found[0] is not campaign or found[1] is not live:
            if len(self._rows) > 10_000:
                self._rows = {}  # so that campaigns that are gone take no room for ever
            found = self._rows[campaign.campaign] = (campaign, live, live.items(sorted(set(campaign.items))))
        return found[2]

    # -- what they are worth -------------------------------------------------------------------------------------

    def _chances(
        self,
        live: Live,
        calibration: Calibration,
        asked: Asked,
        entered: Bidders,
        deadline_ms: float | None,
        problems: list[str],
    ) -> tuple[Int, Float, tuple[StageReport, ...]]:
        """Rows [N] that rules permit, rising, and the chance of a click [N] of each at the first place."""
        rows = np.unique(entered.row_C)
        asked = replace(asked, candidates=rows)
        known = self._find_out(live, asked, problems)
        ruling = rulings_of(live, asked, known)[0]
        entered.removed.update({rule: number for rule, number in ruling.removed.items() if number})
        entered.ignored.update({rule: number for rule, number in ruling.ignored.items() if number})
        if known.batch is not None:
            try:
                stage, systems = judged_systems(live.cascade)
                page = live.cascade.run(
                    known.batch,
                    k=len(rows),
                    candidates=Jagged.from_rows([rows.tolist()]),
                    allowed=ruling.allowed,
                    deadline_ms=deadline_ms,
                )
                reports = tuple(page.reports[0])
                self._engine.meter.add(page.chain, page.reports)
                broken = [f"{report.stage}: {report.degraded}" for report in reports if report.degraded]
                problems += broken
                scores = scores_of(page, stage, systems)
                trace = next(trace for trace in page.traces if trace.name == stage)
                found = trace.rows.values.cpu().numpy()
                order = np.argsort(found)
                if systems != calibration.systems:
                    problems.append(
                        "the calibration is of other systems, so the mean click rate stands for every chance"
                    )
                elif scores is not None and trace.degraded(0) is None:
                    return found[order], calibration.chances(scores[order]), reports
                return found[order], np.full(len(found), max(calibration.rate, 1e-6)), reports
            except Exception as error:  # a request always gets an answer
                problems.append(reason_of("the cascade failed", error))
        permitted = rows if ruling.allowed is None else rows[ruling.allowed.numpy()[rows]]
        return permitted, np.full(len(permitted), max(calibration.rate, 1e-6)), ()

    # -- the auction ---------------------------------------------------------------------------------------------

    def _held(
        self,
        live: Live,
        request_id: str,
        user: Id | None,
        slots: int,
        entered: Bidders,
        chance_C: Float,
        problems: list[str],
    ) -> tuple[Outcome, Float]:
        """The auction among those who can pay: who won, and the chance of a click [W] at each place."""
        factor_K = self.config.auction.factors(slots)
        while True:
            outcome = hold(entered.bid_C, chance_C, entered.reserve_C, entered.campaign_C, slots)
            chance_W = chance_C[outcome.candidate] * factor_K[: len(outcome.candidate)]
            try:
                refused = self._set_aside(live, request_id, user, entered, outcome, chance_W)
            except StoreUnavailable as error:
                problems.append(f"prices can not be set aside, so there are no ads: {error}")
                return NOBODY, chance_C[:0]
            if refused is None:
                return outcome, chance_W
            entered.count("budget", len(refused.budget))
            entered.count("frequency", len(refused.cap - refused.budget))
            chance_C = chance_C[entered.drop(refused.budget | refused.cap)]

    def _set_aside(
        self, live: Live, request_id: str, user: Id | None, entered: Bidders, outcome: Outcome, chance_W: Float
    ) -> Refused | None:
        if self.store is None or not len(outcome.candidate):
            return None
        showings = []
        for slot, (number, price, chance) in enumerate(zip(outcome.candidate, outcome.price, chance_W.tolist()), 1):
            campaign = int(entered.campaign_C[number])
            account = entered.accounts[campaign]
            showings.append(
                Showing(
                    slot=slot,
                    campaign=entered.names[campaign],
                    item=str(live.id(int(entered.row_C[number]))),
                    price=int(price),
                    expected=round(int(price) * chance),
                    bid=int(entered.bid_C[number]),
                    chance=chance,
                    propensity=entered.propensity[campaign],
                    registered=account is not None,
                    max_per_day=None if account is None else account.campaign.max_per_day,
                )
            )
        viewer = None if user is None else str(user)
        return self.store.reserve(request_id, showings, window_s=self.config.click_window_s, viewer=viewer)

    def _ads(self, live: Live, entered: Bidders, outcome: Outcome, chance_W: Float) -> tuple[Ad, ...]:
        ads = []
        for slot, (number, price, chance) in enumerate(zip(outcome.candidate, outcome.price, chance_W.tolist()), 1):
            row, campaign = int(entered.row_C[number]), int(entered.campaign_C[number])
            bid = int(entered.bid_C[number]) / MICROS
            ads.append(
                Ad(
                    slot=slot,
                    campaign=entered.names[campaign],
                    item_id=live.id(row),
                    title=live.title(row),
                    bid=bid,
                    probability=chance,
                    ecpm=1_000 * bid * chance,
                    price=int(price) / MICROS,
                    propensity=entered.propensity[campaign],
                )
            )
        return tuple(ads)
