"""Off-policy estimates: against closed forms, enumerated expectations, and the exact truth of a simulated world."""

import itertools

import numpy as np
import pytest

from shortlist.errors import ConfigError, DataError
from shortlist.metrics import off_policy
from shortlist.metrics.off_policy import doubly_robust, effective_sample_size, ips, logged, on_policy, snips

REWARD = np.array([[0.2, 0.8, 0.5], [0.1, 0.4, 0.9]])
"""Of 3 items at 2 places."""
LOGGING = np.array([[0.5, 0.3, 0.2], [0.2, 0.4, 0.4]])
TARGET = np.array([[0.1, 0.7, 0.2], [0.3, 0.1, 0.6]])
TRUE_VALUE = float((TARGET * REWARD).sum())


def drawn(num_requests, seed, *, users=None):
    """Pages of two places, each drawn by itself; rows of the log and the items shown."""
    rng = np.random.default_rng(seed)
    item = np.stack([rng.choice(3, num_requests, p=LOGGING[place]) for place in range(2)], axis=1).ravel()
    place = np.tile([0, 1], num_requests)
    request = np.repeat(np.arange(num_requests), 2)
    reward = (rng.random(len(item)) < REWARD[place, item]).astype(float)
    user = None if users is None else rng.integers(0, users, num_requests)[request]
    rows = logged(reward, LOGGING[place, item], TARGET[place, item], requests=request, places=place, users=user)
    return rows, place, item


def test_ips_by_hand():
    log = logged(np.array([1.0, 0.0, 1.0, 1.0]), np.array([0.5, 0.5, 0.25, 1.0]), np.array([1.0, 0.5, 0.5, 0.0]))
    found = ips(log)  # weights 2, 1, 2, 0: terms 2, 0, 2, 0
    assert found.value == pytest.approx(1.0)
    assert found.error == pytest.approx(np.std([2, 0, 2, 0], ddof=1) / 2)
    assert found.low == pytest.approx(1 - 1.959964 * found.error, abs=1e-6)
    assert found.most_weight == 2
    assert found.effective == pytest.approx(25 / 9)


def test_snips_by_hand():
    log = logged(np.array([1.0, 0.0, 1.0, 1.0]), np.array([0.5, 0.5, 0.25, 1.0]), np.array([1.0, 0.5, 0.5, 0.0]))
    found = snips(log)
    assert found.value == pytest.approx(4 / 5)
    moved = np.array([2, 1, 2, 0]) * (np.array([1, 0, 1, 1]) - 0.8) / 5
    assert found.error == pytest.approx(np.sqrt(4 / 3 * (moved**2).sum()))


def test_every_estimator_is_exact_where_target_and_logging_agree():
    rng = np.random.default_rng(0)
    reward, chance = rng.random(50), rng.uniform(0.1, 1, 50)
    log = logged(reward, chance, chance)
    for found in (ips(log), snips(log), on_policy(log), doubly_robust(log, np.full(50, 0.3), np.full(50, 0.3))):
        assert found.value == pytest.approx(reward.mean())
        assert found.error == pytest.approx(reward.std(ddof=1) / np.sqrt(50))
        assert found.effective == pytest.approx(50)


def test_ips_is_unbiased_by_enumeration():
    """All 9 pages with their chances: the expectation of the estimate is the target's value, at any model for dr."""
    model = np.array([[0.9, 0.1, 0.4], [0.5, 0.5, 0.0]])
    expected_P = (TARGET * model).sum(1)
    mean_ips = mean_dr = 0.0
    for first, second in itertools.product(range(3), repeat=2):
        shown = np.array([first, second])
        chance = LOGGING[[0, 1], shown].prod()
        # Twice the same request, since an interval wants two.
        log = logged(
            np.tile(REWARD[[0, 1], shown], 2),
            np.tile(LOGGING[[0, 1], shown], 2),
            np.tile(TARGET[[0, 1], shown], 2),
            requests=np.repeat([0, 1], 2),
            places=np.tile([0, 1], 2),
        )
        mean_ips += chance * ips(log, resamples=1).value
        predicted = np.tile(model[[0, 1], shown], 2)
        mean_dr += chance * doubly_robust(log, predicted, np.tile(expected_P, 2), resamples=1).value
    assert mean_ips == pytest.approx(TRUE_VALUE)
    assert mean_dr == pytest.approx(TRUE_VALUE)


