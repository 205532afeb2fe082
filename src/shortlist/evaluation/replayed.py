"""What a replay found: each request then and now, and what they come to together. See replay.py, which finds it.

R requests. Item ids are text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from shortlist.cascade.allocation.base import Budget
from shortlist.cascade.request_log import Span
from shortlist.cascade.rules import Rules
from shortlist.evaluation.aftermath import Aftermath
from shortlist.metrics.intervals import Interval, bootstrap_interval

NUM_NAMED = 10
"""Items named as gained or lost most."""
WHY = {
    "snapshot": "another snapshot answered then",
    "chain": "the run has no chain of that name; its default one answered",
    "fallback": "the cascade failed then and the most popular items stood in",
    "degraded": "something was out of order or late then",
    "gone": "nothing is known of the user any more: deleted, or in another event store",
    "past": "more or fewer of the user's events are known of that moment than were then",
    "other": "all that the log tells is the same; items made unavailable since, or scores worked out together with other requests or "
    "on another number of threads, which differ in their last digits",
}
"""Why a page may not come back as it was."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """What is other than it was; nothing of it = all is as it was."""

    run: str | None = None
    """Name of another run that answers."""
    budget: Budget = field(default_factory=Budget)
    """What a request may cost on average; the calibrated allocator is aimed at it and chooses chains anew."""
    chain: str | None = None
    """Of all requests."""
    rules: Rules | None = None
    """Laid over what the requests brought."""

    @property
    def allocates(self) -> bool:
        """Whether an allocator chooses chains anew."""
        return self.budget != Budget()

    @property
    def words(self) -> str:
        """For people."""
        limits = [
            f"{value:g} {unit}" for value, unit in ((self.budget.ms, "ms"), (self.budget.mflop, "MFLOP")) if value
        ]
        parts = [
            f"run {self.run}" if self.run is not None else "",
            f"a budget of {' and '.join(limits)} a request" if limits else "",
            f"chain {self.chain}" if self.chain is not None else "",
            "other rules" if self.rules is not None else "",
        ]
        return ", ".join(part for part in parts if part) or "nothing changed"


@dataclass(frozen=True, kw_only=True)
class Moved:
    """An item on both pages, at other places."""

    item: str
    then: int
    """Place from 1."""
    now: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One request, then and now."""

    request_id: str
    at_ms: int
    """When it was answered."""
    user: str | None
    k: int
    page_then: tuple[str, ...]
    page_now: tuple[str, ...]
    chain_then: str
    chain_now: str
    overlap: float
    """Rank-biased."""
    jaccard: float
    displacement: float
    """Mean places by which items on both pages moved."""
    score_change: float | None
    """Mean change in size of the last stage's scores of items on both pages; None where it has none of them, or is another stage."""
    same_scores: bool
    """The same page, each item with the same score to the last bit."""
    mflop_then: float
    mflop_now: float
    ms_then: float
    """As the server measured it, under its load and with others in its batch."""
    ms_now: float
    """As measured here, alone."""
    calibrated_then: float | None
    """Calibrated milliseconds of the chain; None where they are not known."""
    calibrated_now: float | None
    why: tuple[str, ...]
    """Keys of WHY."""
    degraded: str | None
    """What went wrong now."""

    @property
    def same_page(self) -> bool:
        """Whether the same items stand in the same order."""
        return self.page_then == self.page_now

    @property
    def came(self) -> list[str]:
        """Items on the new page alone."""
        return [item for item in self.page_now if item not in self.page_then]

    @property
    def went(self) -> list[str]:
        """Items on the old page alone."""
        return [item for item in self.page_then if item not in self.page_now]

    @property
    def moved(self) -> list[Moved]:
        """In the order of the new page."""
        then = {item: place for place, item in enumerate(self.page_then, start=1)}
        now = {item: place for place, item in enumerate(self.page_now, start=1)}
        return [Moved(item=i, then=then[i], now=place) for i, place in now.items() if i in then and then[i] != place]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **asdict(self),
            "same_page": self.same_page,
            "in": self.came,
            "out": self.went,
            "moved": [asdict(moved) for moved in self.moved],
        }


