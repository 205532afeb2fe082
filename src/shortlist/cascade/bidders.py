"""Who takes part in an auction: campaigns that run, have money and are drawn, with what each bids for which item.

    enter        from accounts or a request's candidates to arrays; who is kept out is counted by reason
    schedule     the campaign's time has not come, or is over, or it was deleted
    budget       nothing is left that is not spent or set aside, or less than the reserve
    pacing       the campaign is ahead of its plan: its bid falls below the reserve, or the lot went against it
    reserve      it bids below the reserve

C candidates: one item of one campaign each; G campaigns. Money in micros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shortlist.cascade.live import Live
from shortlist.cascade.pacing import EVEN, Float, PacingConfig, factors_of, is_running
from shortlist.data.histories import Int
from shortlist.data.vocabulary import Id
from shortlist.errors import DataError
from shortlist.store.ads import MAX_MONEY, MICROS, Account, Campaign, check_id, to_micros

Wishes = Mapping[str, tuple[Int, Int]]
"""Catalogue rows, 0 where unknown, and bids, by campaign."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdCandidate:
    """An item that a request names for the auction."""

    campaign: str
    """Registered or not; one that is not has no budget, and its clicks are charged without a limit."""
    item: Id
    """One that the run does not know takes no part."""
    bid: float | None = None
    """The most a click may cost, in units of currency; None = the registered campaign's."""


def _none() -> Int:
    return np.zeros(0, dtype=np.int64)


@dataclass(slots=True)
class Bidders:
    """Campaigns that take part, and their candidates as arrays [C]."""

    names: list[str] = field(default_factory=list)
    accounts: list[Account | None] = field(default_factory=list)
    """By campaign; None where it is not registered."""
    propensity: list[float] = field(default_factory=list)
    """By campaign: chance of taking part."""
    campaign_C: Int = field(default_factory=_none)
    """Numbers into `names`."""
    row_C: Int = field(default_factory=_none)
    bid_C: Int = field(default_factory=_none)
    reserve_C: Int = field(default_factory=_none)
    removed: dict[str, int] = field(default_factory=dict)
    """Campaigns kept out, by reason."""
    ignored: dict[str, int] = field(default_factory=dict)
    """Ids that match nothing."""
    draw: float = 1.0
    """Chance of what was drawn."""

    def count(self, reason: str, number: int = 1) -> None:
        """So many more campaigns were kept out for a reason."""
        if number:
            self.removed[reason] = self.removed.get(reason, 0) + number

    def keep(self, mask_C: NDArray[np.bool_]) -> None:
        """Only these candidates stay."""
        for name in ("campaign_C", "row_C", "bid_C", "reserve_C"):
            setattr(self, name, getattr(self, name)[mask_C])

    def drop(self, names: frozenset[str]) -> NDArray[np.bool_]:
        """Without the candidates of these campaigns; bool [C before] who stays."""
        is_gone = np.array([name in names for name in self.names], dtype=bool)
        mask_C: NDArray[np.bool_] = ~is_gone[self.campaign_C]
        self.keep(mask_C)
        return mask_C