def test_dr_with_the_true_model_needs_no_weights():
    """Right by the model alone, though every propensity is wrong."""
    log, place, item = drawn(20_000, 1)
    wrong = logged(log.reward, np.full(len(item), 0.5), TARGET[place, item], requests=log.request, places=place)
    found = doubly_robust(wrong, REWARD[place, item], (TARGET * REWARD).sum(1)[place], resamples=10)
    assert abs(found.value - TRUE_VALUE) < 4 * found.error
    assert abs(ips(wrong, resamples=10).value - TRUE_VALUE) > 0.1


def test_closed_form_variance_of_ips():
    """Var = (E[(sum w r)^2] - V^2) / R, places independent: the sum of the places' variances."""
    second = (TARGET**2 / LOGGING * REWARD).sum(1)  # E[w^2 r] of a click
    variance = float((second - (TARGET * REWARD).sum(1) ** 2).sum())
    log, _, _ = drawn(20_000, 2)
    assert ips(log, resamples=10).error == pytest.approx(np.sqrt(variance / 20_000), rel=0.05)


def test_closed_form_and_bootstrap_agree():
    log, _, item = drawn(2_000, 3, users=300)
    model = np.full(len(item), 0.5)
    for found in (ips(log), snips(log), doubly_robust(log, model, model)):
        width = found.high - found.low
        assert found.drawn_high - found.drawn_low == pytest.approx(width, rel=0.15)
        assert found.drawn_low < found.value < found.drawn_high


def test_users_who_come_again_widen_the_interval():
    """Each user's requests are copies of one: 100 users say what 100 requests say."""
    log, _, _ = drawn(100, 4)
    many = logged(
        np.tile(log.reward, 9), np.full(1_800, 1.0), np.tile(np.minimum(log.weight, 1), 9),
        requests=np.concatenate([log.request + 100 * n for n in range(9)]), places=np.tile(log.place, 9),
        users=np.tile(log.request, 9),
    )  # fmt: skip
    once = logged(log.reward, np.ones(200), np.minimum(log.weight, 1), requests=log.request, places=log.place)
    for estimator in (ips, snips):
        assert estimator(many, resamples=10).value == pytest.approx(estimator(once, resamples=10).value)
        assert estimator(many, resamples=10).error == pytest.approx(estimator(once, resamples=10).error)


@pytest.mark.parametrize("name", ["ips", "snips", "dr"])
def test_intervals_hold_the_truth(name):
    """Of 400 logs of 400 requests, about 95 % of intervals hold the true value."""
    held, values = 0, []
    for seed in range(400):
        log, _, item = drawn(400, seed, users=150)
        if name == "dr":
            found = doubly_robust(log, np.full(len(item), 0.5), np.full(len(item), 0.5), resamples=1)
        else:
            found = (ips if name == "ips" else snips)(log, resamples=1)
        held += found.low <= TRUE_VALUE <= found.high
        values.append(found.value)
    assert 0.915 <= held / 400 <= 0.98
    assert abs(np.mean(values) - TRUE_VALUE) < 4 * np.std(values) / 20


def test_snips_stays_within_the_rewards_and_does_not_move_with_a_shift():
    log = logged(np.array([1.0, 1.0, 1.0]), np.array([0.01, 0.5, 0.5]), np.array([0.9, 0.1, 0.2]))
    assert snips(log).value == pytest.approx(1.0)
    assert ips(log).value > 10


