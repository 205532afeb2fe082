"""Value models: closed forms, monotone without exception, and a planted funnel that they must learn."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from chain_support import F, contexts, logged, replayed, small_chains, true_rewards
from shortlist.cascade.allocation.base import ChainSet
from shortlist.cascade.allocation.reward_nets import BASES, CountBases, Recursive, joined
from shortlist.cascade.allocation.rewards import (
    MONOTONE,
    CountOrder,
    RewardConfig,
    RewardModel,
    _validating,
    known_weights,
    mean_rewards,
    trust,
)
from shortlist.errors import ConfigError, DataError

torch.set_num_threads(1)
CHAINS = small_chains()
KINDS = ("linear", "recursive", "log", "monotone", "additive", "plain")
QUICK = {"dim": 16, "epochs": 3}


def built(kind, **settings):
    return RewardModel(kind, RewardConfig(**{**QUICK, **settings}), CHAINS, F)


def test_bases_are_their_formulas():
    bases = CountBases(200)
    counts = torch.tensor([0, 1, 50, 200])
    u = counts / 200
    with torch.no_grad():
        found = bases(counts)
        t = {name: torch.nn.functional.softplus(raw) for name, raw in bases.scales.items()}
    expected = [
        u,
        torch.log(1 + counts) / np.log(201),
        u**0.5,
        1 - torch.exp(-u / t["fast"]),
        1 - torch.exp(-u / t["slow"]),
        counts / (counts + 200 * t["ratio"]),
    ]
    torch.testing.assert_close(found, torch.stack(expected).float(), rtol=1e-5, atol=1e-6)
    assert {n: float(v) for n, v in t.items()} == pytest.approx({"fast": 0.05, "slow": 0.3, "ratio": 0.1})
    assert (found[:, 0] == 0).all()
    assert (found <= 1).all()
    assert (found.diff(dim=1) > 0).all()
    with pytest.raises(ConfigError, match="cubic"):
        CountBases(10, ("log", "cubic"))


def test_bases_have_the_right_gradients():
    bases = CountBases(100).double()
    scales = [raw.detach().clone().requires_grad_() for raw in bases.scales.values()]

    def of(*raw):
        t = dict(zip(bases.scales, raw))
        softplus = torch.nn.functional.softplus
        u = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
        return torch.stack(
            [-torch.expm1(-u / softplus(t[n])) for n in ("fast", "slow")] + [u / (u + softplus(t["ratio"]))]
        )

    assert torch.autograd.gradcheck(of, scales)
    exact = torch.autograd.grad(of(*scales).sum(), scales)
    mine = torch.autograd.grad(bases(torch.tensor([10, 50, 100]))[3:].sum(), list(bases.scales.values()))
    torch.testing.assert_close(torch.stack(mine), torch.stack(exact), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("join", ["product", "softmin"])
def test_recursive_is_its_equations(join):
    """Every chain by hand, one after the other, from the same weights; four stages' worth of prefixes in three."""
    torch.manual_seed(0)
    model_JK = np.array([(a, b, c) for a in range(2) for b in range(2) for c in range(3)])
    count_JK = np.stack([np.array([30, 10, 5]) * (1 + j % 3) for j in range(12)])
    net = Recursive(F, model_JK, count_JK, dim=8, join=join)
    x = torch.randn(5, F)
    softplus = torch.nn.functional.softplus
    with torch.no_grad():
        found = net(x)
        h0 = net.context(x)
        for j in range(12):
            h, g = h0, None
            for k, stage in enumerate(net.stages):
                e = stage.embed.weight[model_JK[j, k]].expand(5, -1)
                h = torch.relu(stage.carry(torch.cat([h, e], 1)))
                s = (softplus(stage.weigh(h)) * stage.bases(torch.tensor([count_JK[j, k]]))[:, 0]).sum(1)
                g = s if g is None else g * s if join == "product" else -torch.log(torch.exp(-g) + torch.exp(-s))
            value = softplus(softplus(net.gain) * g + net.level(h0)[:, 0])
            torch.testing.assert_close(found[:, j], value, rtol=1e-5, atol=1e-6)


def test_joins_increase_in_both():
    a, b = torch.rand(50), torch.rand(50)
    for join in ("product", "softmin"):
        assert (joined(a + 0.1, b, join) > joined(a, b, join)).all()
        assert (joined(a, b + 0.1, join) > joined(a, b, join)).all()


