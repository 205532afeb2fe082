"""How a run learns from what came in since it was trained, and how often; part of the run's settings."""

from __future__ import annotations

from dataclasses import dataclass

from shortlist.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateConfig:
    """What `shortlist update` does."""

    every_hours: float = 24.0
    """Hours between the beginnings of two updates with --watch."""
    epochs: int = 2
    """Epochs at most of a system that goes on from the weights it has; one that can not is trained anew with its own epochs."""
    margin: float = 0.05
    """Share of the old snapshot's NDCG on the newest events that the new one may fall short of and still be published."""
    valid_share: float = 0.2
    """Share of the new events, those before the newest, on which training is stopped."""
    test_share: float = 0.2
    """Share of the new events, the newest, on which old and new snapshot are compared; what only counts has not seen them either."""
    min_events: int = 100
    """New events below which nothing is done."""
    max_judged: int = 2_000
    """Requests at most by which the two are compared, drawn at random."""

    def __post_init__(self) -> None:
        if not self.every_hours > 0:
            raise ConfigError(f"every_hours must be above 0, got {self.every_hours}")
        for name in ("epochs", "min_events", "max_judged"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.margin <= 1:
            raise ConfigError(f"margin must be from 0 to 1, got {self.margin}")
        for name in ("valid_share", "test_share"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.valid_share + self.test_share > 0.9:
            raise ConfigError(
                f"valid_share and test_share add up to {self.valid_share + self.test_share:g}; leave new events to train on"
            )
