"""Truth is what its formulas say, people behave as the truth says, and nothing depends on anything but log, settings and seed."""

import dataclasses
import json
import math
from itertools import permutations

import numpy as np
import polars as pl
import pytest

from shortlist.data.histories import Histories
from shortlist.data.log import read
from shortlist.errors import ConfigError, DataError
from shortlist.simulation import Policy, World, WorldConfig, best, popular, uniform
from shortlist.simulation import world as room
from shortlist.simulation.factors import tastes
from shortlist.simulation.policies import random_pages
from support import NUM_ITEMS, PER_CLUSTER, planted_histories, shop_dataset

DAY = 86_400


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def requests_of(world, num, seed=0, days=30.0):
    """Known users at random times after the start, and random pages of four."""
    rng = np.random.default_rng(seed)
    users = rng.integers(1, world.num_users + 1, num)
    times = world.start + rng.integers(0, int(days * DAY), num)
    return users, times, random_pages(rng, num, world.num_items, 4)


def within(outcomes, expected, error=None):
    """Means of independent outcomes [num, ...] lie within 4 standard errors of what is expected, place by place.

    The error is that of one outcome as the truth has it, or as the outcomes show it.
    """
    error = outcomes.std(0) if error is None else error
    assert (np.abs(outcomes.mean(0) - expected) <= 4 * error / math.sqrt(len(outcomes)) + 1e-12).all()


# -- what is fitted -----------------------------------------------------------------------------------------------


def test_tastes_are_the_leading_part_of_correspondence_analysis():
    """Against a full decomposition of the dense table of residuals."""
    histories = planted_histories()
    table = np.zeros((histories.num_users + 1, NUM_ITEMS + 3))
    for user in range(1, histories.num_users + 1):
        events = slice(histories.offsets[user], histories.offsets[user + 1])
        for item in set(histories.item[events].tolist()):
            groups = {g for g, i in zip(histories.group[events], histories.item[events]) if i == item}
            table[user, item] = math.log1p(len(groups))
    a, b = table.sum(1), table.sum(0)
    residual = table - np.outer(a, b) / table.sum()
    scaled = residual / np.sqrt(np.outer(a + a[1:].mean(), b + b[1:].mean()))
    left, singular, right = np.linalg.svd(scaled, full_matrices=False)
    users, items = left[:, :3] * np.sqrt(singular[:3]), right[:3].T * np.sqrt(singular[:3])
    found = tastes(histories, NUM_ITEMS + 2, dim=3, seed=0)
    for row in range(1, histories.num_users + 1):
        for item in range(1, NUM_ITEMS + 1):
            cosine = users[row] @ items[item] / np.linalg.norm(users[row]) / np.linalg.norm(items[item])
            assert found.users[row] @ found.items[item] == pytest.approx(cosine, abs=1e-6)
    assert not found.items[NUM_ITEMS + 1 :].any(), "nobody chose them, so nobody's taste speaks for them"
    assert not found.users[0].any()
    assert not found.items[0].any()


def test_affinity_finds_the_planted_clusters(world):
    users, items = np.arange(1, world.num_users + 1), np.arange(1, world.num_items + 1)
    z = world.affinity(users, items, np.full(len(users), world.start))
    cluster_U = np.array([int(str(u)[1:]) % 4 for u in world.user_ids.decode(users)])
    number = np.array([int(str(i)[1:]) for i in world.item_ids.decode(items)])
    own = cluster_U[:, None] == (number - 1) // PER_CLUSTER
    sold = number <= NUM_ITEMS
    liked, other = z[:, sold][own[:, sold]], z[:, sold][~own[:, sold]]
    assert (liked[:, None] > other).mean() > 0.99
    assert (np.where(own, z, 0).sum(1) / PER_CLUSTER > other.max()).all(), (
        "everybody likes the own cluster on the whole"
    )
    assert not z[:, ~sold].any()


def test_means_are_those_that_were_asked_for(world):
    """Exactly over all pairs, while the world set them on a sample: 50,000 pairs leave an error of about 0.0005."""
    users, items = np.arange(1, world.num_users + 1), np.arange(1, world.num_items + 1)
    weight = np.outer(world.events_U[1:], world.events_I[1:])
    at = np.full(len(users), world.start)
    attraction, conversion = world.attraction(users, items, at), world.conversion(users, items, at)
    assert np.average(attraction, weights=weight) == pytest.approx(world.config.attraction, abs=0.003)
    assert np.average(conversion, weights=weight * attraction) == pytest.approx(world.config.conversion, abs=0.003)
    assert np.average(world.affinity(users, items, at) ** 2, weights=weight) == pytest.approx(1, abs=0.03)


