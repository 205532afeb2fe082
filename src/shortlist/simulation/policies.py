"""Policies: what is shown to whom. A page for every request, and now and then one drawn at random, so that truth can be told from a log.

R requests, K places of a page, n items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shortlist.data.histories import Int
from shortlist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from shortlist.simulation.world import Aim, World

Float = NDArray[np.float64]
Times = NDArray[np.float64] | NDArray[np.int64]
"""Seconds since 1970."""
Pages = Callable[[Int, Times], Int]
"""From user rows [R] and times [R] (seconds) to pages [R, K] of distinct item rows, best first, 0 = empty. The same answer every time."""


class Shown(NamedTuple):
    """Pages as they were shown."""

    pages: Int
    """[R, K] item rows, 0 = empty place."""
    propensity: Float
    """[R, K] chance with which the policy shows just this item at just this place."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A page for each request, or, for a share of them, K distinct items drawn uniformly from the whole catalogue."""

    pages: Pages
    k: int
    """K: places of a page."""
    explore: float = 0.0
    """Share of requests that get a random page; 1 = all."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"a page has at least 1 place, got k = {self.k}")
        if not 0 <= self.explore <= 1:
            raise ConfigError(f"explore is a share from 0 to 1, got {self.explore}")

    def pages_of(self, users: Int, times: Times) -> Int:
        """[R, K] pages without exploration; DataError where the callable gives another shape."""
        pages = self.pages(users, times)
        if pages.shape != (len(users), self.k):
            raise DataError(f"the policy gave pages {list(pages.shape)} for {len(users)} requests of k = {self.k}")
        return pages

    def show(self, users: Int, times: Times, num_items: int, rng: np.random.Generator) -> Shown:
        """Pages as somebody sees them, with their propensities."""
        if self.explore > 0 and self.k > num_items:
            raise ConfigError(f"a random page of {self.k} places wants as many items, the catalogue has {num_items}")
        by_chance = np.full((len(users), self.k), self.explore / num_items)
        explores = rng.random(len(users)) < self.explore
        if self.explore == 1:
            return Shown(random_pages(rng, len(users), num_items, self.k), by_chance)
        own = self.pages_of(users, times)
        shown = own.copy()
        if explores.any():
            shown[explores] = random_pages(rng, int(explores.sum()), num_items, self.k)
        return Shown(shown, by_chance + (1 - self.explore) * (shown == own))


def popular(world: World, k: int, *, explore: float = 0.0) -> Policy:
    """Everybody gets the items with the most events in the log."""
    top = 1 + np.argsort(-world.events_I[1:], kind="stable")[:k]
    page = np.pad(top, (0, k - len(top)))
    return Policy(pages=lambda users, times: np.tile(page, (len(users), 1)), k=k, explore=explore)


def uniform(k: int) -> Policy:
    """Everybody gets items drawn at random."""
    return Policy(pages=lambda users, times: np.zeros((len(users), k), dtype=np.int64), k=k, explore=1.0)


def best(world: World, k: int, *, aim: Aim = "value", explore: float = 0.0) -> Policy:
    """The truth itself, for reference. Nothing does better: looks fall from place to place, and worth does not depend on the page."""

    def pages(users: Int, times: Times) -> Int:
        def top(worth_Rn: Float) -> Int:
            return 1 + np.argsort(-worth_Rn, axis=1, kind="stable")[:, :k]

        found: Int = world.over_catalogue(users, times, top, aim).astype(np.int64)
        return np.pad(found, ((0, 0), (0, k - found.shape[1])))

    return Policy(pages=pages, k=k, explore=explore)


def random_pages(rng: np.random.Generator, num_requests: int, num_items: int, k: int) -> Int:
    """[R, K] distinct rows of 1..n, every ordered choice equally likely.

    Place by place: a number among the items that are left is moved past those already on the page, smallest first.
    """
    picked = np.zeros((num_requests, 0), dtype=np.int64)
    for place in range(k):
        row = rng.integers(1, num_items - place + 1, num_requests)
        for earlier in np.sort(picked, axis=1).T:
            row += row >= earlier
        picked = np.column_stack([picked, row])
    return picked