@dataclass(frozen=True, kw_only=True)
class Replay:
    """All requests of a window."""

    run: str
    """Whose log it is."""
    version: str
    """Of the snapshot that answered now."""
    change: Change
    since_ms: int | None
    until_ms: int | None
    span: Span
    """What the log holds."""
    differences: tuple[Difference, ...]
    skipped: Mapping[str, int]
    """Requests that could not be asked again, by reason."""
    after: Aftermath | None
    """What people did next; None without an event store."""
    notes: tuple[str, ...]
    """What to know when reading the numbers."""
    titles: Mapping[str, str]
    """Of items on either page, where they have one."""
    seed: int

    @property
    def same_share(self) -> float:
        """Share of pages that are as they were."""
        return float(np.mean([d.same_page for d in self.differences]))

    @property
    def overlap(self) -> Interval:
        """Mean rank-biased overlap, with an interval over users; of one user without."""
        value_R = np.array([d.overlap for d in self.differences])
        users_R = people(self.differences)
        if len(set(users_R)) < 2:
            return Interval(float(value_R.mean()), float("nan"), float("nan"))
        return bootstrap_interval(value_R, np.array(users_R), seed=self.seed)

    def cost(self, name: str) -> tuple[float, float] | None:
        """Mean of a request then and now in mflop, ms or calibrated (ms), of those for which both are known; None without any."""
        pairs = [(getattr(d, f"{name}_then"), getattr(d, f"{name}_now")) for d in self.differences]
        known = [pair for pair in pairs if None not in pair]
        if not known:
            return None
        then, now = np.mean(known, axis=0).tolist()
        return then, now

    @property
    def gained(self) -> list[tuple[str, int]]:
        """Items that came onto most pages, net of those they left, most first."""
        return [(item, count) for item, count in self._net().most_common(NUM_NAMED) if count > 0]

    @property
    def lost(self) -> list[tuple[str, int]]:
        """Items that left most pages, net of those they came onto, most first."""
        return [(item, -count) for item, count in self._net().most_common()[: -NUM_NAMED - 1 : -1] if count < 0]

    def _net(self) -> Counter[str]:
        net: Counter[str] = Counter()
        for d in self.differences:
            net.update(d.came)
            net.subtract(d.went)
        return net

    @property
    def chains(self) -> dict[tuple[str, str], int]:
        """Requests by chain then and now, most first."""
        return dict(Counter((d.chain_then, d.chain_now) for d in self.differences).most_common())

    @property
    def why(self) -> dict[str, int]:
        """Requests by what keeps them from coming back as they were."""
        return dict(Counter(reason for d in self.differences for reason in d.why).most_common())

    @property
    def sentences(self) -> list[str]:
        """What was found."""
        count, overlap = len(self.differences), self.overlap
        said = "" if np.isnan(overlap.low) else f" [{overlap.low:.3f}, {overlap.high:.3f}]"
        lines = [
            f"{count:,} requests with {self.change.words}: {self.same_share:.1%} of the pages are as they were, mean rank-biased overlap "
            f"{overlap.mean:.3f}{said}."
        ]
        for name, unit in (("mflop", "MFLOP"), ("calibrated", "calibrated ms")):  # measured ones do not compare
            pair = self.cost(name)
            if pair is not None:
                lines.append(f"A request cost {pair[0]:.3f} {unit} then and {pair[1]:.3f} now ({_saved(pair)}).")
        if self.after is not None:
            lines += self.after.sentences
        return lines

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        costs = {name: self.cost(name) for name in ("mflop", "ms", "calibrated")}
        overlap = self.overlap
        return {
            "run": self.run,
            "version": self.version,
            "change": {**asdict(self.change), "words": self.change.words},
            "window": {"since_ms": self.since_ms, "until_ms": self.until_ms},
            "log": asdict(self.span),
            "num_requests": len(self.differences),
            "skipped": dict(self.skipped),
            "sentences": self.sentences,
            "notes": list(self.notes),
            "summary": {
                "same_pages": self.same_share,
                "same_scores": float(np.mean([d.same_scores for d in self.differences])),
                "overlap": {n: None if np.isnan(v) else v for n, v in asdict(overlap).items()},
                "jaccard": float(np.mean([d.jaccard for d in self.differences])),
                "displacement": float(np.mean([d.displacement for d in self.differences])),
                "cost": {n: pair and {"then": pair[0], "now": pair[1]} for n, pair in costs.items()},
                "gained": [{"item": i, "title": self.titles.get(i), "pages": n} for i, n in self.gained],
                "lost": [{"item": i, "title": self.titles.get(i), "pages": n} for i, n in self.lost],
                "chains": [{"then": a, "now": b, "requests": n} for (a, b), n in self.chains.items()],
                "why": {reason: {"requests": n, "meaning": WHY[reason]} for reason, n in self.why.items()},
                "after": None if self.after is None else self.after.as_dict(),
            },
            "requests": [d.as_dict() for d in self.differences],
        }


def people(differences: Sequence[Difference]) -> list[str]:
    """Who asked, by request; each one without a name is somebody of their own."""
    return [f"{number} nobody" if d.user is None else f"user {d.user}" for number, d in enumerate(differences)]


def when(at_ms: int | None) -> str:
    """A moment for people, UTC."""
    return "never" if at_ms is None else f"{datetime.fromtimestamp(at_ms / 1000, UTC):%Y-%m-%d %H:%M:%S}"


def _saved(pair: tuple[float, float]) -> str:
    """What is saved of a cost, in words."""
    then, now = pair
    if then <= 0 or now == then:
        return "the same" if now == then else "no share"
    return f"{1 - now / then:.0%} saved" if now < then else f"{now / then - 1:.0%} more"