@pytest.mark.parametrize("kind", MONOTONE)
@pytest.mark.parametrize("learn", ["untrained", "trained"])
def test_no_violation_at_all(kind, learn):
    """Also with wild weights and requests far outside of what was seen; checked pair by pair."""
    model = built(kind)
    if learn == "trained":
        model.fit(logged(400, CHAINS))
    state = {n: a * (5.0 if n.startswith("net") else 1.0) for n, a in model.state().items()}
    state |= {n: np.random.default_rng(0).normal(size=a.shape) for n, a in state.items() if n == "linear"}
    model.load_state(state)
    values = model.predict(np.concatenate([contexts(300), 100 * contexts(20, seed=1)]))
    assert np.isfinite(values).all()
    assert model.order.violations(values) == 0
    for a in range(len(CHAINS)):
        for b in range(len(CHAINS)):
            same = (CHAINS.model_JK[a] == CHAINS.model_JK[b]).all()
            if same and (CHAINS.count_JK[a] <= CHAINS.count_JK[b]).all():
                assert (values[:, a] <= values[:, b]).all()


def test_networks_are_monotone_before_anything_is_raised():
    """By construction, so what `raised` mends is rounding alone."""
    for kind in ("recursive", "log", "monotone"):
        model = built(kind)
        model.fit(logged(400, CHAINS))
        x = torch.from_numpy(contexts(500))
        raw = model._net(x).detach().numpy().astype(np.float64)
        np.testing.assert_allclose(model.order.raised(raw), raw, rtol=1e-5, atol=1e-7)


def test_raising_is_the_least_monotone_table_above():
    rng = np.random.default_rng(0)
    some = CHAINS.select(np.sort(rng.permutation(len(CHAINS))[:13]))  # with holes in the grid
    order = CountOrder(some)
    values = rng.normal(size=(40, 13))
    below, above = order.pairs()
    expected = values.copy()
    for a, b in zip(below, above):
        expected[:, b] = np.maximum(expected[:, b], values[:, a])
    np.testing.assert_array_equal(order.raised(values), expected)
    assert order.violations(order.raised(values)) == 0
    by_hand = np.mean([values[r, a] > values[r, b] for r in range(40) for a, b in zip(below, above)])
    assert order.violations(values) == pytest.approx(by_hand)


@pytest.mark.parametrize("kind", KINDS)
class TestEveryModel:
    def test_same_seed_same_model_and_torch_is_left_alone(self, kind):
        outcomes = logged(200, CHAINS)
        x = contexts(7, seed=9)
        torch.manual_seed(3)
        before = torch.get_rng_state()
        first, second = built(kind), built(kind)
        first.fit(outcomes)
        torch.rand(5)
        second.fit(outcomes)
        np.testing.assert_array_equal(first.predict(x), second.predict(x))
        torch.manual_seed(3)
        built(kind).fit(outcomes)
        assert torch.equal(before, torch.get_rng_state())

    def test_state_restores_predictions(self, kind):
        model, other = built(kind), built(kind, seed=5)
        model.fit(logged(200, CHAINS))
        other.load_state(model.state())
        x = contexts(7, seed=9)
        np.testing.assert_array_equal(other.predict(x), model.predict(x))
        kept = other.predict(x)
        broken = {**model.state(), "mean": np.zeros(F + 1)}
        with pytest.raises(DataError, match="mean of shape"):
            other.load_state(broken)
        np.testing.assert_array_equal(other.predict(x), kept)

    def test_alone_and_in_a_batch_are_alike(self, kind):
        model = built(kind)
        model.fit(replayed(100, CHAINS))
        x = contexts(9, seed=2)
        alone = np.concatenate([model.predict(row[None]) for row in x])
        np.testing.assert_allclose(alone, model.predict(x), rtol=1e-5, atol=1e-7)
        many = np.tile(x, (1000, 1))  # more than are seen at once
        np.testing.assert_allclose(model.predict(many), np.tile(alone, (1000, 1)), rtol=1e-5, atol=1e-7)

    def test_scale_of_rewards_is_the_scale_of_values(self, kind):
        outcomes = logged(200, CHAINS)
        large = replace(outcomes, rewards_RJ=outcomes.rewards_RJ * 1024)  # a power of two: no rounding
        one, other = built(kind), built(kind)
        one.fit(outcomes)
        other.fit(large)
        x = contexts(20, seed=2)
        np.testing.assert_allclose(other.predict(x), one.predict(x) * 1024, rtol=1e-6)

    def test_learns_the_funnel_from_whole_rows(self, kind):
        """Better than the mean row, which looks at no request, by far."""
        model = built(kind, epochs=25, lr=0.01, batch_size=64)
        model.fit(replayed(600, CHAINS))
        x = contexts(500, seed=11)
        truth = true_rewards(x, CHAINS)
        error = ((model.predict(x) - truth) ** 2).mean()
        blind = ((truth.mean(0) - truth) ** 2).mean()
        assert error < {"linear": 0.6}.get(kind, 0.2) * blind


