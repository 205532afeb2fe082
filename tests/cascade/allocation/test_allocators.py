"""The contract of every registered allocator, and what each one adds."""

import json
import timeit

import numpy as np
import pytest
import torch

from chain_support import NEW, F, contexts, logged, replayed, small_chains, true_rewards
from shortlist.cascade.allocation.base import RESOURCES, Budget, ChainSet, Spent
from shortlist.cascade.allocation.body import ChoiceConfig, Chooser, PricedConfig
from shortlist.cascade.allocation.dcaf import varied_J
from shortlist.cascade.allocation.saved import load_allocator, make_allocator, save_allocator
from shortlist.cascade.allocation.solver import best_mixture, choose, solve
from shortlist.errors import ConfigError, DataError, SnapshotError, UnknownSystem
from shortlist.registry import systems

torch.set_num_threads(1)
CHAINS = small_chains()
PAST, DAY = replayed(400, CHAINS, seed=1), contexts(500, seed=2)
SMALL = {"dim": 8, "epochs": 4}
PRICED = {"newcomers": NEW, "reward": SMALL}
SETTINGS = {
    "fixed": {"explore": 0.03},
    "mixture": {"explore": 0.03},
    "oracle": {"explore": 0.03},
    "dcaf": PRICED,
    "queue-only": PRICED,
    "greenflow": PRICED,
}
ENTRIES = [e for e in systems(kind="allocator") if not e.cls.__module__.startswith("shortlist_systems")]
BUDGETS = [Budget(ms=1.6), Budget(mflop=3.0), Budget(mflop=3.0, ms=1.7), Budget(ms=100.0), Budget()]
PLAIN = {"explore": 0.0}


def made(name, **settings):
    given = {**SETTINGS.get(name, {}), **settings}
    allocator = make_allocator(name, given, CHAINS, F)
    allocator.fit(PAST)
    return allocator


def aim(allocator, budget, x):
    """As in serving, or by true rewards where that is what it takes."""
    if allocator_is_oracle(allocator):
        return allocator.aim_at(budget, true_rewards(x, CHAINS), np.zeros(len(x), dtype=np.int64))
    return allocator.aim(budget, x)


def pick(allocator, x, **given):
    if allocator_is_oracle(allocator):
        return allocator.choose_by(true_rewards(x, CHAINS), np.zeros(len(x), dtype=np.int64), **given)
    return allocator.choose(x, **given)


def chances(allocator, x, **given):
    if allocator_is_oracle(allocator):
        may = allocator._may_KJ(given.get("most_C"))
        return allocator._chances(true_rewards(x, CHAINS), may, np.zeros(len(x), dtype=np.int64))
    return allocator.chances(x, **given)


