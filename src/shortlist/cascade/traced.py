"""One question with its page and everything that led to it, for explanations."""

from __future__ import annotations

from dataclasses import dataclass

from shortlist.cascade.cascade import Page
from shortlist.cascade.live import Live
from shortlist.data.batches import Batch
from shortlist.data.vocabulary import Id


@dataclass(frozen=True, kw_only=True, slots=True)
class Traced:
    """One question, what was known of it, and how its page came about."""

    live: Live
    user: Id | None
    batch: Batch | None
    """The request as the cascade got it, on the CPU; None where not even the user's past could be read."""
    page: Page
    num_history: int
    """Events known; the batch holds the newest of them."""
    problems: tuple[str, ...]
    """What went wrong outside the stages."""
