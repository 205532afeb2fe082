"""What requests cost and brought, added up by stage and by chain."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class StageReport:
    """What one stage did for one request."""

    stage: str
    systems: tuple[str, ...]
    """Those that acted."""
    num_received: int
    """Candidates in; for retrieval the items of the catalogue."""
    num_kept: int
    """Candidates out."""
    spent_ms: float
    """Wall time; a batch's time divided by its requests."""
    spent_mflop: float
    """1e6 FLOPs, one multiply-add counted as two, as the systems state them."""
    degraded: str | None = None
    """Why the stage, or a part of it, was passed over; None when all went well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageTotal:
    """Sums over the requests that a stage saw."""

    stage: str
    num_requests: int = 0
    num_received: int = 0
    num_kept: int = 0
    num_degraded: int = 0
    spent_ms: float = 0.0
    spent_mflop: float = 0.0

    @property
    def mean_ms(self) -> float:
        """Per request."""
        return self.spent_ms / max(self.num_requests, 1)

    @property
    def mean_mflop(self) -> float:
        """Per request."""
        return self.spent_mflop / max(self.num_requests, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainTotal:
    """Sums over the requests that one chain answered."""

    chain: str
    num_requests: int = 0
    spent_ms: float = 0.0
    spent_mflop: float = 0.0
    value: float = 0.0
    """What the requests brought, in the unit that the caller gave; 0 where nobody said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """A meter's reading."""

    stages: tuple[StageTotal, ...]
    """In the order in which they act."""
    chains: tuple[ChainTotal, ...]
    """By name."""

    @property
    def num_requests(self) -> int:
        """Requests of all chains."""
        return sum(chain.num_requests for chain in self.chains)

    @property
    def spent_ms(self) -> float:
        """Of all requests."""
        return sum(chain.spent_ms for chain in self.chains)

    @property
    def spent_mflop(self) -> float:
        """Of all requests."""
        return sum(chain.spent_mflop for chain in self.chains)

    @property
    def value(self) -> float:
        """Of all requests."""
        return sum(chain.value for chain in self.chains)


class Meter:
    """Adds up stage reports; may be shared between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stages: dict[str, _Sums] = {}
        self._chains: dict[str, _Sums] = {}

    def add(self, chain: str, reports: Sequence[Sequence[StageReport]], values: Sequence[float] | None = None) -> None:
        """Requests that `chain` answered.

        Args:
            chain: its name.
            reports: per request, per stage.
            values: per request, what it brought; may also be added later by `credit`.
        """
        with self._lock:
            total = self._chains.setdefault(chain, _Sums())
            for request in reports:
                for report in request:
                    self._stages.setdefault(report.stage, _Sums()).add(report)
                total.num_requests += 1
                total.spent_ms += sum([report.spent_ms for report in request])
                total.spent_mflop += sum([report.spent_mflop for report in request])
            total.value += sum(values or ())

    def credit(self, chain: str, value: float) -> None:
        """Worth that came in later for requests of `chain`."""
        with self._lock:
            self._chains.setdefault(chain, _Sums()).value += value

    def summary(self) -> Summary:
        """The reading so far."""
        with self._lock:
            return self._read()

    def reset(self) -> Summary:
        """The reading so far; counting starts again at 0."""
        with self._lock:
            reading = self._read()
            self._stages.clear()
            self._chains.clear()
            return reading

    def _read(self) -> Summary:
        stages = tuple(
            StageTotal(
                stage=name,
                num_requests=total.num_requests,
                num_received=total.num_received,
                num_kept=total.num_kept,
                num_degraded=total.num_degraded,
                spent_ms=total.spent_ms,
                spent_mflop=total.spent_mflop,
            )
            for name, total in self._stages.items()
        )
        chains = tuple(
            ChainTotal(
                chain=name,
                num_requests=total.num_requests,
                spent_ms=total.spent_ms,
                spent_mflop=total.spent_mflop,
                value=total.value,
            )
            for name, total in sorted(self._chains.items())
        )
        return Summary(stages=stages, chains=chains)


@dataclass(slots=True)
class _Sums:
    """What a stage or a chain has come to so far: changed in place, since every request adds to several."""

    num_requests: int = 0
    num_received: int = 0
    num_kept: int = 0
    num_degraded: int = 0
    spent_ms: float = 0.0
    spent_mflop: float = 0.0
    value: float = 0.0

    def add(self, report: StageReport) -> None:
        """One request of a stage."""
        self.num_requests += 1
        self.num_received += report.num_received
        self.num_kept += report.num_kept
        self.num_degraded += report.degraded is not None
        self.spent_ms += report.spent_ms
        self.spent_mflop += report.spent_mflop
