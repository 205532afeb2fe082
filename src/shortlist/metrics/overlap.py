"""How alike two pages are: two rankings of any hashable ids, best first, each id at most once in either.

k1 and k2 places; a page may be empty.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from shortlist.errors import ConfigError, DataError

PERSISTENCE = 0.9
"""Chance that a reader goes on to the next place; the first ten places then have 86 % of the weight."""


def rank_biased_overlap(
    first: Sequence[Hashable], second: Sequence[Hashable], persistence: float = PERSISTENCE
) -> float:
    """Extrapolated rank-biased overlap, from 0 (nothing shared) to 1 (the same ranking); symmetric.

    The mean over readers of the share of items that the two rankings have in common down to where the reader stops; beyond the end of a
    ranking the agreement found there is taken to go on (Webber, Moffat and Zobel, TOIS 2010, equation 32, for rankings of any two
    lengths). Two empty pages are the same; an empty and another one share nothing.

    Raises ConfigError for a persistence outside (0, 1), DataError for an id that stands twice on a page.
    """
    if not 0 < persistence < 1:
        raise ConfigError(f"persistence must lie between 0 and 1, got {persistence}")
    _refuse_repeats(first, second)
    short, long = sorted((first, second), key=len)
    s, n = len(short), len(long)
    if not s:
        return float(n == 0)
    # An item is shared from the depth on where the second of the two rankings shows it.
    place_of = {item: place for place, item in enumerate(short, start=1)}
    shared_from = [max(place_of[item], place) for place, item in enumerate(long, start=1) if item in place_of]
    depth_n = np.arange(1, n + 1, dtype=np.float64)
    shared_n = np.cumsum(np.bincount(shared_from, minlength=n + 1)[1 : n + 1])
    expected_n = shared_n[s - 1] * np.maximum(depth_n - s, 0) / s  # what the short one would share, went it on
    seen = (1 - persistence) / persistence * float(((shared_n + expected_n) / depth_n) @ persistence**depth_n)
    beyond = ((shared_n[-1] - shared_n[s - 1]) / n + shared_n[s - 1] / s) * persistence**n
    return min(float(seen + beyond), 1.0)


def jaccard(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Items on both pages / items on either, 0 to 1; two empty pages are the same. DataError for an id that stands twice."""
    _refuse_repeats(first, second)
    either = len(set(first) | set(second))
    return len(set(first) & set(second)) / either if either else 1.0


def displacement(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Mean number of places by which items on both pages moved; 0 where none is on both. DataError for an id that stands twice."""
    _refuse_repeats(first, second)
    place_of = {item: place for place, item in enumerate(first)}
    moves = [abs(place - place_of[item]) for place, item in enumerate(second) if item in place_of]
    return sum(moves) / len(moves) if moves else 0.0


def _refuse_repeats(*pages: Sequence[Hashable]) -> None:
    for page in pages:
        if len(set(page)) < len(page):
            twice = next(item for place, item in enumerate(page) if item in page[:place])
            raise DataError(f"the item {twice!r} stands twice on a page; a ranking has each item once")
