"""Quality against cost on a world where it is known who needs the dear chain."""

import numpy as np
import pytest

from shortlist.cascade.allocation.base import ChainSet, Outcomes
from shortlist.cascade.allocation.contexts import CONTEXT_NAMES
from shortlist.errors import ConfigError, DataError
from shortlist.evaluation.frontier import frontier

F = len(CONTEXT_NAMES)
COSTS = np.array([1.0, 2.0, 4.0])


def chain_set():
    return ChainSet(
        names=("a0-b0", "a0-b1", "a0-b2"),
        stages=("retrieval", "ranking"),
        model_JK=np.zeros((3, 2), dtype=np.int64),
        count_JK=np.array([[10, 10], [10, 20], [10, 40]]),
        costs_JC=np.stack([COSTS, COSTS], 1),
    )


def outcomes(num_requests, seed):
    """One request in four, told by the last feature, gains from the dear chain: 1, 2, 4; all others get 1 whatever they have."""
    rng = np.random.default_rng(seed)
    contexts = rng.standard_normal((num_requests, F)).astype(np.float32)
    gains = np.arange(num_requests) % 4 == 0
    contexts[:, -1] = np.where(gains, 1.0, -1.0)
    contexts[:, CONTEXT_NAMES.index("has history")] = 1.0
    return Outcomes(
        contexts_RF=contexts,
        rewards_RJ=np.where(gains[:, None], [[1.0, 2.0, 4.0]], 1.0),
        users_R=np.arange(num_requests),
        times_R=np.zeros(num_requests, dtype=np.int64),
    )


@pytest.fixture(scope="module")
def found():
    return frontier(
        chain_set(),
        outcomes(800, 0),
        outcomes(400, 1),
        outcomes(400, 2),
        default=2,
        budgets=[1.75],
        settings={"greenflow": {"explore": 0.0}, "dcaf": {"explore": 0.0}},
    )


def point(found, arm):
    (one,) = found.of(arm)
    return one


def test_the_oracle_buys_the_dear_chain_for_those_who_gain(found):
    best = point(found, "oracle")
    assert best.costs_C[1] == pytest.approx(1.75)  # a quarter at 4, the others at 1
    assert best.worth.mean == pytest.approx(1.75)
    assert best.of_oracle == pytest.approx(1.0)


def test_the_mixture_is_the_closed_form(found):
    mixture = point(found, "mixture")
    # A quarter of the way from (1, 1) to (4, 1.75).
    assert mixture.costs_C[1] == pytest.approx(1.75)
    assert mixture.worth.mean == pytest.approx(1 + 0.75 * 0.25)
    assert mixture.gain.difference == pytest.approx(0.0, abs=1e-9)
    assert point(found, "oracle").gain.difference == pytest.approx(1.75 - 1.1875)


def test_an_allocator_that_sees_who_gains_comes_near_the_oracle(found):
    for arm in ("greenflow", "dcaf"):
        learned = point(found, arm)
        assert learned.costs_C[1] <= 1.75 * 1.02
        assert learned.of_oracle > 0.8, arm
        assert learned.gain.low > 0, arm


def test_saving_is_read_off_the_arm_s_own_curve(found):
    # The default chain brings 1.75 for 4; the oracle the same for 1.75.
    assert found.saving("oracle") == pytest.approx(1 - 1.75 / 4)
    assert np.isnan(found.saving("mixture"))
    assert found.as_dict()["savings"]["ms"]["mixture"] is None


def test_an_arm_is_compared_at_the_cost_that_it_really_had():
    # A fixed chain can not spend 1.75: the best that fits costs 1, and is compared with a mixture that costs 1.
    found = frontier(
        chain_set(), outcomes(80, 0), outcomes(40, 1), outcomes(40, 2), default=2, budgets=[1.75], arms=("fixed",)
    )
    assert point(found, "fixed").costs_C[1] == 1.0
    assert point(found, "fixed").gain.difference == pytest.approx(0.0, abs=1e-9)


def test_what_can_not_be_judged_is_refused():
    parts = outcomes(80, 0), outcomes(40, 1), outcomes(40, 2)
    with pytest.raises(ConfigError, match="resource must be one of"):
        frontier(chain_set(), *parts, default=0, resource="watts")
    with pytest.raises(DataError, match="at least two people"):
        frontier(chain_set(), *parts[:2], parts[2].select(np.array([0])), default=0)
