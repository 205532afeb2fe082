"""MaxPower: its steps by hand, the sum that must not wind up, and a simulated server under 1x, 8x, 1x."""

import threading
from collections import deque
from dataclasses import dataclass

import numpy as np
import pytest

from price_world import Buyer, chains, requests
from shortlist.cascade.allocation.base import Budget
from shortlist.cascade.allocation.stress import MaxPower, MaxPowerConfig, tightest
from shortlist.errors import ConfigError, DataError

CALM_MS, TARGET = 20.0, 100.0


def powered(**settings):
    return MaxPower(chains(), MaxPowerConfig(target_ms=TARGET, **settings))


def period(power, now, latency, failed=0.0, count=100):
    for n in range(count):
        power.note(latency, n < failed * count)
    return power.tick(now)


class TestSteps:
    def test_by_hand(self):
        """e = 1, 0.5, -0.5 with the digest's weights."""
        power = powered()
        one = period(power, 1, 200)
        assert one.error == pytest.approx(1.0)
        assert one.drive == pytest.approx(0.5 * 1 + 0.05 * 1 + 0.1 * 1)
        assert power.level == pytest.approx(0.5)  # 1 - 0.65, but half at most
        assert one.cap_ms == pytest.approx(32**0.5)
        two = period(power, 2, 150)
        assert two.drive == pytest.approx(0.5 * 0.5 + 0.05 * 1.5 + 0.1 * -0.5)
        assert power.level == pytest.approx(0.225)
        three = period(power, 3, 50)
        assert three.drive == pytest.approx(0.5 * -0.5 + 0.05 * 1.0 + 0.1 * -1.0)
        assert power.level == pytest.approx(0.225 + 1 / 40)

    def test_failures_above_their_target_count_theta_times(self):
        assert period(powered(), 1, TARGET, failed=0.21).error == pytest.approx(5 * 0.2)
        assert period(powered(), 1, TARGET, failed=0.01).error == pytest.approx(0)

    def test_the_quantile_is_taken_over_the_period_alone(self):
        power = powered(quantile=0.9)
        period(power, 1, 1000)
        for latency in range(101):
            power.note(float(latency), False)
        assert power.tick(2).latency_ms == pytest.approx(90)

    def test_no_cap_in_calm_and_never_outside_the_chains(self):
        power = powered()
        assert power.cap_C is None
        assert power.cap_ms == 32
        period(power, 1, 1e5)
        period(power, 2, 1e5)
        assert power.cap_C.tolist() == [np.inf, 1.0]
        assert chains().within_J(power.cap_C).tolist() == [True] + [False] * 5

    def test_shrinking_is_fast_and_recovery_slow(self):
        power = powered()
        period(power, 1, 3 * TARGET), period(power, 2, 3 * TARGET)
        assert power.level == 0
        levels = [power.level for t in range(39) if period(power, 3 + t, CALM_MS)]
        assert levels[-1] < 1
        assert np.diff(levels).max() <= 1 / 40 + 1e-9
        period(power, 42, CALM_MS)
        assert power.level == pytest.approx(1)

    def test_ticks_keep_the_period_and_late_ones_recover_as_much(self):
        power = powered()
        period(power, 1, 3 * TARGET)
        assert power.tick(1.5) is None
        period(power, 11, CALM_MS)
        assert power.level == pytest.approx(0.5 + 10 / 40)

    def test_silence_is_calm(self):
        power = powered()
        period(power, 1, 3 * TARGET)
        reading = power.tick(2)
        assert reading.count == 0
        assert reading.error == -1
        assert power.level > 0.5


class TestWindup:
    def test_a_long_overload_does_not_delay_recovery(self):
        """After ten minutes at the floor as after ten seconds."""
        levels = {}
        for seconds in (10, 600):
            power = powered()
            for t in range(seconds):
                period(power, t + 1, 4 * TARGET, count=3)
            levels[seconds] = [power.level for t in range(60) if period(power, seconds + t + 1, CALM_MS, count=3)]
        assert levels[600] == pytest.approx(levels[10], abs=0.03)
        assert levels[600][59] == pytest.approx(1)
        assert levels[600][0] > 0

    def test_a_long_calm_does_not_delay_the_cut(self):
        levels = {}
        for seconds in (10, 600):
            power = powered()
            for t in range(seconds):
                period(power, t + 1, CALM_MS, count=3)
            period(power, seconds + 1, 1.3 * TARGET, count=3)
            levels[seconds] = power.level
        assert levels[600] == pytest.approx(levels[10], abs=1e-6)
        assert levels[600] < 0.9

    def test_a_latency_below_its_target_never_ends_at_the_floor(self):
        """The trap of the raw latency, which is never 0 and sums up for ever."""
        power = powered()
        for t in range(1000):
            period(power, t + 1, 0.9 * TARGET, count=3)
        assert power.level == 1

    def test_the_sum_is_bounded(self):
        power = powered(shrink=1e-9)  # the level stays off the floor, so the sum goes on
        for t in range(100):
            period(power, t + 1, 50 * TARGET, count=3)
        assert power._sum == 4
        assert power.level > 0.99


