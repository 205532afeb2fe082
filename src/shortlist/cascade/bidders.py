"""Who takes part in an auction: campaigns that run, have money and are drawn, with what each bids for which item.

    enter        from accounts or a request's candidates to arrays; who is kept out is counted by reason
    schedule     the campaign's time has not come, or is over, or it was deleted
    budget       nothing is left that is not spent or set aside, or less than the reserve
    pacing       the campaign is ahead of its plan: its bid falls below the reserve, or the lot went against it
    reserve      it bids below the reserve

C candidates: one item of one campaign each. Money in micros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shortlist.cascade.live import Live
from shortlist.cascade.pacing import PacingConfig, factors_of, is_running
from shortlist.data.histories import Int
from shortlist.data.vocabulary import Id
from shortlist.errors import DataError
from shortlist.store.campaigns import MAX_MONEY, Account, Campaign, check_id, to_micros

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
    """
    made = Bidders()
    known = [accounts[name] for name in wishes if name in accounts]
    factor_of = dict(zip((a.campaign.campaign for a in known), factors_of(known, now, pacing).tolist()))
    parts: list[tuple[Int, Int, Int, Int]] = []
    num_unknown = 0
    for (name, (rows, wished)), lot in zip(wishes.items(), rng.random(len(wishes)).tolist()):
        account, there = accounts.get(name), rows > 0
        num_unknown += int((~there).sum())
        if name in ended:
            made.count("schedule")
            continue
        paced = _paced(made, account, factor_of.get(name, 1.0), lot, now)
        if paced is None or not there.any():
            continue
        least = max(to_micros(reserve), to_micros(account.campaign.reserve) if account else 0)
        rows, wished = rows[there], wished[there]
        bid = wished if account is None else np.minimum((wished * paced[0]).astype(np.int64), account.left)
        fine = bid >= max(least, 1)
        if not fine.any():
            is_poor = account is not None and account.left < max(least, 1)
            made.count("budget" if is_poor else "pacing" if (wished >= max(least, 1)).any() else "reserve")
            continue
        number = np.full(int(fine.sum()), len(made.names))
        made.names.append(name)
        made.accounts.append(account)
        made.propensity.append(paced[1])
        parts.append((number, rows[fine], bid[fine], np.full(len(number), least)))
    if parts:
        made.campaign_C, made.row_C, made.bid_C, made.reserve_C = map(np.concatenate, zip(*parts))
    if len(made.bid_C) > most:
        mask_C = np.zeros(len(made.bid_C), dtype=bool)
        mask_C[np.argsort(-made.bid_C, kind="stable")[:most]] = True
        made.keep(mask_C)
    if num_unknown:
        made.ignored["items"] = num_unknown
    return made


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


def _paced(made: Bidders, account: Account | None, factor: float, lot: float, now: float) -> tuple[float, float] | None:
    """Factor of the bids and chance of taking part; None where the campaign does not, which is counted."""
    if account is None:
        return 1.0, 1.0
    if not is_running(account, now) or account.left <= 0:
        made.count("budget" if is_running(account, now) else "schedule")
        return None
    if account.campaign.pacing != "throttle":
        return factor, 1.0
    made.draw *= factor if lot < factor else 1 - factor
    if lot >= factor:
        made.count("pacing")
        return None
    return 1.0, factor
