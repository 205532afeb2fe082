"""What auxiliary networks learn, from old clicks with the conversions that have come by now.

A conversion that comes later than that moment counts as none, so that nothing of the future leaks ("mask30d" in ES-DFM's code). R clicks,
n of them used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from shortlist.data.histories import Float, Int
from shortlist.errors import ConfigError
from shortlist.training.feedback.windows import HOUR_S, Windows


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """What an auxiliary network is shown."""

    click: Int
    """[n] numbers of the clicks."""
    elapsed: Int
    """[n] seconds that the click is taken to be old."""
    labels: Mapping[str, Float]
    """[n] by output; NaN where a click teaches an output nothing."""


class Auxiliary(ABC):
    """One auxiliary network with several outputs, each a chance."""

    heads: tuple[str, ...]
    reads_elapsed: ClassVar[bool] = False
    """Its chances depend on how long ago the click was."""

    @abstractmethod
    def lesson(self, clicked_at: Int, converted_at: Int, windows: Windows, now: int) -> Lesson:
        """What to learn from at the moment `now`, in seconds.

        Args:
            clicked_at: [R] seconds.
            converted_at: [R] seconds; NEVER where there is no conversion. What lies after `now` is not read.
        """


class LateConversions(Auxiliary):
    """ES-DFM's, which DEFER and DEFUSE share: f_dp = P(converts, but not within the observation window) of any click, and f_rn = P(never
    converts) of one that did not within the observation window (Yang et al., AAAI 2021, section 4.3; both binary cross-entropy)."""

    heads = ("f_dp", "f_rn")

    def lesson(self, clicked_at: Int, converted_at: Int, windows: Windows, now: int) -> Lesson:
        """See Auxiliary: clicks whose observation window has passed."""
        click = np.flatnonzero(clicked_at + windows.observation_s <= now)
        quick, late = windows.split(clicked_at[click], converted_at[click], now)
        never = np.where(quick, np.nan, ~late)
        return Lesson(
            click=click,
            elapsed=now - clicked_at[click],
            labels={"f_dp": late.astype(np.float32), "f_rn": never.astype(np.float32)},
        )


class SettledConversions(Auxiliary):
    """The same chances for a training at one moment, f_rn for a click of any age: P(never converts | has not by that age).

    It learns from settled clicks alone, whose attribution window has closed, so that nothing is masked: each once at the age of the
    observation window and once at an age drawn evenly up to the attribution window.
    """

    heads = ("f_dp", "f_rn")
    reads_elapsed: ClassVar[bool] = True

    def lesson(self, clicked_at: Int, converted_at: Int, windows: Windows, now: int) -> Lesson:
        """See Auxiliary; ConfigError where no click is settled."""
        settled = np.flatnonzero(clicked_at + windows.attribution_s <= now)
        if not len(settled):
            raise ConfigError(
                f"no click is older than the attribution window of {windows.attribution_s / HOUR_S:.0f} hours when training begins, so "
                "nobody knows how many conversions are still to come; shorten it (learning.task_hours) or learn from more (data.fit_share)"
            )
        click = np.tile(settled, 2)
        drawn = np.random.default_rng(len(settled)).integers(windows.observation_s, windows.attribution_s, len(settled))
        age = np.append(np.full(len(settled), windows.observation_s), drawn)
        quick, late = windows.split(clicked_at[click], converted_at[click], now)
        converts = quick | late
        by_age = converts & (converted_at[click] <= clicked_at[click] + age)
        return Lesson(
            click=click,
            elapsed=age,
            labels={
                "f_dp": late.astype(np.float32),
                "f_rn": np.where(by_age, np.nan, ~converts).astype(np.float32),
            },
        )


@dataclass(frozen=True)
class CounterfactualDeadline(Auxiliary):
    """FSIW's: f1 = P(has converted by now) of a click that converts, f0 = P(never converts) of one that has not by now, both for a click of
    a given age (Yasui et al., WWW 2020, section 4.2). They are learned as if it were `deadline_hours` earlier than it is."""

    deadline_hours: float
    heads: tuple[str, ...] = ("f1", "f0")
    reads_elapsed: ClassVar[bool] = True

    def lesson(self, clicked_at: Int, converted_at: Int, windows: Windows, now: int) -> Lesson:
        """See Auxiliary; ConfigError where no click is older than the deadline."""
        deadline = now - round(self.deadline_hours * HOUR_S)
        click = np.flatnonzero(clicked_at < deadline)
        if not len(click):
            raise ConfigError(
                f"fsiw: no click is older than deadline_hours = {self.deadline_hours:g} when training begins; lower it"
            )
        quick, late = windows.split(clicked_at[click], converted_at[click], now)
        converts = quick | late
        by_deadline = converts & (converted_at[click] < deadline)
        return Lesson(
            click=click,
            elapsed=deadline - clicked_at[click],
            labels={
                "f1": np.where(converts, by_deadline, np.nan).astype(np.float32),
                "f0": np.where(by_deadline, np.nan, ~converts).astype(np.float32),
            },
        )