def enter(
    wishes: Wishes,
    accounts: Mapping[str, Account],
    ended: set[str],
    *,
    now: float,
    reserve: float,
    pacing: PacingConfig,
    most: int,
    rng: np.random.Generator,
    traffic_H: Float = EVEN,
) -> Bidders:
    """Those who take part at a moment.

    Args:
        wishes: what each campaign would like to bid on, in the order in which equals win.
        accounts: of the registered ones.
        ended: those that were deleted.
        now: seconds since 1970 UTC.
        reserve: the surface's, in units of currency.
        pacing: how spend follows the plans.
        most: candidates that stay, those with the highest bids.
        rng: of the lots.
        traffic_H: [24] shares of traffic by hour of the day, see pacing.py.
    """
    names = list(wishes)
    if not names:
        return Bidders()
    accounts_G = [accounts.get(name) for name in names]
    lengths_G = np.array([len(rows) for rows, _ in wishes.values()])
    campaign_C = np.repeat(np.arange(len(names)), lengths_G)
    row_C, wished_C = (np.concatenate(parts) for parts in zip(*wishes.values()))
    money = _Money.of(accounts_G, now, reserve, pacing, traffic_H)
    runs_G = np.array([name not in ended and (a is None or is_running(a, now)) for name, a in zip(names, accounts_G)])
    poor_G = money.left_G < money.needed_G
    lot_G = rng.random(len(names))
    drawn_G = ~money.throttled_G | (lot_G < money.factor_G)
    scale_G = np.where(money.throttled_G, 1.0, money.factor_G)
    bid_C = np.minimum((wished_C * scale_G[campaign_C]).astype(np.int64), money.left_G[campaign_C])
    known_C, fine_G = row_C > 0, runs_G & ~poor_G
    fine_C = known_C & (fine_G & drawn_G)[campaign_C] & (bid_C >= money.needed_G[campaign_C])
    if fine_C.sum() > most:
        ranked = np.argsort(np.where(fine_C, -bid_C, 1), kind="stable")[:most]
        chosen_C = np.zeros(len(fine_C), dtype=bool)
        chosen_C[ranked] = True
    else:
        chosen_C = fine_C

    def have(mask_C: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """[G] which campaigns have a candidate in the mask."""
        return np.bincount(campaign_C[mask_C], minlength=len(names)) > 0

    able_G, in_G, stay_G = have(known_C & (wished_C >= money.needed_G[campaign_C])), have(fine_C), have(chosen_C)
    reasons = {
        "schedule": ~runs_G,
        "budget": runs_G & poor_G,
        "pacing": fine_G & able_G & ~in_G,
        "reserve": fine_G & have(known_C) & ~able_G,
    }
    lottery_G = fine_G & money.throttled_G
    number_G = np.cumsum(stay_G) - 1
    places = np.flatnonzero(stay_G).tolist()
    num_unknown = int((~known_C).sum())
    return Bidders(
        names=[names[g] for g in places],
        accounts=[accounts_G[g] for g in places],
        propensity=np.where(money.throttled_G, money.factor_G, 1.0)[stay_G].tolist(),
        campaign_C=number_G[campaign_C[chosen_C]],
        row_C=row_C[chosen_C],
        bid_C=bid_C[chosen_C],
        reserve_C=money.least_G[campaign_C[chosen_C]],
        removed={reason: int(mask_G.sum()) for reason, mask_G in reasons.items() if mask_G.any()},
        ignored={"items": num_unknown} if num_unknown else {},
        draw=float(np.where(drawn_G, money.factor_G, 1 - money.factor_G)[lottery_G].prod()),
    )


@dataclass(frozen=True, slots=True)
class _Money:
    """By campaign [G]."""

    left_G: Int
    """What a click may cost now; no limit where the campaign is not registered."""
    least_G: Int
    """Reserve."""
    needed_G: Int
    """The least bid that counts: the reserve, and at least a micro."""
    factor_G: NDArray[np.float64]
    throttled_G: NDArray[np.bool_]

    @classmethod
    def of(
        cls, accounts_G: Sequence[Account | None], now: float, reserve: float, pacing: PacingConfig, traffic_H: Float
    ) -> _Money:
        """Of campaigns at a moment."""
        registered = [account for account in accounts_G if account is not None]
        is_registered_G = np.array([account is not None for account in accounts_G])
        factor_G, left_G = np.ones(len(accounts_G)), np.full(len(accounts_G), np.iinfo(np.int64).max)
        factor_G[is_registered_G] = factors_of(registered, now, pacing, traffic_H)
        left_G[is_registered_G] = [account.left for account in registered]
        own_G = np.array([0.0 if account is None else account.campaign.reserve for account in accounts_G])
        least_G = np.rint(np.maximum(own_G, reserve) * MICROS).astype(np.int64)
        throttled_G = np.array([a is not None and a.campaign.pacing == "throttle" for a in accounts_G])
        return cls(left_G, least_G, np.maximum(least_G, 1), factor_G, throttled_G)


def wishes_of_all(accounts: Mapping[str, Account], rows_of: Callable[[Campaign], Int]) -> Wishes:
    """Every registered campaign wants each of its items at its bid."""
    rows = {name: rows_of(account.campaign) for name, account in accounts.items()}
    return {name: (mine, np.full(len(mine), to_micros(accounts[name].campaign.bid))) for name, mine in rows.items()}


def wishes_brought(live: Live, candidates: Sequence[AdCandidate], accounts: Mapping[str, Account]) -> Wishes:
    """What a request wants, in the order of names and items: whoever names them in another order gets the same ads.

    Raises DataError for a bid that is missing or no money, ConfigError for a name that is none.
    """
    bids = []
    for place, candidate in enumerate(candidates):
        bid = candidate.bid
        if bid is None:
            if candidate.campaign not in accounts:
                raise DataError(
                    f"candidate {place}: no campaign {candidate.campaign!r:.80} is registered, so it needs a bid"
                )
            bid = accounts[candidate.campaign].campaign.bid
        if not 0 <= bid <= MAX_MONEY:
            raise DataError(f"candidate {place}: bid must be money from 0 to {MAX_MONEY:g}, got {bid}")
        bids.append(to_micros(bid))
    rows = live.items([candidate.item for candidate in candidates])
    order = sorted(range(len(candidates)), key=lambda place: (candidates[place].campaign, str(candidates[place].item)))
    grouped: dict[str, list[int]] = {}
    for place in order:
        grouped.setdefault(candidates[place].campaign, []).append(place)
    bid_C = np.array(bids, dtype=np.int64)
    return {name: (rows[places], bid_C[places]) for name, places in grouped.items()}


def names_of(candidates: Sequence[AdCandidate]) -> list[str]:
    """Campaigns that a request names; ConfigError for a name that is none."""
    names = sorted({candidate.campaign for candidate in candidates})
    for name in names:
        check_id("campaign", name)
    return names
