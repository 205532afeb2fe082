"""What people did after their requests, counted on the page that they were shown and on one that they were not.

An event belongs to the user's last request before it, if that is no longer ago than some hours. What was not shown could not be
clicked, so the counts favour the old page; they say what a change would have taken away, not what it would have brought.

R requests, N events.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from shortlist.metrics.intervals import PairedTest, paired_difference
from shortlist.store.events import EventStore, StoreUnavailable

CAVEAT = (
    "Only items that were shown could be clicked, so this favours the page of then: it says what would have been taken away, and nothing "
    "of what the new items would have brought."
)
_USER = 1 << 44
"""Above any moment in milliseconds, so that a user and a moment make one number that sorts by both."""


class Pages(Protocol):
    """A request with both pages."""

    @property
    def user(self) -> str | None:
        """Who asked; None = nobody knows."""

    @property
    def at_ms(self) -> int:
        """When it was answered."""

    @property
    def page_then(self) -> tuple[str, ...]:
        """As shown."""

    @property
    def page_now(self) -> tuple[str, ...]:
        """As it would have been."""


@dataclass(frozen=True, kw_only=True)
class OfAction:
    """Events of one kind."""

    events: int
    on_then: int
    """With an item of the old page."""
    on_now: int
    """With an item of the new page."""


@dataclass(frozen=True, kw_only=True)
class Aftermath:
    """Hits of both pages: distinct items of a page that its user then had an event with."""

    hours: float
    num_requests: int
    """Counted."""
    num_nameless: int
    """Left out, since nobody knows whose they are."""
    num_learned: int
    """Left out, since the snapshot was trained on what came after them."""
    hits_then: int
    hits_now: int
    test: PairedTest | None
    """Hits of a request now minus then; interval over users; None for fewer than two."""
    actions: Mapping[str, OfAction]

    @property
    def sentences(self) -> list[str]:
        """What was found, with its caveat."""
        learned = f" {self.num_learned:,} requests are left out, since the run was trained on what came after them."
        left_out = learned if self.num_learned else ""
        if not self.num_requests:
            return [f"What people did next can not be counted.{left_out}"] if left_out else []
        said = ""
        if self.test is not None:
            said = f", {self.test.difference:+.4f} a request [{self.test.low:+.4f}, {self.test.high:+.4f}], p = {self.test.p_value:.3f}"
        return [
            f"Within {self.hours:g} hours people took {self.hits_then:,} items of the {self.num_requests:,} old pages, and "
            f"{self.hits_now:,} items of the new ones{said}.{left_out}",
            CAVEAT,
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "caveat": CAVEAT}


def aftermath(
    requests: Sequence[Pages], events: EventStore, *, hours: float, known_until: float | None, seed: int
) -> Aftermath | None:
    """Count hits of both pages.

    Args:
        requests: R.
        events: what happened; the newest of each user, as many as the store gives.
        hours: after a request, in which an event still belongs to it.
        known_until: seconds; requests before it are left out, since the snapshot that answers now has learned from what came after them.
            None = it is not known how far it has.
        seed: of the bootstrap.

    Gives None where the events can not be read.
    """
    named = [request for request in requests if request.user is not None]
    counted = [r for r in named if known_until is None or r.at_ms >= known_until * 1000]
    users = list(dict.fromkeys(r.user for r in counted if r.user is not None))
    try:
        found = events.history(users) if users else None
    except StoreUnavailable:
        return None
    number_of = {user: number for number, user in enumerate(users)}
    counted.sort(key=lambda r: (number_of[r.user or ""], r.at_ms))
    user_R = np.array([number_of[r.user or ""] for r in counted], dtype=np.int64)
    then_R, now_R = np.zeros(len(counted)), np.zeros(len(counted))
    actions: dict[str, list[int]] = {}
    if found is not None and len(found):
        at_R = np.array([r.at_ms for r in counted], dtype=np.int64)
        owner_N = np.searchsorted(user_R * _USER + at_R, found.user * _USER + found.time_ms, side="left") - 1
        late_N = found.time_ms - at_R[owner_N] > hours * 3_600_000
        belongs_N = (owner_N >= 0) & (user_R[owner_N] == found.user) & ~late_N
        taken: set[tuple[int, str]] = set()
        for n in np.flatnonzero(belongs_N).tolist():
            owner, item = int(owner_N[n]), found.item[n]
            on_then, on_now = item in counted[owner].page_then, item in counted[owner].page_now
            kinds = actions.setdefault(found.action[n] or "unnamed", [0, 0, 0])
            for place, is_there in enumerate((True, on_then, on_now)):
                kinds[place] += is_there
            if (owner, item) not in taken:
                taken.add((owner, item))
                then_R[owner] += on_then
                now_R[owner] += on_now
    return Aftermath(
        hours=hours,
        num_requests=len(counted),
        num_nameless=len(requests) - len(named),
        num_learned=len(named) - len(counted),
        hits_then=int(then_R.sum()),
        hits_now=int(now_R.sum()),
        test=paired_difference(now_R, then_R, user_R, seed=seed) if len(users) > 1 else None,
        actions={name: OfAction(events=n, on_then=a, on_now=b) for name, (n, a, b) in sorted(actions.items())},
    )
