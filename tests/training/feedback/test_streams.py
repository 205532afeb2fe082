"""Streams: against the plain form, by hand, and what may never happen: a sample before its time, a conversion read before it came."""

from typing import get_args

import numpy as np
import pytest
from delayed_toys import DAY, HOUR, planted
from hypothesis import given, settings
from hypothesis import strategies as st

from shortlist.errors import ConfigError, DataError
from shortlist.training.feedback.base import LATE, NEGATIVE, POSITIVE, SETTLED_NEGATIVE, SETTLED_POSITIVE, Stream
from shortlist.training.feedback.streams import as_known, emit, emit_plainly, stand_ins
from shortlist.training.feedback.targets import CounterfactualDeadline, LateConversions, SettledConversions
from shortlist.training.feedback.windows import NEVER, Windows

STREAMS = get_args(Stream)
WINDOWS = Windows(observation_s=10, attribution_s=100)


def drawn(seed, num_clicks=60):
    """Times so close together that ties, windows' edges and clicks without a conversion all occur."""
    rng = np.random.default_rng(seed)
    clicked = rng.integers(0, 50, num_clicks)
    delay = rng.choice([0, 1, 9, 10, 11, 50, 99, 100, 101, 5_000], num_clicks)
    converted = np.where(rng.random(num_clicks) < 0.7, clicked + delay, NEVER)
    return clicked, converted


@pytest.mark.parametrize("stream", STREAMS)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), observation=st.sampled_from([0, 1, 10, 99]))
def test_agrees_with_the_plain_form(stream, seed, observation):
    clicked, converted = drawn(seed)
    windows = Windows(observation_s=observation, attribution_s=100)
    emitted = emit(clicked, converted, windows, stream)
    rows = list(zip(emitted.emitted_at.tolist(), emitted.click.tolist(), emitted.kind.tolist(), strict=True))
    assert rows == emit_plainly(clicked, converted, windows, stream)


def test_four_clicks_by_hand():
    """At once, after a while, too late to count, never."""
    clicked = np.array([0, 5, 6, 7])
    converted = np.array([4, 60, 200, NEVER])
    emitted = emit(clicked, converted, WINDOWS, "late")
    assert emitted.click.tolist() == [0, 1, 2, 3, 1]
    assert emitted.kind.tolist() == [POSITIVE, NEGATIVE, NEGATIVE, NEGATIVE, LATE]
    assert emitted.label.tolist() == [1, 0, 0, 0, 1]
    assert emitted.emitted_at.tolist() == [10, 15, 16, 17, 60]
    assert emitted.elapsed.tolist() == [10, 10, 10, 10, 55]
    np.testing.assert_array_equal(emitted.delay, [4, np.nan, np.nan, np.nan, 55])
    assert emit(clicked, converted, WINDOWS, "observed").label.tolist() == [1, 0, 0, 0]
    final = emit(clicked, converted, WINDOWS, "final")
    assert final.label.tolist() == [1, 1, 0, 0]
    assert final.emitted_at.tolist() == clicked.tolist()
    fake = emit(clicked, converted, WINDOWS, "fake-negatives")
    assert (fake.emitted_at.tolist(), fake.label.tolist()) == ([0, 4, 5, 6, 7, 60], [0, 1, 0, 0, 0, 1])
    settled = emit(clicked, converted, WINDOWS, "settled")
    assert settled.emitted_at.tolist() == [10, 15, 16, 17, 60, 100, 106, 107]
    assert settled.label.tolist() == [1, 0, 0, 0, 1, 1, 0, 0]


@pytest.mark.parametrize("stream", STREAMS)
def test_numbers_of_samples(stream):
    """Late positives are counted twice, settled clicks exactly twice, others once."""
    clicked, converted = drawn(1, 500)
    quick, late = WINDOWS.split(clicked, converted)
    copies = np.bincount(emit(clicked, converted, WINDOWS, stream).click, minlength=500)
    expected = {
        "final": np.ones(500),
        "observed": np.ones(500),
        "late": 1 + late,
        "fake-negatives": 1 + (quick | late),
        "settled": np.full(500, 2),
    }[stream]
    np.testing.assert_array_equal(copies, expected)