def allocator_is_oracle(allocator):
    return type(allocator).__name__ == "Oracle"


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
class TestEveryAllocator:
    @pytest.mark.parametrize("budget", BUDGETS, ids=str)
    def test_budget_is_kept_on_average(self, entry, budget):
        """Expected cost, exploration and floor and all, of the very requests it aimed at; and it is used."""
        allocator = made(entry.name)
        aim(allocator, budget, DAY)
        expected_C = (chances(allocator, DAY) @ CHAINS.costs_JC).mean(0)
        assert (expected_C <= budget.limits_C * (1 + 1e-9)).all()
        limited = np.isfinite(budget.limits_C)
        if limited.any() and budget.ms != 100.0 and entry.name != "fixed":
            assert (expected_C / budget.limits_C)[limited].max() > 0.9

    def test_cap_holds_for_every_request(self, entry):
        allocator = made(entry.name)
        aim(allocator, Budget(ms=1.9), DAY)
        for most in ([np.inf, 1.0], [2.0, np.inf], [2.0, 1.0]):
            choice = pick(allocator, DAY, most_C=np.array(most), rng=np.random.default_rng(0))
            assert (CHAINS.costs_JC[choice.chain_R] <= most).all()
            free = pick(allocator, DAY, rng=np.random.default_rng(0))
            would_pass = (CHAINS.costs_JC[free.chain_R] > most).any(1)
            np.testing.assert_array_equal(choice.capped_R, would_pass)
            assert choice.capped_R.any()
            assert not free.capped_R.any()

    def test_the_cheapest_chain_is_always_possible(self, entry):
        allocator = made(entry.name)
        aim(allocator, Budget(ms=1.9), DAY)
        assert (pick(allocator, DAY, most_C=np.zeros(2)).chain_R == 0).all()
        aim(allocator, Budget(mflop=1e-6, ms=1e-6), DAY)
        assert (pick(allocator, DAY).chain_R == 0).all()

    def test_chances_are_those_of_the_choices(self, entry):
        allocator = made(entry.name)
        aim(allocator, Budget(ms=1.6), DAY)
        for most in (None, np.array([np.inf, 1.2])):
            chance = chances(allocator, DAY, most_C=most)
            np.testing.assert_allclose(chance.sum(1), 1, rtol=1e-12)
            assert (chance >= 0).all()
            choice = pick(allocator, DAY, most_C=most, rng=np.random.default_rng(1))
            np.testing.assert_array_equal(choice.propensity_R, chance[np.arange(len(DAY)), choice.chain_R])
            assert (choice.propensity_R > 0).all()
        few, many = DAY[:3], 4000
        chance = chances(allocator, few)
        drawn = pick(allocator, np.repeat(few, many, axis=0), rng=np.random.default_rng(2)).chain_R.reshape(3, many)
        seen = np.stack([np.bincount(row, minlength=len(CHAINS)) / many for row in drawn])
        assert np.abs(seen - chance).max() < 4 * np.sqrt(0.25 / many)

    def test_same_seed_same_choice(self, entry):
        one, other = made(entry.name), made(entry.name)
        for allocator in (one, other):
            aim(allocator, Budget(ms=1.6), DAY)
        a, b = (pick(allocator, DAY, rng=np.random.default_rng(5)) for allocator in (one, other))
        np.testing.assert_array_equal(a.chain_R, b.chain_R)
        np.testing.assert_array_equal(a.value_R, b.value_R)
        np.testing.assert_array_equal(a.prices_C, b.prices_C)

    def test_saved_and_loaded_it_chooses_the_same(self, entry, tmp_path):
        allocator = made(entry.name)
        aim(allocator, Budget(mflop=3.0), DAY)
        save_allocator(tmp_path / "a", allocator)
        again = load_allocator(tmp_path / "a")
        assert type(again) is type(allocator)
        assert again.config == allocator.config
        assert again.budget == allocator.budget
        assert again.chains.names == CHAINS.names
        a, b = (pick(x, DAY, rng=np.random.default_rng(5)) for x in (allocator, again))
        np.testing.assert_array_equal(a.chain_R, b.chain_R)
        np.testing.assert_array_equal(a.propensity_R, b.propensity_R)
        aim(again, Budget(ms=1.3), DAY)
        aim(allocator, Budget(ms=1.3), DAY)
        np.testing.assert_array_equal(pick(again, DAY[:1]).prices_C, allocator.prices_C)

    def test_a_state_that_does_not_fit_changes_nothing(self, entry):
        allocator = made(entry.name)
        aim(allocator, Budget(ms=1.6), DAY)
        before = {n: np.array(a) for n, a in allocator.state().items()}
        for name in before:
            with pytest.raises(DataError, match=name.split(".")[-1]):
                allocator.load_state({n: a + 1 for n, a in before.items() if n != name})
        for name, array in allocator.state().items():
            np.testing.assert_array_equal(array, before[name])

    def test_wrong_sizes_are_refused(self, entry):
        allocator = made(entry.name)
        with pytest.raises(DataError, match="no requests"):
            aim(allocator, Budget(ms=2.0), DAY[:0])
        if not allocator_is_oracle(allocator):
            with pytest.raises(DataError, match="3 features"):
                allocator.choose(DAY[:, 1:])
        with pytest.raises(DataError):
            allocator.fit(replayed(20, CHAINS.select(np.arange(4))))

    def test_empty_batches_are_answered(self, entry):
        allocator = made(entry.name)
        aim(allocator, Budget(ms=1.6), DAY)
        assert pick(allocator, DAY[:0]).chain_R.shape == (0,)


def test_all_six_are_registered():
    assert {"fixed", "mixture", "dcaf", "queue-only", "greenflow", "oracle"} <= {e.name for e in ENTRIES}
    assert {e.stage for e in ENTRIES} == {"allocation"}


