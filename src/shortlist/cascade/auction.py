"""The auction for the places of a page: by expected revenue, at the least price that keeps the place.

    score  = bid x chance of a click                                     eCPM = 1,000 x score
    price  = score of the next campaign / own chance of a click          per click; at least the reserve, never above the bid

The maths is `simulation/auctions.py`; here are whole micros, several items per campaign, and a reserve of each campaign's own. A campaign
stands for itself with its best item, so that it never bids against itself. Equal scores go to the candidate that is named earlier.

C candidates, K places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shortlist.data.histories import Int
from shortlist.errors import ConfigError
from shortlist.simulation.auctions import generalised_second_price
from shortlist.store.ads import MAX_MONEY

Float = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class AuctionConfig:
    """The rules of a surface's auction."""

    reserve: float = 0.0
    """Least price of a click, in units of currency."""
    position_factors: tuple[float, ...] = ()
    """How much rarer a click is at each place than at the first: (1, 0.6, 0.4). Empty = as likely at all; the last one goes on."""

    def __post_init__(self) -> None:
        if not 0 <= self.reserve <= MAX_MONEY:
            raise ConfigError(f"reserve is money from 0 to {MAX_MONEY:g}, got {self.reserve}")
        rising = any(later > earlier for earlier, later in zip(self.position_factors, self.position_factors[1:]))
        if rising or not all(0 < factor <= 1 for factor in self.position_factors):
            raise ConfigError(
                f"position_factors are shares above 0 and at most 1 that do not rise, got {self.position_factors}"
            )

    def factors(self, num_slots: int) -> Float:
        """[K] by place, from the top."""
        given = self.position_factors[:num_slots] or (1.0,)
        return np.array(given + given[-1:] * (num_slots - len(given)), dtype=np.float64)


class Outcome(NamedTuple):
    """Who got which place for what; W places that somebody got, from the top."""

    candidate: Int
    """[W] number of the candidate."""
    price: Int
    """[W] micros per click."""


NOBODY = Outcome(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))


def hold(bid_C: Int, chance_C: Float, reserve_C: Int, campaign_C: Int, num_slots: int) -> Outcome:
    """One auction.

    Args:
        bid_C: micros per click; 0 takes no part, nor does a bid below its reserve.
        chance_C: of a click at the first place, above 0.
        reserve_C: micros, least price of a click of each candidate.
        campaign_C: number of each candidate's campaign; one of them gets one place.
        num_slots: K.

    Raises DataError or ConfigError as `generalised_second_price` does.
    """
    if not len(bid_C):
        return NOBODY
    best = best_of_each(np.where(bid_C >= reserve_C, bid_C * chance_C, 0.0), campaign_C)
    made = generalised_second_price(
        bid_C[best].astype(np.float64)[None],
        chance_C[best][None],
        num_places=num_slots,
        reserve=reserve_C[best].astype(np.float64)[None],
    )
    won = made.winner[0] >= 0
    winner = best[made.winner[0][won]]
    # To the nearest micro, and then no further than both sides agreed to.
    price = np.clip(np.rint(made.price[0][won]).astype(np.int64), reserve_C[winner], bid_C[winner])
    return Outcome(winner, price)


def best_of_each(score_C: Float, campaign_C: Int) -> Int:
    """Numbers of the best candidate of each campaign, rising; of equals the earlier one."""
    order = np.lexsort((np.arange(len(score_C)), -score_C, campaign_C))
    first = np.ones(len(order), dtype=bool)
    first[1:] = campaign_C[order][1:] != campaign_C[order][:-1]
    return np.sort(order[first])