def test_ridge_is_least_squares_where_there_is_plenty():
    """A linear world is found again, from drawn chains with uneven chances."""
    rng = np.random.default_rng(0)
    chance = rng.dirichlet(np.full(len(CHAINS), 5.0))
    outcomes = logged(12_000, CHAINS, chance_J=chance)
    weights = np.sort(rng.random((F + 1, len(CHAINS))), axis=1)
    weights[0] += 20  # rewards are not negative
    plane = np.concatenate([np.ones((12_000, 1)), outcomes.contexts_RF], 1) @ weights
    model = built("linear")
    model.fit(replace(outcomes, rewards_RJ=np.where(np.isnan(outcomes.rewards_RJ), np.nan, plane)))
    x = contexts(50, seed=4)
    expected = np.concatenate([np.ones((50, 1)), x], 1) @ weights
    np.testing.assert_allclose(model.predict(x), model.order.raised(expected), rtol=0.01)


def test_propensities_undo_uneven_exploration():
    """Newcomers, worth less here, are mostly sent to chain 0: weighed means are those of even chances, plain ones are not."""
    rng = np.random.default_rng(1)
    x = contexts(40_000, new_share=0.5)
    is_new = x[:, 1] < 0
    chance = np.where(is_new[:, None], [0.9, 0.1], [0.1, 0.9])
    chain = (rng.random(len(x)) >= chance[:, 0]).astype(int)
    worth = np.where(is_new, 1.0, 3.0)[:, None] * np.array([1.0, 1.5])
    rewards = np.full(worth.shape, np.nan)
    rewards[np.arange(len(x)), chain] = worth[np.arange(len(x)), chain]
    outcomes = replace(replayed(len(x), CHAINS), contexts_RF=x, rewards_RJ=rewards, propensity_RJ=chance)
    np.testing.assert_allclose(mean_rewards(outcomes, 2), worth.mean(0), rtol=0.02)
    assert abs(np.nanmean(rewards[:, 0]) - worth[:, 0].mean()) > 0.5
    assert known_weights(outcomes)[~np.isnan(rewards)].mean() == pytest.approx(1)
    assert known_weights(outcomes, most=2.0).max() < known_weights(outcomes).max()
    with pytest.raises(DataError, match="3 chains"):
        mean_rewards(outcomes, 3)


def test_no_user_is_on_both_sides_of_the_validating_split():
    users = np.random.default_rng(0).integers(0, 40, 500)
    valid_R = _validating(users, RewardConfig(valid_share=0.25))
    assert not set(users[valid_R]) & set(users[~valid_R])
    assert len(set(users[valid_R])) == 10
    assert _validating(np.array([7, 7, 9]), RewardConfig(valid_share=0.01)).sum() in (1, 2)
    assert (_validating(users, RewardConfig(seed=1)) != valid_R).any()