def test_prices_choose_as_the_rule_says():
    allocator = made("greenflow", floor=0.0, **PLAIN)
    allocator.aim(Budget(mflop=3.0, ms=1.7), DAY)
    choice = allocator.choose(DAY)
    values = allocator.values(DAY)
    dearer, cheaper = (choose(values, CHAINS.costs_JC, prices) for prices in (allocator.lower_C, allocator.prices_C))
    assert ((choice.chain_R == dearer) | (choice.chain_R == cheaper)).all()
    apart = dearer != cheaper
    assert (choice.chain_R == dearer)[apart].mean() == pytest.approx(allocator.mix, abs=0.1)
    np.testing.assert_array_equal(choice.value_R, values[np.arange(len(DAY)), choice.chain_R])
    chance = np.where(~apart, 1.0, np.where(choice.chain_R == dearer, allocator.mix, 1 - allocator.mix))
    np.testing.assert_allclose(choice.propensity_R, chance)
    exact = solve(values, CHAINS.costs_JC, Budget(mflop=3.0, ms=1.7).limits_C)
    np.testing.assert_array_equal(exact.prices_C, choice.prices_C)


def test_more_choice_brings_more_and_the_oracle_most():
    """True rewards at the same budget, all trained on whole rows, each with its own value model."""
    new = contexts(2000, seed=8)
    truth = true_rewards(new, CHAINS)
    longer = {**PLAIN, "floor": 0.0, "reward": {"dim": 16, "epochs": 50, "lr": 0.01, "batch_size": 64}}
    brought = {}
    for name in ("fixed", "mixture", "dcaf", "queue-only", "greenflow", "oracle"):
        settings = longer if name in ("dcaf", "queue-only", "greenflow") else PLAIN
        allocator = made(name, **settings)
        aim(allocator, Budget(ms=0.8), new)
        chain = pick(allocator, new, rng=np.random.default_rng(0)).chain_R
        brought[name] = truth[np.arange(2000), chain].mean()
    assert brought["fixed"] <= brought["mixture"] * 1.005
    gain = {
        name: (value - brought["mixture"]) / (brought["oracle"] - brought["mixture"]) for name, value in brought.items()
    }
    assert gain["greenflow"] > max(0.8, gain["dcaf"], gain["queue-only"]), gain
    assert gain["queue-only"] > 0.3, gain


def test_decisions_are_quick_with_sixty_chains():
    """The best of thirty calls, so that a busy machine does not count: half a millisecond alone, .05 a request in a batch of 16."""
    rows = [(a, b, m) for m in range(3) for a in (20, 40, 80, 160, 320) for b in (5, 10, 15, 20)]
    count = np.array([(a, b) for a, b, _ in rows])
    cost = count.sum(1) * (1 + np.array([m for *_, m in rows]))
    order = np.argsort(cost, kind="stable")
    chains = ChainSet(
        names=tuple(map(str, rows)),
        stages=("retrieval", "ranking"),
        model_JK=np.array([(0, m) for *_, m in rows]),
        count_JK=count,
        costs_JC=np.stack([cost, cost], 1).astype(float),
    ).select(order)
    for name in ("dcaf", "greenflow"):
        allocator = make_allocator(name, {"newcomers": NEW}, chains, F)
        allocator.aim(Budget(ms=200.0), DAY)
        for size, most in ((1, 0.5e-3), (16, 16 * 0.05e-3)):
            assert min(timeit.repeat(lambda: allocator.choose(DAY[:size]), number=1, repeat=30)) < most, (name, size)  # noqa: B023


def test_newcomers_get_at_least_the_median_chain():
    allocator = made("greenflow", **PLAIN)
    allocator.aim(Budget(ms=1.6), DAY)
    is_new = DAY[:, NEW] < 0
    chain = allocator.choose(DAY).chain_R
    median = int(np.ceil((len(CHAINS) - 1) / 2))
    assert chain[is_new].min() >= median
    assert chain[~is_new].min() < median
    capped = allocator.choose(DAY, most_C=CHAINS.costs_JC[3]).chain_R
    assert (
        capped[is_new] == np.flatnonzero(CHAINS.within_J(CHAINS.costs_JC[3]))[-1]
    ).all()  # the nearest that the cap allows
    poor = Budget(ms=float(CHAINS.costs_JC[0, 1]) * 1.1)
    allocator.aim(poor, DAY)
    chances = allocator.chances(DAY)
    assert (chances @ CHAINS.costs_JC).mean(0)[1] <= poor.ms * (1 + 1e-9)
    assert allocator.choose(DAY).chain_R[is_new].min() == 0  # no floor where the budget has none