@dataclass
class Trace:
    """What a simulated server did: seconds of the arrivals, whether they failed, what they cost."""

    arrived: np.ndarray
    failed: np.ndarray
    cost: np.ndarray
    caps: np.ndarray
    """Cap in ms at each second."""

    def during(self, values, begin, end):
        inside = (self.arrived >= begin) & (self.arrived < end)
        return float(values[inside].mean())


def server(rates, power, cost_of, *, seed=0, limit=0.5, step=0.02):
    """One core that takes requests in order; who waits longer than `limit` seconds is gone when his turn comes.

    `rates`: requests per second, one number per second. `cost_of(n, cap)`: ms for request n.
    """
    rng = np.random.default_rng(seed)
    queue, done, caps, ready, n = deque(), [], [], 0.0, 0
    for second, rate in enumerate(rates):
        for inner in range(round(1 / step)):
            now = second + inner * step
            for _ in range(rng.poisson(rate * step)):
                queue.append((now, n))
                n += 1
            ready = max(ready, now)
            while queue and ready < now + step:
                arrived, number = queue.popleft()
                if ready - arrived > limit:
                    cost, late = 0.0, True
                else:
                    cost = cost_of(number, None if power is None else power.cap_C)
                    ready += cost / 1e3
                    late = ready - arrived > limit
                done.append((arrived, late, cost))
                if power is not None:
                    power.note(min(ready - arrived, limit) * 1e3, late)
        if power is not None:
            power.tick(second + 1)
        caps.append(np.inf if power is None else power.cap_ms)
    arrived, failed, cost = (np.array(column) for column in zip(*done))
    return Trace(arrived, failed, cost, np.array(caps))


RATE = 250 / 32
"""A quarter of one core, where every request takes the dearest chain."""
SPIKE = [RATE] * 30 + [8 * RATE] * 60 + [RATE] * 70


class TestSpike:
    def dearest(self, n, cap_C):
        costs_J = chains().costs_JC[:, 1]
        return float(costs_J[-1] if cap_C is None else costs_J[chains().within_J(cap_C)].max())

    def test_failures_and_recovery(self):
        fixed = server(SPIKE, None, self.dearest)
        capped = server(SPIKE, powered(), self.dearest)
        assert fixed.failed.mean() > 0.15
        assert capped.failed.mean() < 0.01
        assert capped.during(capped.failed, 32, 90) <= 0.05
        assert capped.caps[:30].min() >= 0.85 * 32
        assert capped.caps[30:35].min() < 8
        assert capped.caps[149] >= 0.95 * 32
        assert capped.during(capped.cost, 150, 160) >= 0.95 * capped.during(capped.cost, 0, 30)

    def test_a_lasting_overload_keeps_the_core_busy(self):
        """It neither fails nor sits at the floor: sawtooth around what the core can do."""
        capped = server([RATE] * 10 + [8 * RATE] * 120, powered(), self.dearest)
        assert capped.during(capped.failed, 20, 130) < 0.03
        assert capped.during(capped.cost, 20, 130) * 8 * RATE / 1e3 > 0.3

    def test_prices_and_cap_together(self):
        """The cap takes from the dearest requests first, so that value falls less than cost."""
        allocator = Buyer()
        contexts_RF = requests(np.random.default_rng(1), 60_000)
        allocator.aim(Budget(ms=16.0), contexts_RF[:4000])
        worth_RJ, costs_J = allocator.worth_RJ(contexts_RF), chains().costs_JC[:, 1]

        def chosen(n, cap_C):
            choice = allocator.choose(contexts_RF[n : n + 1], most_C=cap_C)
            values.append(worth_RJ[n, choice.chain_R[0]])
            return float(costs_J[choice.chain_R[0]])

        values = []
        trace = server([2 * RATE] * 10 + [10 * RATE] * 30, powered(), chosen)
        assert trace.failed.mean() < 0.02
        assert trace.during(trace.cost, 12, 40) < 0.8 * trace.during(trace.cost, 0, 10)


def test_many_threads_lose_nothing():
    power = powered()

    def work(latency):
        for _ in range(500):
            power.note(latency, False)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert power.tick(1).count == 2000


def test_the_tightest_cap_wins_by_resource():
    assert tightest(None, None) is None
    assert tightest(None, np.array([5.0, 2.0])).tolist() == [5, 2]
    assert tightest(np.array([np.inf, 2.0]), None, np.array([0.0, 9.0])).tolist() == [0, 2]


def test_bad_latencies_and_settings_are_refused():
    power = powered()
    for latency in (-1, np.nan, np.inf):
        with pytest.raises(DataError, match="latency"):
            power.note(latency, False)
    assert power.tick(1).count == 0
    for settings in ({"target_ms": 0}, {"theta": -1}, {"quantile": 2}, {"recover_seconds": 0}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            MaxPowerConfig(**settings)