def test_values_and_tables_of_the_log_are_used(shop_log, drifting):
    """price is 1 + item number modulo 7; two items were never bought and get the median."""
    for item, value in zip(drifting.item_ids.decode(np.arange(1, drifting.num_items + 1)), drifting.value_I[1:]):
        number = int(str(item)[1:])
        if number <= NUM_ITEMS:
            assert value == 1.0 + number % 7
    assert drifting.value_I[0] == drifting.bid_I[0] == 0
    assert drifting.num_items == NUM_ITEMS + 2
    assert drifting.start == int(shop_log.events["timestamp"].dt.epoch("s").max()) + 1


def test_a_dataset_makes_the_same_world_in_its_own_numbers(world):
    other = World.from_log(shop_dataset(), world.config)
    row = other.item_ids.encode(world.item_ids.ids)
    assert np.array_equal(other.events_I[row], world.events_I[1:])
    users = np.arange(1, 9)
    same = other.user_ids.encode(world.user_ids.ids)[users - 1]
    at = np.full(8, world.start)
    mine, theirs = world.affinity(users, np.arange(1, 6), at), other.affinity(same, row[:5], at)
    assert np.allclose(mine, theirs, rtol=0.02, atol=1e-6), (
        "but for the sample that scales it, taste does not depend on numbers"
    )


# -- truth --------------------------------------------------------------------------------------------------------


def test_truth_is_the_formula_cell_by_cell(drifting):
    w, c = drifting, drifting.config
    users, times, pages = requests_of(w, 6)
    pages[0, 1] = 0
    clicks, value = w.click_chance(users, pages, times), w.true_value(users, pages, times)
    bought = w.converted_by(users, pages, times, seconds=3_000.0)
    for r, k in np.ndindex(pages.shape):
        u, i, days = users[r], pages[r, k], (times[r] - w.start) / DAY
        taste = math.cos(c.taste_turn * days) * w.user_UD[u] + math.sin(c.taste_turn * days) * w.later_UD[u]
        z = w.affinity_scale * float(taste @ w.item_ID[i])
        swing = c.popularity_swing * math.sin(2 * math.pi * (days / 7 + w.phase_I[i]))
        a = sigmoid(w.attraction_bias + c.taste * z + c.popularity * w.frequency_I[i] + swing)
        b = sigmoid(w.conversion_bias + c.conversion_taste * z + c.conversion_value * w.log_value_I[i])
        look = (1 / (k + 1)) ** c.position_decay
        assert clicks[r, k] == pytest.approx(look * a if i else 0)
        assert value[r, k] == pytest.approx(look * a * b * w.value_I[i] if i else 0)
        wait = 3_000 / math.exp(c.delay_taste * z + c.delay_value * w.log_value_I[i])
        slow = 0.5 * (1 + math.erf(math.log(wait / c.slow_median_s) / c.slow_spread / math.sqrt(2)))
        share = c.fast_share * (1 - math.exp(-wait / c.fast_mean_s)) + (1 - c.fast_share) * slow
        assert bought[r, k] == pytest.approx(b * share)


def test_an_unknown_user_goes_by_popularity(world):
    items, at = np.arange(1, world.num_items + 1), np.array([world.start])
    assert not world.affinity(np.array([0]), items, at).any()
    order = np.argsort(-world.attraction(np.array([0]), items, at)[0], kind="stable")
    assert (np.diff(world.events_I[1:][order]) <= 0).all()


def test_without_drift_time_changes_nothing(world):
    users, times, pages = requests_of(world, 50)
    now = world.true_value(users, pages, np.full(50, world.start))
    assert np.array_equal(world.true_value(users, pages, times), now)