def test_exploration_reaches_every_chain_but_never_eats_the_budget():
    allocator = made("greenflow", explore=0.2, floor=0.0)
    allocator.aim(Budget(ms=2.0), DAY)
    assert 0 < allocator.explore < 0.2  # a fifth would cost more than a tenth of what is left above the cheapest
    assert (allocator.chances(DAY) >= allocator.explore / len(CHAINS) * (1 - 1e-12)).all()
    allocator.aim(Budget(ms=float(CHAINS.costs_JC[0, 1])), DAY)
    assert allocator.explore == pytest.approx(0, abs=1e-12)
    allocator.aim(Budget(), DAY)
    assert allocator.explore == 0.2


def test_dcaf_moves_one_stage():
    allocator = made("dcaf", floor=0.0, **PLAIN)
    own = np.flatnonzero(allocator.own_J)
    anchor = len(CHAINS) - 1
    rest = own[own != 0]
    assert set(CHAINS.count_JK[rest, 1]) == {5, 15, 45}
    assert (CHAINS.count_JK[rest, 0] == CHAINS.count_JK[anchor, 0]).all()
    assert (CHAINS.model_JK[rest] == CHAINS.model_JK[anchor]).all()
    first = made("dcaf", stage="retrieval", **PLAIN)
    rest = np.flatnonzero(first.own_J)[1:]
    assert set(CHAINS.count_JK[rest, 0]) == {60, 180}  # 20 lets less through than ranking would score
    with pytest.raises(ConfigError, match="retrieval"):
        made("dcaf", stage="retreival")
    with pytest.raises(ConfigError, match="no chain named"):
        made("dcaf", chain="none")


def test_a_later_stage_that_scores_all_it_gets_counts_as_the_same():
    kept = varied_J(CHAINS, 0, len(CHAINS) - 1)
    counts = {tuple(row) for row in CHAINS.count_JK[np.flatnonzero(kept)[1:]]}
    assert counts == {(60, 45), (180, 45)}


def test_queue_only_keeps_the_best_models_for_the_budget():
    allocator = made("queue-only", **PLAIN)
    for ms in (1.2, 3.5):
        allocator.aim(Budget(ms=ms), DAY)
        used = {int(m) for m in CHAINS.model_JK[np.flatnonzero(allocator.own_J)[1:], 1]}
        reached = {}
        for m in range(2):
            worth = np.where(CHAINS.model_JK[:, 1] == m, allocator.mean_J, -np.inf)
            worth[0] = allocator.mean_J[0]
            share = best_mixture(worth, CHAINS.costs_JC, Budget(ms=ms).limits_C)
            reached[m] = share @ allocator.mean_J
        assert used == {max(reached, key=reached.get)}


def test_fixed_takes_the_best_within_the_budget_or_the_named_one():
    allocator = made("fixed", **PLAIN)
    allocator.aim(Budget(ms=1.6), DAY)
    fits = CHAINS.costs_JC[:, 1] <= 1.6
    best = int(np.where(fits, PAST.rewards_RJ.mean(0), -1).argmax())
    assert (allocator.choose(DAY).chain_R == best).all()
    np.testing.assert_allclose(allocator.choose(DAY).value_R, PAST.rewards_RJ.mean(0)[best])
    named = make_allocator("fixed", {"chain": CHAINS.names[7]}, CHAINS, F)
    named.aim(Budget(), DAY)
    choice = named.choose(DAY)
    assert (choice.chain_R == 7).all()
    assert np.isnan(choice.value_R).all()
    below = named.choose(DAY, most_C=CHAINS.costs_JC[5])
    assert (below.chain_R <= 5).all()
    assert below.capped_R.all()
    with pytest.raises(ConfigError, match="no chain named"):
        make_allocator("fixed", {"chain": "rank"}, CHAINS, F)


def test_mixture_spends_the_budget_on_two_chains():
    allocator = made("mixture", **PLAIN)
    allocator.aim(Budget(ms=1.6), DAY)
    used = np.flatnonzero(allocator.share_J)
    assert len(used) <= 2
    assert allocator.share_J @ CHAINS.costs_JC[:, 1] == pytest.approx(1.6)
    below = allocator.chances(DAY[:1], most_C=CHAINS.costs_JC[used[-1] - 1])[0]
    assert below.sum() == pytest.approx(1)
    assert below[used[-1]] == 0


def test_the_oracle_refuses_to_serve():
    allocator = made("oracle")
    for call in (lambda: allocator.choose(DAY), lambda: allocator.aim(Budget(ms=1.0), DAY)):
        with pytest.raises(ConfigError, match="can not serve"):
            call()