@pytest.mark.parametrize("stream", [s for s in STREAMS if s != "final"])
def test_nothing_before_its_time(stream):
    """What was emitted up to a moment does not depend on conversions after it; and no copy comes before its click or its conversion."""
    clicked, converted = drawn(2, 300)
    emitted = emit(clicked, converted, WINDOWS, stream)
    assert (emitted.emitted_at >= clicked[emitted.click]).all()
    assert (np.diff(emitted.emitted_at) >= 0).all()
    positive = emitted.label > 0
    assert (emitted.emitted_at[positive] >= converted[emitted.click[positive]]).all()
    for now in (0, 13, 40, 70, 130):
        blind = emit(clicked, np.where(converted <= now, converted, NEVER), WINDOWS, stream).between(-1, now + 1)
        seen = emitted.between(-1, now + 1)
        for name in ("click", "label", "kind", "emitted_at", "delay"):
            np.testing.assert_array_equal(getattr(seen, name), getattr(blind, name))


def test_as_known_reads_no_future():
    clicked, converted = drawn(3, 300)
    for now in (5, 30, 60, 1_000):
        known = as_known(clicked, converted, WINDOWS, now)
        blind = as_known(clicked, np.where(converted <= now, converted, NEVER), WINDOWS, now)
        np.testing.assert_array_equal(known.label, blind.label)
        np.testing.assert_array_equal(known.kind, blind.kind)
        assert (known.emitted_at <= now).all()
        assert (clicked[known.click] + 10 <= now).all()
        assert len(np.unique(known.click)) == len(known)
        assert known.elapsed.max(initial=0) <= 100
    final = as_known(clicked, converted, WINDOWS, 10_000)
    truth = emit(clicked, converted, WINDOWS, "final")
    np.testing.assert_array_equal(final.label[np.argsort(final.click)], truth.label[np.argsort(truth.click)])


@pytest.mark.parametrize("auxiliary", [LateConversions(), CounterfactualDeadline(48.0)])
def test_auxiliary_lessons_are_masked(auxiliary):
    """Conversions after the moment count as none (the "mask30d" variant): changing them changes nothing."""
    log, now = planted(800).log, 10 * DAY
    windows = Windows(observation_s=HOUR, attribution_s=5 * DAY)
    lesson = auxiliary.lesson(log.clicked_at, log.converted_at, windows, now)
    blind = auxiliary.lesson(log.clicked_at, np.where(log.converted_at <= now, log.converted_at, NEVER), windows, now)
    moved = auxiliary.lesson(log.clicked_at, np.where(log.converted_at > now, now + 1, log.converted_at), windows, now)
    for other in (blind, moved):
        np.testing.assert_array_equal(lesson.click, other.click)
        for head in auxiliary.heads:
            np.testing.assert_array_equal(lesson.labels[head], other.labels[head])
    assert (log.clicked_at[lesson.click] < now).all()


def test_lesson_of_late_conversions_by_hand():
    """Immediate, late, late but after the moment, never, and one too young."""
    clicked = np.array([0, 0, 0, 0, 95])
    converted = np.array([5, 50, 99, NEVER, 96])
    lesson = LateConversions().lesson(clicked, converted, WINDOWS, 90)
    assert lesson.click.tolist() == [0, 1, 2, 3]
    assert lesson.labels["f_dp"].tolist() == [0, 1, 0, 0]
    np.testing.assert_array_equal(lesson.labels["f_rn"], [np.nan, 0, 1, 1])


def test_lesson_of_a_counterfactual_deadline_by_hand():
    windows = Windows(observation_s=600, attribution_s=10 * DAY)
    clicked = np.array([0, 0, 0, 90 * HOUR])
    converted = np.array([50 * HOUR, 80 * HOUR, NEVER, NEVER])
    lesson = CounterfactualDeadline(48.0).lesson(clicked, converted, windows, 120 * HOUR)
    assert lesson.click.tolist() == [0, 1, 2]  # the deadline is at hour 72
    assert lesson.elapsed.tolist() == [72 * HOUR] * 3
    np.testing.assert_array_equal(lesson.labels["f1"], [1, 0, np.nan])
    np.testing.assert_array_equal(lesson.labels["f0"], [np.nan, 0, 1])
    with pytest.raises(ConfigError, match="deadline_hours"):
        CounterfactualDeadline(240.0).lesson(clicked, converted, windows, 120 * HOUR)