def test_clipping_and_switching():
    log = logged(np.array([1.0, 0.0, 1.0, 1.0]), np.array([0.01, 0.5, 0.25, 1.0]), np.array([1.0, 0.5, 0.5, 0.0]))
    assert ips(log, most_weight=5).value == pytest.approx((5 + 0 + 2 + 0) / 4)
    assert ips(log, most_weight=5).most_weight == 5
    predicted, expected = np.array([0.5, 0.5, 0.5, 0.5]), np.array([0.4, 0.4, 0.4, 0.4])
    left_to_the_model = doubly_robust(log, predicted, expected, switch=5)
    assert left_to_the_model.value == pytest.approx(0.4 + (0 - 0.5 + 1.0 + 0) / 4)
    assert doubly_robust(log, predicted, expected, switch=1e9).value == doubly_robust(log, predicted, expected).value
    with pytest.raises(ConfigError, match="most_weight must be above 0"):
        ips(log, most_weight=0)


def test_effective_sample_size():
    assert effective_sample_size(np.ones(7)) == pytest.approx(7)
    assert effective_sample_size(np.array([1.0, 0, 0])) == pytest.approx(1)
    assert effective_sample_size(np.zeros(3)) == 0


def test_against_a_simulated_world(demo_world):
    """Logs of a half random policy, judged for another one: near `World.value_of`, which is exact."""
    from shortlist.simulation import best, popular

    world, users, times = demo_world
    explore, k = 0.5, 3
    logging, target = popular(world, k, explore=explore), best(world, k, aim="clicks", explore=0.2)
    rng = np.random.default_rng(0)
    shown = logging.show(users, times, world.num_items, rng)
    clicks = world.respond(users, shown.pages, times, rng).clicks
    wanted = 0.8 * (target.pages_of(users, times) == shown.pages) + 0.2 / world.num_items
    rows = np.arange(len(users)).repeat(k)
    log = logged(
        clicks.ravel(), shown.propensity.ravel(), wanted.ravel(), requests=rows, places=np.tile(np.arange(k), len(users)), users=users[rows]
    )  # fmt: skip
    truth = world.value_of(target, users, times, "clicks").mean()
    for found in (ips(log), snips(log)):
        assert abs(found.value - truth) < 4 * found.error
        assert found.error < 0.1 * truth


@pytest.fixture
def demo_world():
    from shortlist.data.log import read
    from shortlist.simulation import World, WorldConfig
    from support import shop_frames

    events, items, users = shop_frames()
    world = World.from_log(read(events, items=items, users=users), WorldConfig(seed=1, attraction=0.3))
    asking = np.random.default_rng(5).integers(1, world.num_users + 1, 20_000)
    return world, asking, np.full(20_000, float(world.start))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"propensity": [0.0, 0.5]}, "propensities must be above 0"),
        ({"propensity": [0.5, 1.5]}, "at most 1"),
        ({"target": [0.5, -0.1]}, "target policy must be from 0 to 1"),
        ({"reward": [np.nan, 1.0]}, "NaN"),
        ({"reward": [], "propensity": [], "target": []}, "no rows"),
        ({"users": np.array([1, 2]), "requests": np.array([1, 1])}, "two users"),
        ({"places": np.array([1])}, "one entry each"),
    ],
)
def test_what_is_no_log_is_refused(change, sentence):
    good = {"reward": [1.0, 0.0], "propensity": [0.5, 0.5], "target": [0.5, 0.5]}
    made = {**good, **change}
    three = [np.array(made.pop(name), dtype=float) for name in ("reward", "propensity", "target")]
    with pytest.raises(DataError, match=sentence):
        logged(*three, **made)


def test_no_overlap_is_said():
    log = logged(np.array([1.0, 0.0]), np.array([0.5, 0.5]), np.array([0.0, 0.0]))
    with pytest.raises(DataError, match="says nothing of it"):
        snips(log)
    assert ips(log).value == 0
    with pytest.raises(DataError, match="at least 2 users"):
        ips(logged(np.array([1.0]), np.array([0.5]), np.array([0.5])))


def test_the_same_seed_draws_the_same():
    log, _, _ = drawn(200, 6)
    assert off_policy.ips(log, seed=3) == off_policy.ips(log, seed=3)
    assert off_policy.ips(log, seed=3).drawn_low != off_policy.ips(log, seed=4).drawn_low
