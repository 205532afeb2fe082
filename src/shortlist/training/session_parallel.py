"""Session-parallel mini-batches (Hidasi et al., ICLR 2016, section 3.1.1): every lane walks through one session after another.

    lane 0   a1>a2  a2>a3  d1>d2  ...        sessions in the order of their start; when one ends, its lane takes the next one
    lane 1   b1>b2  c1>c2  c2>c3  ...        and forgets its state; a step is one update and reaches back no further

S sessions, G groups of events, B rows of a batch (lanes at work).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from shortlist.data.batches import Batch, History, NextTargets
from shortlist.data.histories import Int, View, ranges
from shortlist.data.jagged import Jagged
from shortlist.errors import ConfigError, DataError
from shortlist.layers.gru import LANE, SESSION_START


class Schedule(NamedTuple):
    """Which lane works on which session, and when."""

    lane: Int
    """[S]."""
    start: Int
    """[S] step of the session's first row."""
    num_steps: int
    """Until the last session ends."""


def plan(steps_S: Int, num_lanes: int) -> Schedule:
    """Give sessions, in their order, to lanes: the first ones fill the lanes, each later one takes the first lane that is free.

    Lanes that end at the same step take the next sessions in the lanes' order. Python runs once per step at which a lane ends.

    Args:
        steps_S: [S] rows of each session, 1 or more.
        num_lanes: lanes at most.
    """
    num_sessions, num_lanes = len(steps_S), min(num_lanes, len(steps_S))
    lane, start = np.arange(num_sessions), np.zeros(num_sessions, dtype=np.int64)
    free_at = steps_S[:num_lanes].copy()
    taken = num_lanes
    while taken < num_sessions:
        now = free_at.min()
        free = np.flatnonzero(free_at == now)[: num_sessions - taken]
        chosen = slice(taken, taken + len(free))
        lane[chosen], start[chosen] = free, now
        free_at[free] += steps_S[chosen]
        taken += len(free)
    return Schedule(lane, start, int((start + steps_S).max(initial=0)))


class SessionParallelSource:
    """Steps of session-parallel training: one group of events per lane as input, the session's next group as target.

    A batch's context tells the lane of each row (`LANE`) and whether it opens a session (`SESSION_START`); the system keeps the lanes'
    states. The order is that of time in every epoch, later sessions last, as published: nothing is shuffled, so there is no seed.
    When no session is left the lanes that have ended drop out, and the last batches are smaller.

    Args:
        view: training-time events.
        batch_size: lanes.
        gap_hours: a session ends where more than so many hours lie between two groups of a user; None = a user is one session.

    Raises DataError when no session has two groups; ConfigError for settings out of range.
    """

    def __init__(self, view: View, *, batch_size: int, gap_hours: float | None = None) -> None:
        if batch_size < 1 or (gap_hours is not None and gap_hours <= 0):
            raise ConfigError(f"batch_size must be at least 1 and gap_hours above 0, got {batch_size} and {gap_hours}")
        self.view, histories = view, view.histories
        user = histories.user_of_event
        opens = np.ones(histories.num_events, dtype=bool)
        opens[1:] = (histories.group[1:] != histories.group[:-1]) | (user[1:] != user[:-1])
        first_G = np.flatnonzero(opens)
        self.group_start: Int = np.append(first_G, histories.num_events)
        self.user_G: Int = user[first_G]
        is_new_G = np.ones(len(first_G), dtype=bool)
        is_new_G[1:] = self.user_G[1:] != self.user_G[:-1]
        if gap_hours is not None:
            waited = histories.time[first_G[1:]] - histories.time[first_G[1:] - 1]
            is_new_G[1:] |= waited > gap_hours * 3600
        begins = np.flatnonzero(is_new_G)
        steps = np.diff(np.append(begins, len(first_G))) - 1
        begins, steps = begins[steps > 0], steps[steps > 0]
        if not len(begins):
            raise DataError(
                "no session has events at two different times, so there is no next event to learn from; allow a longer gap_hours"
            )
        order = np.argsort(histories.time[first_G[begins]], kind="stable")
        self.first_group: Int = begins[order]
        self.steps: Int = steps[order]
        self.schedule = plan(self.steps, batch_size)
        self.num_lanes = int(self.schedule.lane.max()) + 1
        self._key: Int = self.schedule.lane * self.schedule.num_steps + self.schedule.start
        self._by_lane = np.argsort(self._key, kind="stable")
        self._key = self._key[self._by_lane]

    def steps_per_epoch(self) -> int:
        """See BatchSource."""
        return self.schedule.num_steps

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See BatchSource; every epoch is the same."""
        for step in range(start, self.schedule.num_steps):
            yield self._batch(step)

    def _batch(self, step: int) -> Batch:
        lane_B = np.arange(self.num_lanes)
        place = np.searchsorted(self._key, lane_B * self.schedule.num_steps + step, side="right") - 1
        session_B = self._by_lane[place]
        done_B = step - self.schedule.start[session_B]
        at_work = done_B < self.steps[session_B]
        lane_B, done_B, session_B = lane_B[at_work], done_B[at_work], session_B[at_work]
        group_B = self.first_group[session_B] + done_B
        histories = self.view.histories
        index, lengths_B = ranges(self.group_start[group_B], self.group_start[group_B + 1])
        user = torch.from_numpy(self.user_G[group_B])
        return Batch(
            user=user,
            time=torch.from_numpy(histories.time[self.group_start[group_B + 1]]),
            history=History(
                items=Jagged.from_lengths(torch.from_numpy(histories.item[index]), torch.from_numpy(lengths_B)),
                time=torch.from_numpy(histories.time[index]),
                action=torch.from_numpy(histories.action[index]),
                value=torch.from_numpy(histories.value[index]),
                group=torch.from_numpy(histories.group[index]),
            ),
            user_fields=self.view.users.gather(user),
            context={LANE: torch.from_numpy(lane_B), SESSION_START: torch.from_numpy(done_B == 0)},
            targets=self._targets(group_B + 1, lengths_B),
        )

    def _targets(self, group_B: Int, lengths_B: Int) -> NextTargets:
        """The distinct items of the given groups, asked for at the last event of each row."""
        index, num_B = ranges(self.group_start[group_B], self.group_start[group_B + 1])
        item = self.view.histories.item[index]
        width = self.view.space.num_items + 1
        pair = np.unique(np.repeat(np.arange(len(group_B)), num_B) * width + item)
        num_B = np.bincount(pair // width, minlength=len(group_B)).astype(np.int64)
        return NextTargets(
            position=torch.from_numpy(np.cumsum(lengths_B) - 1),
            items=Jagged.from_lengths(torch.from_numpy(pair % width), torch.from_numpy(num_B)),
            weight=torch.from_numpy(np.repeat(1.0 / num_B, num_B).astype(np.float32)),
        )