def test_settled_lesson_reads_no_open_click():
    clicked = np.array([0, 0, 0, 0, 60])
    converted = np.array([5, 50, NEVER, 150, 70])
    lesson = SettledConversions().lesson(clicked, converted, WINDOWS, 120)
    assert lesson.click.tolist() == [0, 1, 2, 3] * 2
    assert lesson.elapsed[:4].tolist() == [10] * 4
    assert ((lesson.elapsed[4:] >= 10) & (lesson.elapsed[4:] < 100)).all()
    assert lesson.labels["f_dp"].tolist() == [0, 1, 0, 0] * 2
    np.testing.assert_array_equal(lesson.labels["f_rn"][:4], [np.nan, 0, 1, 1])
    second = np.nan if lesson.elapsed[5] >= 50 else 0
    np.testing.assert_array_equal(lesson.labels["f_rn"][4:], [np.nan, second, 1, 1])
    with pytest.raises(ConfigError, match="task_hours"):
        SettledConversions().lesson(clicked, converted, WINDOWS, 99)


def test_stand_ins_by_hand():
    """Settled; open and converted at once, late, not yet; too young for a sample."""
    clicked = np.array([0, 30, 30, 30, 115])
    converted = np.array([NEVER, 35, 90, NEVER, NEVER])
    for stream in ("late", "settled"):
        known = emit(clicked, converted, WINDOWS, stream).between(-1, 121)
        made = stand_ins(known, clicked, WINDOWS, stream, 120)
        expected = [(3, LATE)] if stream == "late" else [(1, SETTLED_POSITIVE), (3, LATE), (3, SETTLED_NEGATIVE)]
        assert list(zip(made.click.tolist(), made.kind.tolist(), strict=True)) == expected
        assert set(made.elapsed.tolist()) == {90}
        assert made.label.tolist() == [float(kind != SETTLED_NEGATIVE) for _, kind in expected]
        whole = known + made
        assert len(whole) == len(known) + len(made)
        assert whole.kind[: len(known)].tolist() == known.kind.tolist()


def test_stand_ins_make_masses_whole():
    """At any moment late copies and those that stand in for them, each at its chance, weigh dp per click; without them they weigh less."""
    rng = np.random.default_rng(0)
    n, p, mean, observation, attribution = 200_000, 0.3, 40.0, 10, 1_000
    clicked = rng.integers(0, 100, n)
    delay = np.where(rng.random(n) < 0.4, 3, 11 + rng.exponential(mean, n)).astype(np.int64)
    converted = np.where(rng.random(n) < p, clicked + delay, NEVER)
    windows, now = Windows(observation_s=observation, attribution_s=attribution), 110
    known = emit(clicked, converted, windows, "settled").between(-1, now + 1)
    made = stand_ins(known, clicked, windows, "settled", now)
    still = p * 0.6 * np.exp(-np.maximum(made.elapsed - 10, 0) / mean)  # delays are cut to whole seconds
    never = (1 - p) / (1 - p + still)
    late, settled = made.kind == LATE, made.kind == SETTLED_NEGATIVE
    arrived, whole = (known.kind == LATE).sum() / n, p * 0.6
    assert arrived < 0.75 * whole
    assert arrived + (1 - never[late]).sum() / n == pytest.approx(whole, abs=0.004)
    assert never[settled].sum() / n == pytest.approx(1 - p, abs=0.004)
    assert (made.kind == SETTLED_POSITIVE).sum() / n == pytest.approx(p * 0.4, abs=0.004)


def test_masses_of_a_large_stream():
    """Shares of kinds per click tend to p (1 - h), dp, 1 - p, dp."""
    world = planted(60_000)
    windows = Windows(observation_s=HOUR, attribution_s=1_000 * DAY)
    emitted = emit(world.log.clicked_at, world.log.converted_at, windows, "late")
    found = np.bincount(emitted.kind, minlength=3)[: LATE + 1] / 60_000
    p, dp = world.chance, world.chance * world.late
    np.testing.assert_allclose(found, [(1 - p + dp).mean(), (p - dp).mean(), dp.mean()], atol=0.006)


def test_wrong_input_is_refused():
    with pytest.raises(DataError, match="before it is made"):
        emit(np.array([5]), np.array([4]), WINDOWS, "late")
    with pytest.raises(DataError, match="one each"):
        emit(np.array([5]), np.array([6, 7]), WINDOWS, "late")
    with pytest.raises(ConfigError, match="unknown"):
        emit(np.array([5]), np.array([6]), WINDOWS, "lat")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="shorter"):
        Windows.of_hours(2.0, 1.0)
