"""Rules of one request: which items may be on the page at all. They act before the stages, so a full page is still made.

    Rules(allow=("a1", "b2"), deny=("c3",), seen="drop")

Each rule is counted: what it alone took away of what the rules before it had left, in the order allow, deny, seen. n items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from shortlist.data.histories import Int
from shortlist.data.vocabulary import Id
from shortlist.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """What a request may see. An id that matches no item is passed over and counted."""

    allow: Sequence[Id] | None = None
    """Only these items; None = all. An empty list allows nothing: the page is empty."""
    deny: Sequence[Id] = ()
    """None of these, even where `allow` names them."""
    seen: Literal["keep", "drop"] | None = None
    """Whether items of the user's history may be shown; None = as the surface says."""

    def __post_init__(self) -> None:
        for name, ids in (("allow", self.allow), ("deny", self.deny)):
            if isinstance(ids, str | bytes):
                raise ConfigError(f"{name} must be a list of item ids, got the text {ids!r:.80}")
        if self.seen not in (None, "keep", "drop"):
            raise ConfigError(f"seen must be 'keep' or 'drop', got {self.seen!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ruling:
    """What rules mean for one request."""

    allowed: Tensor | None
    """bool [n + 1] by allow and deny, False for row 0; None = no such rule. Seen items are left to the batch's exclusions."""
    removed: Mapping[str, int]
    """Items each rule took away: of the request's own candidates where it has some, else of the catalogue."""
    ignored: Mapping[str, int]
    """Ids without a match, by rule."""


def rule(
    rules: Rules,
    row_of: Callable[[Sequence[Id]], Int],
    num_items: int,
    *,
    seen: Int | None = None,
    candidates: Int | None = None,
) -> Ruling:
    """Apply rules.

    Args:
        rules: of the request.
        row_of: catalogue rows of item ids, 0 where unknown; as Vocabulary.encode.
        num_items: n.
        seen: catalogue rows of the user's history where seen items are dropped; repeats and 0 are allowed.
        candidates: rows the request brought itself; None = it chooses from the catalogue.
    """
    removed: dict[str, int] = {}
    ignored: dict[str, int] = {}
    if rules.allow is None and not rules.deny:
        if seen is not None:
            removed["seen"] = int(np.isin(candidates, seen).sum()) if candidates is not None else _distinct(seen)
        return Ruling(allowed=None, removed=removed, ignored=ignored)

    left = np.zeros(num_items + 1, dtype=bool)
    left[slice(1, None) if candidates is None else candidates[candidates > 0]] = True
    allowed = np.full(num_items + 1, rules.allow is None)
    if rules.allow is not None:
        wanted, ignored["allow"] = _rows(rules.allow, row_of)
        allowed[wanted] = True
        before = int(left.sum())
        left &= allowed
        removed["allow"] = before - int(left.sum())
    if rules.deny:
        unwanted, ignored["deny"] = _rows(rules.deny, row_of)
        removed["deny"] = int(left[unwanted].sum())
        left[unwanted] = allowed[unwanted] = False
    if seen is not None:
        removed["seen"] = int(left[np.unique(seen)].sum())
    allowed[0] = False
    return Ruling(allowed=torch.from_numpy(allowed), removed=removed, ignored=ignored)


def _rows(ids: Sequence[Id], row_of: Callable[[Sequence[Id]], Int]) -> tuple[Int, int]:
    """Distinct rows of the ids, and how many ids match none."""
    rows = row_of(ids)
    return np.unique(rows[rows > 0]), int((rows == 0).sum())


def _distinct(rows: Int) -> int:
    return len(np.unique(rows[rows > 0]))
