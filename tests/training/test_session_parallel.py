"""Session-parallel batches against the published procedure, written as a loop over lanes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from next_item_support import view_of
from shortlist.data.histories import Histories, View
from shortlist.data.schema import FieldTable, Space
from shortlist.errors import ConfigError, DataError
from shortlist.layers.gru import LANE, SESSION_START
from shortlist.training.session_parallel import SessionParallelSource, plan
from shortlist.training.sources import BatchSource

HOUR = 3600


def timed(users: list[list[tuple[int, list[int]]]], num_items: int = 30) -> View:
    """A view from users' groups of (second, items)."""
    item, time, group, offsets = [], [], [], [0, 0]
    for groups in users:
        for second, items in groups:
            item += items
            time += [second] * len(items)
            group += [group[-1] + 1 if group else 0] * len(items)
        offsets.append(len(item))
    arrays = [np.array(x, dtype=np.int64) for x in (item, time, group)]
    ones = np.ones(len(item), dtype=np.int64)
    histories = Histories(
        offsets=np.array(offsets),
        item=arrays[0],
        time=arrays[1],
        group=arrays[2],
        action=ones,
        value=ones.astype(np.float32),
    )
    known = torch.ones(num_items + 1, dtype=torch.bool)
    known[0] = False
    space = Space(items=FieldTable(num_items + 1), known_items=known, num_users=len(users))
    return View(histories=histories, space=space, users=FieldTable(len(users) + 1), now=10**9)


def published(sessions: list[list[int]], num_lanes: int) -> list[list[tuple[int, int, int, bool]]]:
    """Per step the rows (lane, input, target, opens), as the paper's procedure walks; sessions stand in order of start."""
    lanes = [[s, 0] for s in range(min(num_lanes, len(sessions)))]
    following, steps = len(lanes), []
    while True:
        rows = []
        for number, (session, at) in enumerate(lanes):
            if session is not None:
                rows.append((number, sessions[session][at], sessions[session][at + 1], at == 0))
        if not rows:
            return steps
        steps.append(rows)
        for lane in lanes:
            if lane[0] is None:
                continue
            lane[1] += 1
            if lane[1] + 1 == len(sessions[lane[0]]):
                lane[:] = [following, 0] if following < len(sessions) else [None, 0]
                following += 1


def rows_of(batch) -> list[tuple[int, int, int, bool]]:
    items, targets = batch.history.items, batch.targets.items
    assert (items.lengths == 1).all()
    assert batch.targets.position.tolist() == list(range(batch.size))
    return list(
        zip(
            batch.context[LANE].tolist(),
            items.values.tolist(),
            targets.values.tolist(),
            batch.context[SESSION_START].tolist(),
        )
    )


@pytest.mark.parametrize("num_lanes", [1, 2, 3, 7, 100])
def test_order_is_the_published_one(num_lanes):
    rng = np.random.default_rng(0)
    sessions, users, start = [], [], 0
    for _ in range(25):
        start += int(rng.integers(1, 100))
        items = rng.integers(1, 31, rng.integers(2, 9)).tolist()
        sessions.append(items)
        users.append([(start + second, [item]) for second, item in enumerate(items)])
    shuffled = [users[i] for i in rng.permutation(25)]  # the source sorts by start
    source = SessionParallelSource(timed(shuffled), batch_size=num_lanes)
    expected = published(sessions, num_lanes)
    assert source.steps_per_epoch() == len(expected)
    assert [rows_of(batch) for batch in source.batches(0)] == expected


def test_by_hand():
    """The figure of the paper: a is three long, b two, c three, d two; two lanes."""
    view = timed(
        [
            [(0, [1]), (1, [2]), (2, [3])],
            [(10, [4]), (11, [5])],
            [(20, [6]), (21, [7]), (22, [8])],
            [(30, [9]), (31, [10])],
        ]
    )
    steps = [rows_of(batch) for batch in SessionParallelSource(view, batch_size=2).batches(0)]
    assert steps == [
        [(0, 1, 2, True), (1, 4, 5, True)],
        [(0, 2, 3, False), (1, 6, 7, True)],
        [(0, 9, 10, True), (1, 7, 8, False)],
    ]


def test_a_gap_ends_a_session_and_nothing_is_predicted_across_it():
    view = timed([[(0, [1]), (HOUR, [2]), (4 * HOUR, [3]), (4 * HOUR + 5, [4]), (9 * HOUR, [5])]])
    source = SessionParallelSource(view, batch_size=4, gap_hours=2.0)
    assert [rows_of(batch) for batch in source.batches(0)] == [[(0, 1, 2, True), (1, 3, 4, True)]]  # 5 is alone
    whole = SessionParallelSource(view, batch_size=4)
    assert [rows_of(batch)[0][1:3] for batch in whole.batches(0)] == [(1, 2), (2, 3), (3, 4), (4, 5)]


def test_a_basket_is_read_whole_and_asked_for_whole():
    view = view_of([[[1, 2], [3], [5, 4, 4]]], 9)
    first, second = SessionParallelSource(view, batch_size=2).batches(0)
    assert first.history.items.values.tolist() == [1, 2]
    assert first.targets.position.tolist() == [1]
    assert first.targets.items.values.tolist() == [3]
    assert second.targets.items.values.tolist() == [4, 5]
    assert second.targets.weight.tolist() == [0.5, 0.5]
    assert (second.time >= second.history.time).all()


def test_every_transition_comes_once_and_resuming_gives_the_rest():
    rng = np.random.default_rng(1)
    users = [
        [(int(s), [int(rng.integers(1, 31))]) for s in np.sort(rng.choice(10**6, rng.integers(2, 12), replace=False))]
        for _ in range(60)
    ]
    source = SessionParallelSource(timed(users), batch_size=8, gap_hours=48.0)
    batches = list(source.batches(0))
    assert len(batches) == source.steps_per_epoch()
    assert sum(batch.size for batch in batches) == source.steps.sum()
    rest = list(source.batches(3, start=5))
    assert [rows_of(batch) for batch in rest] == [rows_of(batch) for batch in batches[5:]]
    assert isinstance(source, BatchSource)


def test_plan_gives_each_session_the_first_free_lane():
    schedule = plan(np.array([3, 1, 1, 5, 1]), 2)
    assert schedule.lane.tolist() == [0, 1, 1, 1, 0]
    assert schedule.start.tolist() == [0, 0, 1, 2, 3]
    assert schedule.num_steps == 7


def test_what_cannot_be_is_refused():
    with pytest.raises(DataError, match="no session"):
        SessionParallelSource(view_of([[[1]], [[2, 3]]], 9), batch_size=2)
    with pytest.raises(ConfigError, match="batch_size"):
        SessionParallelSource(view_of([[[1], [2]]], 9), batch_size=0)
    with pytest.raises(ConfigError, match="gap_hours"):
        SessionParallelSource(view_of([[[1], [2]]], 9), batch_size=1, gap_hours=0.0)