def spent_on(allocator, x, dearer=1.0):
    chain = allocator.choose(x, rng=np.random.default_rng(0)).chain_R
    return Spent(contexts_RF=x, chain_R=chain, spent_C=CHAINS.costs_JC[chain].sum(0) * dearer, seconds=60.0)


def test_observing_moves_prices_part_of_the_way():
    allocator = made("greenflow", floor=0.0, reward={"dim": 8, "epochs": 30, "lr": 0.01, "batch_size": 64}, **PLAIN)
    allocator.aim(Budget(ms=1.6), DAY)
    before = allocator.prices_C
    richer = DAY + np.array(
        [0.0, 0.0, 1.5], dtype=np.float32
    )  # requests worth more: the same budget has a higher price
    allocator.observe(spent_on(allocator, richer))
    solved = solve(allocator.values(richer), CHAINS.costs_JC, Budget(ms=1.6).limits_C).prices_C
    np.testing.assert_allclose(allocator.prices_C, 0.7 * before + 0.3 * solved)
    assert solved[1] > before[1]
    for _ in range(30):
        allocator.observe(spent_on(allocator, richer))
    assert allocator.prices_C[1] == pytest.approx(solved[1], rel=1e-3)
    for _ in range(30):
        allocator.observe(spent_on(allocator, richer, dearer=1.25))  # chains cost a quarter more than calibration says
    cost = CHAINS.costs_JC[allocator.choose(richer).chain_R].mean(0)[1]
    assert cost * 1.25 == pytest.approx(1.6, rel=0.03)


def test_an_empty_window_moves_nothing():
    for name in ("greenflow", "mixture"):
        allocator = made(name)
        allocator.aim(Budget(ms=1.6), DAY)
        before = allocator.prices_C.copy()
        allocator.observe(Spent(contexts_RF=DAY[:0], chain_R=np.zeros(0, np.int64), spent_C=np.zeros(2), seconds=60.0))
        np.testing.assert_array_equal(allocator.prices_C, before)


def test_learns_from_one_drawn_chain_per_request():
    allocator = make_allocator("mixture", {}, CHAINS, F)
    allocator.fit(logged(6000, CHAINS))
    truth = true_rewards(logged(6000, CHAINS).contexts_RF, CHAINS).mean(0)
    assert np.abs(allocator.mean_J / truth - 1).max() < 0.3
    some = logged(50, CHAINS, chance_J=np.r_[np.full(3, 1 / 3), np.zeros(len(CHAINS) - 3)])
    allocator.fit(some)
    allocator.aim(Budget(), DAY)
    assert np.flatnonzero(allocator.share_J).max() < 3  # never a chain that was never tried


def test_what_can_not_be_is_refused_by_name(tmp_path):
    with pytest.raises(UnknownSystem, match="greenflow"):
        make_allocator("greenflw", {}, CHAINS, F)
    with pytest.raises(ConfigError, match="not an allocator"):
        make_allocator("pcgrad", {}, CHAINS, F)
    with pytest.raises(ConfigError, match="explore"):
        make_allocator("greenflow", {"explor": 0.1}, CHAINS, F)
    with pytest.raises(ConfigError, match="newcomers"):
        make_allocator("greenflow", {"newcomers": 3}, CHAINS, F)
    for settings in ({"explore": 1.0}, {"floor": 2.0}, {"rho": -0.1}, {"newcomers": -1}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            PricedConfig(**settings)

    class Mine(Chooser):
        """Not registered."""

    with pytest.raises(ConfigError, match="not registered"):
        save_allocator(tmp_path / "x", Mine(ChoiceConfig(), CHAINS, F))


def test_damaged_folders_are_refused_by_file(tmp_path):
    allocator = made("dcaf")
    save_allocator(tmp_path / "a", allocator)
    weights = tmp_path / "a" / "allocator.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"x")
    with pytest.raises(SnapshotError, match=r"allocator\.safetensors"):
        load_allocator(tmp_path / "a")
    with pytest.raises(SnapshotError, match="manifest"):
        load_allocator(tmp_path / "none")
    assert RESOURCES == ("mflop", "ms")  # costs are saved by place
    weights.write_bytes(whole)
    about = json.loads((tmp_path / "a" / "allocator.json").read_text())
    assert about["settings"]["model"] == "linear"
    assert about["settings"]["reward"]["dim"] == SMALL["dim"]
