"""Forecasters against closed forms, numpy's own least squares and planted days."""

import numpy as np
import pytest

from shortlist.cascade.allocation.forecast import DAY, Forecaster, Last, Linear, LinearConfig, make_forecaster
from shortlist.errors import ConfigError, DataError
from shortlist.registry import systems

NAMES = [entry.name for entry in systems(kind="forecaster")]


def fed(forecaster, rates, seconds=60.0):
    for rate in rates:
        forecaster.observe(rate * seconds, seconds)
    return forecaster


@pytest.mark.parametrize("name", NAMES)
class TestEveryForecaster:
    def test_knows_nothing_before_the_first_window(self, name):
        assert np.isnan(make_forecaster(name).predict(30))

    def test_foretells_what_never_changes(self, name):
        assert fed(make_forecaster(name), [7.5] * 9).predict(30) == pytest.approx(7.5)

    def test_is_never_negative(self, name):
        assert fed(make_forecaster(name), [100, 60, 20, 0, 0]).predict(600) >= 0

    def test_goes_on_from_its_state(self, name):
        one = fed(make_forecaster(name), [3, 4, 6, 5])
        other = make_forecaster(name)
        other.load_state({key: value.copy() for key, value in one.state().items()})
        fed(one, [8, 9]), fed(other, [8, 9])
        assert one.predict(30) == other.predict(30)

    def test_refuses_bad_windows_and_keeps_what_it_had(self, name):
        forecaster = fed(make_forecaster(name), [3, 4])
        before = forecaster.predict(30)
        for count, seconds in ((-1, 60), (5, 0), (np.nan, 60), (5, np.inf)):
            with pytest.raises(DataError, match="a window has a count"):
                forecaster.observe(count, seconds)
        with pytest.raises(DataError, match="state has no"):
            forecaster.load_state({})
        assert forecaster.predict(30) == before


def test_both_are_found():
    assert {"last", "linear"} <= set(NAMES)
    assert isinstance(make_forecaster("linear", {"memory_seconds": 60.0}), Linear)
    with pytest.raises(ConfigError, match="not a forecaster"):
        make_forecaster("popularity")


def test_last_repeats_the_last_window():
    assert fed(Last(Last.Config()), [1, 2, 9]).predict(1e6) == 9


def test_linear_continues_a_line_exactly():
    """Rates on a line, windows of different lengths: any weighting finds the line."""
    forecaster, clock = Linear(LinearConfig()), 0.0
    for seconds in (60, 30, 90, 60, 10, 120):
        forecaster.observe((5 + 0.01 * (clock + seconds / 2)) * seconds, seconds)
        clock += seconds
    assert forecaster.predict(45) == pytest.approx(5 + 0.01 * (clock + 45))


def test_linear_is_the_weighted_least_squares_of_numpy():
    rng = np.random.default_rng(0)
    seconds, counts = rng.uniform(20, 100, 40), rng.poisson(300, 40)
    forecaster = Linear(LinearConfig(memory_seconds=400, limit=9))
    for count, length in zip(counts, seconds):
        forecaster.observe(count, length)
    ends = np.cumsum(seconds)
    middles = ends - seconds / 2 - ends[-1]
    weights = seconds * np.exp(middles / 400)
    slope, level = np.polyfit(middles, counts / seconds, 1, w=np.sqrt(weights))
    assert forecaster.predict(50) == pytest.approx(level + 50 * slope)


def test_one_window_has_no_slope():
    assert fed(Linear(LinearConfig()), [4]).predict(1e5) == pytest.approx(4)


def test_far_forecasts_are_bounded_by_the_last_window_and_chance():
    """25 % of 13 a second, and two deviations of 780 requests in 60 s."""
    rising, falling = [10, 11, 12, 13], [16, 15, 14, 13]
    chance = 2 * np.sqrt(780) / 60
    assert fed(Linear(LinearConfig()), rising).predict(1e6) == pytest.approx(13 * 1.25 + chance)
    assert fed(Linear(LinearConfig()), falling).predict(1e6) == pytest.approx(13 / 1.25 - chance)


def test_a_jump_is_not_overshot():
    forecaster = fed(Linear(LinearConfig()), [10] * 10)
    for _ in range(12):
        forecaster.observe(30 * 60, 60)
        assert 24 - 1.5 <= forecaster.predict(30) <= 37.5 + 1.5
    assert forecaster.predict(30) == pytest.approx(30, rel=0.1)


def test_trend_beats_persistence_on_a_ramp_and_smooths_noise():
    rng = np.random.default_rng(1)

    def error(forecaster: Forecaster, rates):
        misses = []
        for rate in rates:
            misses.append(forecaster.predict(30) - rate)
            forecaster.observe(rng.poisson(rate * 60), 60)
        return np.sqrt(np.mean(np.square(misses[10:])))

    ramp, flat = np.linspace(10, 100, 60), np.full(200, 10.0)
    assert error(Linear(LinearConfig()), ramp) < 0.6 * error(Last(Last.Config()), ramp)
    assert error(Linear(LinearConfig()), flat) < 0.8 * error(Last(Last.Config()), flat)


def day_rate(t):
    return 10 * (1 + 0.8 * np.sin(2 * np.pi * t / DAY))


def test_daily_profile_is_learnt_and_foretells_hours_ahead():
    with_day, plain = (Linear(LinearConfig(slots=n, memory_seconds=1800)) for n in (48, 0))
    times = np.arange(0, 3.25 * DAY, 600) + 300
    for t in times:
        for forecaster in (with_day, plain):
            forecaster.observe(day_rate(t) * 600, 600)
    end = times[-1] + 300
    ahead = np.arange(1, 12) * 3600
    found = np.array([with_day.predict(a) for a in ahead])
    np.testing.assert_allclose(found, day_rate(end + ahead), rtol=0.05)
    assert np.abs(np.array([plain.predict(a) for a in ahead]) / day_rate(end + ahead) - 1).max() > 0.5
    assert with_day._profile_S.mean() == pytest.approx(1)


def test_the_end_of_a_day_does_not_move_the_forecast_for_now():
    forecaster = Linear(LinearConfig(slots=24))
    times = np.arange(0, DAY - 600, 600) + 300
    for t in times:
        forecaster.observe(day_rate(t) * 600, 600)
    assert forecaster._days == 0
    before = forecaster.predict(300)
    forecaster.observe(day_rate(DAY - 300) * 600, 600)
    assert forecaster._days == 1
    assert forecaster.predict(0) == pytest.approx(before, rel=0.1)


def test_a_profile_survives_a_day_without_requests():
    forecaster = Linear(LinearConfig(slots=4))
    for _ in range(24):
        forecaster.observe(0, 3600)
    assert forecaster.predict(60) == 0
    forecaster.observe(3600, 3600)
    assert forecaster.predict(0) > 0


@pytest.mark.parametrize("settings", [{"memory_seconds": 0}, {"limit": 0.5}, {"slots": 1}, {"profile_share": 0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        LinearConfig(**settings)