def test_drift_turns_tastes_and_swings_popularity(drifting):
    w, quarter = drifting, 10 * DAY
    users, items = np.arange(1, w.num_users + 1), np.arange(1, w.num_items + 1)
    then = np.full(len(users), w.start + quarter)
    assert np.allclose(w.affinity(users, items, then), w.affinity_scale * w.later_UD[1:] @ w.item_ID[1:].T)
    assert np.allclose(np.linalg.norm(w.later_UD[1:], axis=1), 1)
    assert np.allclose((w.later_UD * w.user_UD).sum(1), 0, atol=1e-9)
    assert np.allclose(w.affinity(users, items, then + quarter), -w.affinity(users, items, then - quarter))
    still = World.from_log(shop_dataset(), WorldConfig(popularity_swing=1.0, popularity_period_days=2.0))
    one, at = np.array([1]), np.array([still.start])
    first = still.attraction(one, items, at)
    assert np.allclose(first, still.attraction(one, items, at + 2 * DAY))
    half = still.attraction(one, items, at + DAY)
    logits = np.log(first / (1 - first)) - np.log(half / (1 - half))
    assert np.allclose(logits, 2 * np.sin(2 * np.pi * still.phase_I[items]))


# -- what happens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.7, 1.5])
def test_position_bias_is_recovered(shop_log, decay):
    """Random pages: attraction is the same at every place on average, so rates fall exactly as looks do."""
    w = World.from_log(shop_log, WorldConfig(position_decay=decay, attraction=0.3))
    users, times, _ = requests_of(w, 40_000)
    rng = np.random.default_rng(2)
    clicks = w.respond(users, random_pages(rng, len(users), w.num_items, 6), times, rng).clicks
    rate = clicks.mean(0)
    error = np.sqrt(rate * (1 - rate) / len(users))
    looks = np.arange(1, 7) ** -decay
    assert (np.abs(rate / looks - rate[0]) < 4.5 * np.hypot(error / looks, error[0])).all()


def test_people_behave_as_the_truth_says(drifting):
    users, times, pages = (np.repeat(x, 4_000, axis=0) for x in requests_of(drifting, 5, seed=3))
    pages[:, 2] = 0
    told = drifting.respond(users, pages, times, np.random.default_rng(4))

    def by_request(x):
        return x.reshape(5, 4_000, 4).swapaxes(0, 1).astype(float)

    one = slice(None, None, 4_000)
    click = drifting.click_chance(users[one], pages[one], times[one])
    buy = click * drifting.conversion(users[one], pages[one], times[one])
    money = drifting.value_I[pages[one]]
    within(by_request(told.clicks), click, np.sqrt(click * (1 - click)))
    within(by_request(told.converted), buy, np.sqrt(buy * (1 - buy)))
    within(
        by_request(told.value),
        drifting.true_value(users[one], pages[one], times[one]),
        money * np.sqrt(buy * (1 - buy)),
    )
    assert not told.clicks[:, 2].any()
    assert not (told.converted & ~told.clicks).any()
    assert np.array_equal(told.value > 0, told.converted)
    assert np.array_equal(np.isfinite(told.delay_s), told.converted)
    assert np.array_equal(told.value[told.converted], drifting.value_I[pages[told.converted]])


def test_delays_follow_their_distribution(shop_log):
    w = World.from_log(shop_log, WorldConfig(attraction=0.9, conversion=0.9, taste=0.1))
    num = 60_000
    users, items, times = np.full(num, 7), np.full((num, 1), 3), np.full(num, w.start)
    told = w.respond(users, items, times, np.random.default_rng(0))
    delays = told.delay_s[told.converted]
    for seconds in (60, 600, 3_600, DAY, 7 * DAY):
        share = (
            w.converted_by(users[:1], items[:1], times[:1], seconds) / w.conversion(users[:1], items[:1], times[:1])
        ).item()
        error = math.sqrt(share * (1 - share) / len(delays))
        assert abs((delays <= seconds).mean() - share) < 4.5 * error, seconds


@pytest.mark.parametrize("fast", [True, False])
def test_quantiles_of_delays_are_known_where_one_kind_is_left(shop_log, fast):
    """Exponential: median = mean ln 2, nine tenths at mean ln 10. Lognormal: median, and a factor exp(1.2816 spread) above it."""
    config = WorldConfig(
        attraction=0.9, conversion=0.9, fast_share=float(fast), delay_taste=0.0, delay_value=0.0, slow_spread=0.8
    )
    w = World.from_log(shop_log, config)
    users, times, pages = requests_of(w, 30_000)
    delays = w.respond(users, pages, times, np.random.default_rng(1)).delay_s
    median, ninth = np.quantile(delays[np.isfinite(delays)], [0.5, 0.9])
    if fast:
        assert median == pytest.approx(600 * math.log(2), rel=0.05)
        assert ninth == pytest.approx(600 * math.log(10), rel=0.05)
    else:
        assert median == pytest.approx(DAY, rel=0.05)
        assert ninth == pytest.approx(DAY * math.exp(1.2816 * 0.8), rel=0.05)


