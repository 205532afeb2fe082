"""Heavy tails: draws of money, and the shape of real market prices.

N draws, P prices of a histogram.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shortlist.errors import DataError

Float = NDArray[np.float64]
COUNTS = "price_counter_train"


def lognormal(rng: np.random.Generator, size: int, *, median: float, spread: float) -> Float:
    """[N] draws whose logarithm is normal around log(median) with standard deviation `spread`."""
    return median * np.exp(spread * rng.standard_normal(size))


def pareto(rng: np.random.Generator, size: int, *, median: float, tail: float) -> Float:
    """[N] draws with P(X > x) = (least / x) ** tail, where least = median / 2 ** (1 / tail)."""
    chance = 1.0 - rng.random(size)  # in (0, 1]
    return median * (2.0 * chance) ** (-1.0 / tail)


@dataclass(frozen=True, kw_only=True, slots=True)
class PriceHistogram:
    """How often each whole price was the market's: the highest rival bid of an auction.

    A bid wins where it reaches the market price, and pays that price (second price).
    """

    counts: Float
    """[P]: auctions whose market price was 0, 1, 2, ... units."""

    def __post_init__(self) -> None:
        counts = self.counts
        if (
            counts.ndim != 1
            or not len(counts)
            or not np.isfinite(counts).all()
            or (counts < 0).any()
            or not counts.sum()
        ):
            raise DataError("a price histogram is one row of counts, none below 0 and not all 0")

    @classmethod
    def load(cls, path: Path | str) -> PriceHistogram:
        """From JSON: a list of counts by price, or an object that holds one as `price_counter_train`, as iPinYou's summaries do.

        Raises DataError where the file holds neither.
        """
        path = Path(path)
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            return cls(counts=np.asarray(told[COUNTS] if isinstance(told, dict) else told, dtype=np.float64))
        except FileNotFoundError as error:
            raise DataError(f"{path}: no such file; give a JSON file with counts of prices") from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: no list of counts, alone or as {COUNTS!r} ({error}); give how often each price 0, 1, 2, ... occurred"
            ) from error

    def sample(self, rng: np.random.Generator, size: int) -> Float:
        """[N] market prices."""
        reached = np.cumsum(self.counts)
        return np.searchsorted(reached, rng.random(size) * reached[-1], side="right").astype(np.float64)

    @property
    def median(self) -> float:
        """Least price that half of the auctions do not exceed."""
        reached = np.cumsum(self.counts)
        return float(np.searchsorted(reached, 0.5 * reached[-1]))

    def win_chance(self, bids: Float) -> Float:
        """[N] chance that each bid wins."""
        return self._up_to(self.counts / self.counts.sum(), bids)

    def payment(self, bids: Float) -> Float:
        """[N] what each bid pays on average, lost auctions included as 0."""
        return self._up_to(np.arange(len(self.counts)) * self.counts / self.counts.sum(), bids)

    def _up_to(self, weights: Float, bids: Float) -> Float:
        """Sums of `weights` [P] over all prices that the bids [N] reach."""
        sums = np.concatenate([[0.0], np.cumsum(weights)])
        reached: Float = sums[np.clip(np.floor(bids) + 1, 0, len(weights)).astype(np.int64)]
        return reached