def test_recursive_beats_one_basis_where_stages_bind_in_turn():
    """A planted world of the recursive kind whose curves no logarithm fits: smaller error, and no more violations than the truth: none."""
    counts = [(a, b) for a in (10, 20, 40, 80, 160, 320) for b in (5, 10, 20, 40, 80, 160) if b <= a]
    chains = ChainSet(
        names=tuple(f"{a}/{b}" for a, b in counts),
        stages=("retrieval", "ranking"),
        model_JK=np.zeros((len(counts), 2), dtype=np.int64),
        count_JK=np.array(counts),
        costs_JC=np.array([[a + b, a + b] for a, b in counts], dtype=float),
    )
    x = np.random.default_rng(0).normal(size=(900, 2)).astype(np.float32)
    first = 1 - np.exp(-chains.count_JK[:, 0] / (15 * np.exp(x[:, :1])))
    second = 0.7 * chains.count_JK[:, 1] / 160 + 0.3 * (1 - np.exp(-chains.count_JK[:, 1] / (8 * np.exp(x[:, 1:]))))
    truth = 4 * first * second
    outcomes = replace(replayed(900, chains), contexts_RF=x, rewards_RJ=truth)
    past, new = outcomes.select(np.arange(600)), outcomes.select(np.arange(600, 900))
    error = {}
    for kind in ("recursive", "log"):
        model = RewardModel(kind, RewardConfig(dim=16, epochs=25, lr=0.01, batch_size=64), chains, 2)
        model.fit(past)
        values = model.predict(new.contexts_RF)
        assert model.order.violations(values) == 0
        error[kind] = float(((values - new.rewards_RJ) ** 2).mean())
    assert error["recursive"] < 0.5 * error["log"], error


def test_poisson_also_aims_at_the_mean():
    model = built("recursive", loss="poisson", epochs=25, lr=0.01, batch_size=64)
    model.fit(replayed(400, CHAINS))
    x = contexts(2000, seed=3)
    assert model.predict(x).mean() == pytest.approx(true_rewards(x, CHAINS).mean(), rel=0.1)


def test_bad_outcomes_and_settings_are_refused_by_name():
    good = replayed(10, CHAINS)
    model = built("linear")
    bad = {
        "rewards .* are needed": replace(good, rewards_RJ=good.rewards_RJ[:, 1:]),
        "NaN or infinities": replace(good, contexts_RF=good.contexts_RF * np.float32(np.nan)),
        "0 or above": replace(good, rewards_RJ=-good.rewards_RJ),
        "no reward": replace(good, rewards_RJ=good.rewards_RJ * np.nan),
        "propensity": replace(good, propensity_RJ=np.zeros_like(good.rewards_RJ)),
        "users who validate": replace(good, rewards_RJ=np.where(good.users_R[:, None] == 0, good.rewards_RJ, np.nan)),
        "two users": replace(good, users_R=np.zeros(10, dtype=np.int64)),
    }
    for message, outcomes in bad.items():
        with pytest.raises(DataError, match=message):
            model.fit(outcomes)
    with pytest.raises(DataError, match="3 features"):
        model.predict(np.zeros((2, 4), dtype=np.float32))
    for settings in ({"dim": 0}, {"valid_share": 1.0}, {"lr": 0.0}, {"most_weight": 0.5}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            RewardConfig(**settings)
    with pytest.raises(ConfigError, match="recursive"):
        RewardModel("recursiv", RewardConfig(), CHAINS, F)
    assert len(BASES) == 6


def test_trust_is_the_slope_of_what_came_true_on_what_was_predicted():
    rng = np.random.default_rng(0)
    own = rng.standard_normal((4_000, 3))
    centred = own - own.mean(1, keepdims=True)
    rewards = (
        np.array([1.0, 2.0, 5.0])
        + 0.4 * centred
        + rng.standard_normal((4_000, 1))
        + 0.1 * rng.standard_normal(own.shape)
    )
    valid, weights = np.arange(4_000) >= 2_000, np.ones(own.shape)
    assert trust(own, rewards, weights, valid) == pytest.approx(0.4, abs=0.02)
    assert trust(-own, rewards, weights, valid) == 0.0  # what came out the other way round is not believed
    assert trust(0.1 * own, rewards, weights, valid) == 1.0  # nor is anything believed more than it says
    alone = np.zeros(own.shape)
    alone[:, 0] = 1.0
    assert trust(own, rewards, alone, valid) == 1.0  # no request knows two chains: nothing can be said


def test_a_model_that_found_nothing_treats_all_requests_alike():
    outcomes = replayed(600, CHAINS, seed=5)
    shuffled = replace(outcomes, contexts_RF=outcomes.contexts_RF[np.random.default_rng(1).permutation(600)])
    spread = {}
    for name, past in (("true", outcomes), ("shuffled", shuffled)):
        model = built("recursive", epochs=30)
        model.fit(past)
        values = model.predict(contexts(200, seed=6))
        spread[name] = (values - values.mean(1, keepdims=True)).std(0).mean()
        assert model.order.violations(values) == 0.0
    assert spread["shuffled"] < 0.2 * spread["true"]