def test_dear_items_take_longer_and_the_keen_buy_sooner(world):
    users, items = np.full(1, 5), np.arange(1, world.num_items + 1)
    at = np.full(1, world.start)
    soon = world.converted_by(users, items, at, 600) / world.conversion(users, items, at)
    z = world.affinity(users, items, at)
    wait = world.config.delay_taste * z + world.config.delay_value * world.log_value_I[items]
    assert np.array_equal(np.argsort(-soon[0]), np.argsort(wait[0]))
    assert (world.converted_by(users, items, at, 0.0) == 0).all()
    assert np.allclose(world.converted_by(users, items, at, 1e12), world.conversion(users, items, at))


def test_the_same_seed_gives_the_same_world_and_the_same_luck(shop_log, world):
    again = World.from_log(shop_log, world.config)
    for f in dataclasses.fields(World):
        mine, theirs = getattr(world, f.name), getattr(again, f.name)
        if isinstance(mine, np.ndarray):
            assert np.array_equal(mine, theirs), f.name
    users, times, pages = requests_of(world, 200)
    one, two, three = (world.respond(users, pages, times, np.random.default_rng(s)) for s in (5, 5, 6))
    assert all(np.array_equal(a, b) for a, b in zip(one, two))
    assert not np.array_equal(one.clicks, three.clicks)
    assert not np.array_equal(world.value_I, World.from_log(shop_log, WorldConfig(seed=2)).value_I)


def test_other_pages_meet_the_same_luck(world):
    """What is changed at one place changes nothing at the others."""
    users, times, pages = requests_of(world, 2_000)
    other = pages.copy()
    other[:, 0] = 1 + pages[:, 0] % world.num_items
    one, two = (world.respond(users, p, times, np.random.default_rng(5)) for p in (pages, other))
    assert all(np.array_equal(a[:, 1:], b[:, 1:]) for a, b in zip(one, two))


# -- policies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["popular", "explores", "random", "best"])
@pytest.mark.parametrize("aim", ["value", "clicks"])
def test_value_of_a_policy_agrees_with_playing_it(drifting, name, aim):
    w = drifting
    policy = {
        "popular": popular(w, 4),
        "explores": popular(w, 4, explore=0.4),
        "random": uniform(4),
        "best": best(w, 4, aim=aim, explore=0.1),
    }[name]
    users, times, _ = (np.repeat(x, 5_000, axis=0) for x in requests_of(w, 6, seed=8))
    rng = np.random.default_rng(9)
    told = w.respond(users, policy.show(users, times, w.num_items, rng).pages, times, rng)
    earned = (told.value if aim == "value" else told.clicks).sum(1).astype(float)
    one = slice(None, None, 5_000)
    within(earned.reshape(6, 5_000).T, w.value_of(policy, users[one], times[one], aim))


def test_the_best_page_is_the_best_of_all_pages(world):
    small = dataclasses.replace(
        world,
        item_ids=type(world.item_ids)(world.item_ids.ids[:5]),
        **{
            f: getattr(world, f)[:6]
            for f in ("item_ID", "frequency_I", "phase_I", "log_value_I", "value_I", "bid_I", "events_I")
        },
    )
    users, times = np.arange(1, 5), np.full(4, small.start)
    values = small.value_of(best(small, 3), users, times)
    every = np.array(
        [small.true_value(users, np.tile(page, (4, 1)), times).sum(1) for page in permutations(range(1, 6), 3)]
    )
    assert np.allclose(values, every.max(0))


def test_chunks_do_not_change_what_a_policy_is_worth(drifting, monkeypatch):
    users, times, _ = requests_of(drifting, 23)
    policies = (best(drifting, 3), uniform(3))
    whole = [drifting.value_of(p, users, times) for p in policies]
    monkeypatch.setattr(room, "CELLS_AT_ONCE", 4 * (drifting.num_items + 1))
    assert all(np.allclose(drifting.value_of(p, users, times), was) for p, was in zip(policies, whole))


