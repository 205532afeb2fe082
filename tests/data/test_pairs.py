"""Pair fields against a loop over every candidate and every event."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_support import DAY, random_histories
from shortlist.data.batches import Batch, request_batch
from shortlist.data.histories import Histories
from shortlist.data.jagged import Jagged
from shortlist.data.pairs import PAIR_FIELDS, pair_fields
from shortlist.data.schema import FieldTable
from shortlist.data.splits import past_requests

NAMES = tuple(f.name for f in PAIR_FIELDS)


def by_hand(history: list[tuple[int, int, int]], item: int, now: int, unit: float) -> dict[str, float]:
    """Fields of one candidate from (item, time, group) events, oldest first."""
    groups = list(dict.fromkeys(group for _, _, group in history))
    mine = [(time, group) for i, time, group in history if i == item and item > 0]
    held = {group: time for time, group in mine}
    out = dict.fromkeys(NAMES, 0.0)
    out["pair_history_events"] = math.log1p(len(history)) / 6
    out["pair_history_groups"] = math.log1p(len(groups)) / 4
    if not mine:
        return out
    first, last = (now - mine[0][0]) / unit, (now - mine[-1][0]) / unit
    out["pair_seen"] = 1.0
    out["pair_times"] = math.log1p(len(mine)) / 4
    out["pair_groups"] = math.log1p(len(held)) / 4
    out["pair_share"] = len(mine) / len(history)
    out["pair_group_share"] = len(held) / len(groups)
    out["pair_since_last"] = math.log1p(last) / 6
    out["pair_since_first"] = math.log1p(first) / 6
    out["pair_recency"] = 1 / (1 + last)
    out["pair_recent"] = math.log1p(sum(0.5 ** ((now - time) / unit / 30) for time in held.values())) / 4
    after = len(groups) - 1 - groups.index(mine[-1][1])
    out["pair_in_last_group"] = float(after == 0)
    out["pair_place"] = 1 / (1 + after)
    if len(held) >= 2:
        gap = (first - last) / (len(held) - 1)
        out["pair_gap"] = math.log1p(gap) / 6
        out["pair_due"] = math.log1p(min(last / max(gap, 1e-3), 20)) / 3
    return out


def batch_of(histories: Histories, max_history: int = 100) -> Batch:
    return request_batch(histories, FieldTable(1), past_requests(histories), max_history=max_history)


def candidates_for(batch: Batch, seed: int) -> Jagged:
    """Random candidates, seen and unseen, repeated ones and the unknown row among them, some requests without any."""
    rng = np.random.default_rng(seed)
    return Jagged.from_rows([rng.integers(0, 11, size=rng.integers(0, 9)).tolist() for _ in range(batch.size)])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("max_history", [3, 100])
@pytest.mark.parametrize("has_clock", [True, False])
def test_every_field_of_every_candidate(seed, max_history, has_clock):
    histories = random_histories(seed)
    if not has_clock:
        places = histories.group - histories.group[histories.offsets[histories.user_of_event]]
        histories = replace(histories, time=places)
    batch = batch_of(histories, max_history)
    rows = candidates_for(batch, seed)
    got = pair_fields(batch, rows, has_clock=has_clock)
    assert tuple(got) == NAMES
    place = 0
    for r in range(batch.size):
        a, b = batch.history.items.offsets[r : r + 2].tolist()
        past = batch.history
        events = list(zip(past.items.values[a:b].tolist(), past.time[a:b].tolist(), past.group[a:b].tolist()))
        for item in rows.values[rows.offsets[r] : rows.offsets[r + 1]].tolist():
            wanted = by_hand(events, item, int(batch.time[r]), DAY if has_clock else 1)
            for name in NAMES:
                assert float(got[name][place]) == pytest.approx(wanted[name], rel=1e-5, abs=1e-6), (name, r, item)
            place += 1
    assert place == len(rows.values)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_inside_groups_changes_no_field(seed):
    histories = random_histories(seed)
    rng = np.random.default_rng(seed)
    order = np.lexsort((rng.random(histories.num_events), histories.group))
    moved = replace(histories, item=histories.item[order])
    assert (moved.item != histories.item).any()
    one, two = batch_of(histories), batch_of(moved)
    rows = candidates_for(one, seed)
    for name, column in pair_fields(one, rows).items():
        torch.testing.assert_close(column, pair_fields(two, rows)[name], msg=name)


def test_fields_are_finite_and_of_about_unit_range_even_for_odd_histories():
    """Nine years between two purchases, hundreds of lines, two groups in one second, a request before its own history."""
    time = [0, 0, 0, 0, 9 * 365 * DAY, *[9 * 365 * DAY + 5] * 400]
    histories = Histories(
        offsets=np.array([0, 0, len(time)]),
        item=np.array([1, 1, 2, 2, 1, *[3] * 400]),
        time=np.array(time),
        group=np.array([0, 1, 1, 2, 3, *range(4, 404)]),
        action=np.ones(len(time), dtype=np.int64),
        value=np.ones(len(time), dtype=np.float32),
    )
    requests = past_requests(histories)
    batch = request_batch(histories, FieldTable(1), requests, max_history=10_000)
    batch = replace(batch, time=batch.time - torch.arange(batch.size) % 3)
    rows = Jagged.from_rows([[1, 2, 3, 4, 0]] * batch.size)
    for name, column in pair_fields(batch, rows).items():
        assert column.dtype == torch.float32
        assert column.shape == (5 * batch.size,)
        assert bool(torch.isfinite(column).all()), name
        assert 0 <= float(column.min()) <= float(column.max()) <= 1.6, name


def test_no_history_and_no_candidates():
    empty = request_batch(
        Histories.empty(2),
        FieldTable(1),
        past_requests(random_histories(0)).select(np.zeros(0, dtype=np.int64)),
        max_history=5,
    )
    assert all(column.shape == (0,) for column in pair_fields(empty, Jagged.from_rows([])).values())
    cold = batch_of(random_histories(0))
    first = [r for r in range(cold.size) if cold.history.items.lengths[r] == 0]
    rows = Jagged.from_rows([[1, 2] if r in first else [] for r in range(cold.size)])
    assert first
    assert all(float(column.abs().max()) == 0 for column in pair_fields(cold, rows).values())


def test_a_request_alone_and_among_others_gets_the_same_fields():
    batch = batch_of(random_histories(2))
    rows = candidates_for(batch, 2)
    whole = pair_fields(batch, rows)
    requests = past_requests(random_histories(2))
    for r in range(0, batch.size, 3):
        alone = request_batch(random_histories(2), FieldTable(1), requests.select(np.array([r])), max_history=100)
        a, b = rows.offsets[r : r + 2].tolist()
        for name, column in pair_fields(alone, rows.select(torch.tensor([r]))).items():
            torch.testing.assert_close(column, whole[name][a:b], msg=name)
