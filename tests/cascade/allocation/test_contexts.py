"""Features of requests: against a plain loop, a case counted by hand, and what must not matter."""

import itertools
import math
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine_support import prepared_cascade, shop_dataset
from shortlist.cascade.allocation.contexts import (
    CONTEXT_NAMES,
    MOST,
    YES_OR_NO,
    Contexts,
    popularity,
    raw_contexts,
)
from shortlist.cascade.lessons import make_batch
from shortlist.data.batches import Batch, History, split_batch
from shortlist.data.jagged import Jagged
from shortlist.errors import DataError
from support import planted_batch

DAY = 86_400
F = len(CONTEXT_NAMES)


def random_batch(lengths, seed=0, num_items=30, now=400 * DAY):
    """Requests with baskets, repeats, returns below 0 and empty histories."""
    rng = np.random.default_rng(seed)
    total = int(sum(lengths))
    times, groups = [], []
    for n in lengths:
        moment = np.sort(rng.integers(now - 60 * DAY, now, n)) // (3 * DAY) * (3 * DAY)
        times.append(moment)
        groups.append(moment // DAY)
    column = [np.concatenate(part).astype(np.int64) if total else np.zeros(0, np.int64) for part in (times, groups)]
    items = torch.from_numpy(rng.integers(1, num_items, total))
    history = History(
        items=Jagged.from_lengths(items, torch.tensor(lengths)),
        time=torch.from_numpy(column[0]),
        action=torch.ones(total, dtype=torch.int64),
        value=torch.from_numpy(rng.normal(5, 5, total).astype(np.float32)),
        group=torch.from_numpy(column[1]),
    )
    moments = torch.from_numpy(now + rng.integers(0, 9 * DAY, len(lengths)))
    return Batch(user=torch.from_numpy(rng.integers(0, 3, len(lengths))), time=moments, history=history)


def by_hand(batch, r, popularity_N):
    """The same features of request r, with plain Python."""
    a, b = batch.history.items.offsets[r : r + 2].tolist()
    rows = batch.history.items.values[a:b].tolist()
    times, groups = batch.history.time[a:b].tolist(), batch.history.group[a:b].tolist()
    values, now = [max(v, 0.0) for v in batch.history.value[a:b].tolist()], int(batch.time[r])
    found = dict.fromkeys(CONTEXT_NAMES, 0.0)
    angle, weekday = 2 * math.pi * (now % DAY) / DAY, time.gmtime(now).tm_wday
    found |= {"hour sin": math.sin(angle), "hour cos": math.cos(angle)}
    found |= {"weekday sin": math.sin(weekday * 2 * math.pi / 7), "weekday cos": math.cos(weekday * 2 * math.pi / 7)}
    found["known user"] = float(batch.user[r] > 0)
    if not rows:
        return [found[name] for name in CONTEXT_NAMES]
    counts, visits = Counter(rows), 1 + sum(x != y for x, y in itertools.pairwise(groups))
    newest = [i for i, group in enumerate(groups) if group == groups[-1]]
    since, known = (now - times[-1]) / DAY, (now - times[0]) / DAY
    between = (times[-1] - times[0]) / DAY / (visits - 1) if visits > 1 else 0.0
    weights = [popularity_N[row] for row in rows]
    found |= {
        "has history": 1.0,
        "log events": math.log1p(len(rows)),
        "log distinct items": math.log1p(len(counts)),
        "distinct share": len(counts) / len(rows),
        "repeated share": sum(n > 1 for n in counts.values()) / len(counts),
        "log visits": math.log1p(visits),
        "log days since": math.log1p(since),
        "log days between": math.log1p(between),
        "overdue": math.log1p(since) - math.log1p(between),
        "log days known": math.log1p(known),
        "log events of a week": math.log1p(sum(then > now - 7 * DAY for then in times)),
        "log mean value": math.log1p(sum(values) / len(rows)),
        "log value": math.log1p(sum(values)),
        "log newest value": math.log1p(sum(values[i] for i in newest)),
        "mean popularity": sum(weights) / len(rows),
        "newest popularity": sum(weights[i] for i in newest) / len(newest),
    }
    return [found[name] for name in CONTEXT_NAMES]


@pytest.mark.parametrize("lengths", [[5, 0, 40, 1, 0], [0, 0], [3], [0, 7, 2]])
def test_they_are_what_a_plain_loop_finds(lengths):
    batch, popularity_N = random_batch(lengths), np.log1p(np.arange(30.0))
    found_RF = raw_contexts(batch, popularity_N, has_clock=True)
    expected = [by_hand(batch, r, popularity_N) for r in range(len(lengths))]
    np.testing.assert_allclose(found_RF, expected, rtol=1e-6, atol=1e-6)


def test_a_case_counted_by_hand():
    """A visit of two items on day 10, one of them again on day 14; asked on Thursday 1970-01-22 at six o'clock, day 21.25."""
    batch = Batch(
        user=torch.tensor([2]),
        time=torch.tensor([21 * DAY + DAY // 4]),
        history=History(
            items=Jagged.from_rows([[1, 2, 1]]),
            time=torch.tensor([10, 10, 14]) * DAY,
            action=torch.ones(3, dtype=torch.int64),
            value=torch.tensor([2.0, 4.0, 6.0]),
            group=torch.tensor([7, 7, 8]),
        ),
    )
    found = dict(zip(CONTEXT_NAMES, raw_contexts(batch, np.array([0.0, 1.0, 4.0]), has_clock=True)[0].tolist()))
    assert found["distinct share"] == pytest.approx(2 / 3)
    assert found["repeated share"] == 0.5
    assert math.expm1(found["log visits"]) == pytest.approx(2)
    assert math.expm1(found["log days since"]) == pytest.approx(7.25)
    assert math.expm1(found["log days between"]) == pytest.approx(4)
    assert math.expm1(found["log days known"]) == pytest.approx(11.25)
    assert found["log events of a week"] == 0.0
    assert math.expm1(found["log mean value"]) == pytest.approx(4)
    assert math.expm1(found["log newest value"]) == pytest.approx(6)
    assert found["mean popularity"] == pytest.approx(2)
    assert found["newest popularity"] == pytest.approx(1)
    assert (found["hour sin"], found["weekday sin"]) == (pytest.approx(1), pytest.approx(math.sin(6 * math.pi / 7)))


def test_a_log_without_a_clock_has_no_times():
    found_RF = raw_contexts(random_batch([4, 0]), np.zeros(30), has_clock=False)
    timed = [i for i, name in enumerate(CONTEXT_NAMES) if any(word in name for word in ("day", "hour", "week", "due"))]
    assert len(timed) == 9
    assert not found_RF[:, timed].any()
    assert found_RF[0, CONTEXT_NAMES.index("log visits")] > 0


@pytest.fixture(scope="module")
def shop():
    return shop_dataset()


def measured(dataset, requests, max_history=500):
    batch = make_batch(dataset, requests, max_history)
    popular_N = popularity(dataset.histories.item, dataset.num_items)
    return Contexts.measured([batch], popular_N, has_clock=dataset.space.has_clock), batch


def test_standardised_they_have_mean_0_and_deviation_1_or_are_0(shop):
    contexts, batch = measured(shop, shop.split.valid)
    found_RF = contexts(batch)
    assert found_RF.dtype == np.float32
    assert found_RF.shape == (len(shop.split.valid), F)
    inside = (np.abs(found_RF) < MOST).all(0)
    inside[YES_OR_NO] = False  # 1 or -1, whoever was measured
    assert (np.abs(found_RF[:, YES_OR_NO]) == 1).all()
    np.testing.assert_allclose(found_RF[:, inside].mean(0), 0, atol=1e-5)
    deviation_F = found_RF[:, inside].std(0)
    assert ((np.abs(deviation_F - 1) < 1e-4) | (deviation_F == 0)).all()
    assert (deviation_F > 0).sum() >= 8


def test_what_never_varied_stays_0_whatever_comes(shop):
    contexts, batch = measured(shop, shop.split.valid)
    stranger = Batch(user=torch.tensor([0]), time=batch.time[:1], history=random_batch([0]).history)
    found = contexts(stranger)
    constant = np.isinf(contexts.scale_F)
    assert constant.any()
    assert not found[0, constant].any()
    assert np.isfinite(found).all()
    assert np.abs(contexts(random_batch([300, 2], now=10**10))).max() <= MOST


def test_requests_do_not_depend_on_their_neighbours_or_device_copies(shop):
    contexts, batch = measured(shop, shop.split.valid)
    whole_RF = contexts(batch)
    alone_RF = np.concatenate([contexts(part) for part in split_batch(batch, [1] * batch.size)])
    np.testing.assert_array_equal(whole_RF, alone_RF)
    rows = Jagged.from_lengths(torch.ones(batch.size, dtype=torch.int64), torch.ones(batch.size, dtype=torch.int64))
    np.testing.assert_array_equal(contexts(batch.with_candidates(rows)), whole_RF)


def test_serving_sees_what_calibration_saw(shop):
    """A held-out request again, as the engine would ask it: the same events, sent as the past of an unnumbered user."""
    cascade, requests = prepared_cascade(shop), shop.split.valid
    contexts, batch = measured(shop, requests, cascade.max_history)
    users = shop.user_ids.decode(requests.user)
    histories, asked = shop.requests_for(users, at=requests.time - 1)
    served = make_batch(replace(shop, histories=histories), replace(asked, time=requests.time), cascade.max_history)
    np.testing.assert_array_equal(contexts(served), contexts(batch))


def test_they_come_back_from_what_is_saved(shop):
    contexts, batch = measured(shop, shop.split.valid)
    again = Contexts.of_state(contexts.state(), has_clock=contexts.has_clock)
    np.testing.assert_array_equal(again(batch), contexts(batch))
    with pytest.raises(DataError, match="lack 'scale'"):
        Contexts.of_state({"mean": contexts.mean_F}, has_clock=True)
    with pytest.raises(DataError, match=f"contexts have {F} features"):
        Contexts.of_state({**contexts.state(), "mean": contexts.mean_F[1:]}, has_clock=True)
    with pytest.raises(DataError, match="no request to measure"):
        Contexts.measured([], contexts.popularity_N, has_clock=True)


def test_events_of_one_visit_may_be_sorted_as_they_please():
    """Many logs are sorted by item inside a basket: that order tells nothing."""
    batch = planted_batch()
    history, popularity_N = batch.history, np.log1p(np.arange(21.0))
    order = np.lexsort((-history.items.values.numpy(), history.group.numpy(), history.items.row_of_value.numpy()))
    index = torch.from_numpy(order)
    moved = replace(history, items=history.items.with_values(history.items.values[index]), value=history.value[index])
    turned = raw_contexts(replace(batch, history=moved), popularity_N, has_clock=True)
    assert not torch.equal(moved.items.values, history.items.values)
    np.testing.assert_allclose(turned, raw_contexts(batch, popularity_N, has_clock=True), rtol=1e-12)


def test_a_batch_of_16_is_cheap():
    batch = random_batch([100] * 16)
    contexts = Contexts.measured([batch], np.log1p(np.arange(30.0)), has_clock=True)
    taken = []
    for _ in range(30):
        began = time.perf_counter()
        contexts(batch)
        taken.append(time.perf_counter() - began)
    assert min(taken) / 16 < 0.05e-3
