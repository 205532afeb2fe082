"""Auctions for the places of a page, auctions against a market price, and campaigns that run out of money: outcomes alone, no strategy.

R auctions, C candidates each, K places, N charges in the order of time.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shortlist.data.histories import Int
from shortlist.errors import ConfigError, DataError

Float = NDArray[np.float64]
Bools = NDArray[np.bool_]


class Auction(NamedTuple):
    """Who got which place for what."""

    winner: Int
    """[R, K] index of the candidate at each place, from the top; -1 where nobody was left."""
    price: Float
    """[R, K] what a click costs the winner; 0 where nobody won."""


def generalised_second_price(
    bids_RC: Float, quality_RC: Float | None = None, *, num_places: int = 1, reserve: float | Float = 0.0
) -> Auction:
    """Places by bid times quality; a winner pays per click the least bid that would have kept the place, never below the reserve.

    With places 1..K taken by i_1, i_2, ... and scores s = bid * quality: price of i_p = max(reserve, s_{i_{p+1}} / quality_{i_p}).
    With one place and equal quality this is the second-price auction. (Edelman, Ostrovsky and Schwarz, "Internet Advertising and the
    Generalized Second-Price Auction", American Economic Review 2007.) Equal scores go to the earlier candidate.

    Args:
        bids_RC: [R, C] money per click; 0 or below takes no part, nor does a bid below the reserve.
        quality_RC: [R, C] above 0, such as the chance of a click; None = all alike.
        num_places: K.
        reserve: least price of a click, for all or [R, C] for each.

    Raises DataError where the shapes differ or a quality is not above 0; ConfigError for a bad number of places or reserve.
    """
    quality = np.ones_like(bids_RC, dtype=np.float64) if quality_RC is None else quality_RC
    if bids_RC.ndim != 2 or bids_RC.shape != quality.shape:
        raise DataError(f"bids [R, C] and quality must have one shape, got {bids_RC.shape} and {quality.shape}")
    if not (quality > 0).all() or not np.isfinite(bids_RC).all():
        raise DataError("every quality must be above 0 and every bid a finite number")
    if np.ndim(reserve) and np.shape(reserve) != bids_RC.shape:
        raise DataError(f"reserves are one number or [R, C] as the bids {bids_RC.shape}, got {np.shape(reserve)}")
    least_RC = np.broadcast_to(np.asarray(reserve, dtype=np.float64), bids_RC.shape)
    if num_places < 1 or not ((least_RC >= 0) & (least_RC < np.inf)).all():
        raise ConfigError(f"an auction wants at least 1 place and a reserve of 0 or above, got {num_places}, {reserve}")
    takes_part = (bids_RC > 0) & (bids_RC >= least_RC)
    score = np.where(takes_part, bids_RC * quality, 0.0)
    missing = max(num_places + 1 - score.shape[1], 0)  # so that a place has somebody behind it, if only nobody
    score = np.pad(score, ((0, 0), (0, missing)))
    order = np.argsort(-score, axis=1, kind="stable")[:, : num_places + 1]
    ranked = np.take_along_axis(score, order, 1)
    won = ranked[:, :-1] > 0
    winner = np.where(won, order[:, :-1], -1)
    own_quality, own_least = (np.take_along_axis(x_RC, np.maximum(winner, 0), 1) for x_RC in (quality, least_RC))
    price = np.where(won, np.maximum(own_least, ranked[:, 1:] / own_quality), 0.0)
    return Auction(winner, price)


def market_auction(bids: Float, market_price: Float, *, reserve: float = 0.0) -> tuple[Bools, Float]:
    """Second price against the highest rival: bool [N] won, and [N] paid, 0 where lost. A bid that equals the price wins.

    `market_price` [N] may come from `PriceHistogram.sample`.
    """
    needed = np.maximum(market_price, reserve)
    won = bids >= needed
    return won, np.where(won, needed, 0.0)


def spend(charges: Float, campaign: Int, budgets: Float) -> Float:
    """[N] what each charge really brings: campaigns stop when their money is spent, the last charge takes what is left.

    Args:
        charges: [N] in the order of time, 0 or above.
        campaign: [N] whose charge it is, an index into budgets.
        budgets: money of each campaign.

    Raises DataError for shapes that do not fit, negative charges or budgets, or campaigns without a budget.
    """
    if charges.shape != campaign.shape or charges.ndim != 1:
        raise DataError(f"every charge has one campaign, got {charges.shape} and {campaign.shape}")
    if (charges < 0).any() or (budgets < 0).any():
        raise DataError("charges and budgets must not be below 0")
    if len(campaign) and not (campaign.min() >= 0 and campaign.max() < len(budgets)):
        raise DataError(f"campaigns are numbered 0 to {len(budgets) - 1}, one per budget, got up to {campaign.max()}")
    order = np.argsort(campaign, kind="stable")
    owner, sums = campaign[order], np.cumsum(charges[order])
    earlier = sums - charges[order]
    opens = np.searchsorted(owner, owner)  # first charge of the same campaign
    spent = earlier - earlier[opens]
    paid = np.empty_like(charges, dtype=np.float64)
    paid[order] = np.clip(budgets[owner] - spent, 0.0, charges[order])
    return paid