def test_random_pages_are_uniform_over_ordered_choices():
    pages = random_pages(np.random.default_rng(0), 24_000, 4, 3)
    counts = np.unique(pages, axis=0, return_counts=True)[1]
    assert len(counts) == 24, "4 * 3 * 2 ordered choices of distinct items"
    assert ((counts - 1_000) ** 2 / 1_000).sum() < 55, "chi-square with 23 degrees of freedom, p < 0.0002"


def test_propensities_are_how_often_things_are_shown(world):
    policy, num = popular(world, 3, explore=0.3), 60_000
    users, times = np.ones(num, dtype=np.int64), np.full(num, world.start)
    shown = policy.show(users, times, world.num_items, np.random.default_rng(3))
    for place in range(3):
        for item in range(1, world.num_items + 1):
            there = shown.pages[:, place] == item
            told = shown.propensity[there, place]
            assert told.max() == told.min()
            assert abs(there.mean() - told[0]) < 4.5 * math.sqrt(told[0] * (1 - told[0]) / num)


def test_pages_are_full_or_end_in_empty_places(world):
    users, times = np.arange(1, 4), np.full(3, world.start)
    for policy in (popular(world, 30), best(world, 30)):
        pages = policy.pages_of(users, times)
        assert ((pages > 0).sum(1) == world.num_items).all()
        assert not pages[:, world.num_items :].any()


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"dim": 1}, "dim"),
        ({"attraction": 0.0}, "attraction"),
        ({"conversion": 1.0}, "conversion"),
        ({"fast_share": 1.2}, "fast_share"),
        ({"value_tail": 1.0}, "value_tail"),
        ({"value_median": 0.0}, "value_median"),
        ({"taste": float("nan")}, "taste"),
        ({"values": "gamma"}, "gamma"),
        ({"bids": "prices"}, "bid_prices"),
        ({"position_decay": -1.0}, "position_decay"),
    ],
)
def test_settings_that_make_no_world_are_named(settings, word):
    with pytest.raises(ConfigError, match=word):
        WorldConfig(**settings)


def test_logs_and_requests_that_do_not_fit_are_refused(world):
    plain = read(
        pl.DataFrame({"user_id": ["a", "b"], "item_id": ["x", "y"], "timestamp": [1_700_000_000, 1_700_000_100]})
    )
    with pytest.raises(ConfigError, match="observed"):
        World.from_log(plain, WorldConfig(values="observed"))
    with pytest.raises(DataError, match="no choices"):
        tastes(Histories.empty(3), 4, dim=2, seed=0)
    users, times, pages = requests_of(world, 3)
    rng = np.random.default_rng(0)
    with pytest.raises(DataError, match="pages"):
        world.respond(users[:2], pages, times, rng)
    with pytest.raises(DataError, match="item rows"):
        world.respond(users, pages + 100, times, rng)
    with pytest.raises(DataError, match="user rows"):
        world.respond(users - 100, pages, times, rng)
    with pytest.raises(ConfigError, match="explore"):
        popular(world, 3, explore=1.5)
    with pytest.raises(DataError, match="policy gave"):
        Policy(pages=lambda u, t: pages, k=3).pages_of(users, times)
    with pytest.raises(ConfigError, match="as many items"):
        uniform(99).show(users, times, world.num_items, rng)


def test_a_world_without_a_clock_or_without_variety():
    """Everybody chose everything once, no times: nothing to be told apart, and rounding is not taken for taste."""
    everything = [(f"u{u}", f"i{i}") for u in range(7) for i in range(11)]
    flat = World.from_log(read(pl.DataFrame(everything, schema=["user_id", "item_id"], orient="row")))
    assert not flat.user_UD.any()
    assert flat.start == room.NO_CLOCK_START
    chance = flat.attraction(np.array([1, 2]), np.array([1, 2]), np.full(2, flat.start))
    assert np.allclose(chance, flat.config.attraction, atol=1e-6)


def test_bids_take_the_shape_of_a_price_file(tmp_path, shop_log):
    path = tmp_path / "prices.json"
    path.write_text(json.dumps({"price_counter_train": [0, 0, 5, 0, 5, 0, 0, 0, 1]}))
    w = World.from_log(shop_log, WorldConfig(bids="prices", bid_prices=str(path), bid_median=10.0))
    assert set(w.bid_I[1:].tolist()) <= {5.0, 10.0, 20.0}, "prices 2, 4 and 8, of median 4, scaled to a median of 10"
