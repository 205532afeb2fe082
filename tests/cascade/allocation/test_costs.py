"""Costs of chains: counts, FLOPs, time by a clock of the test's own, monotone fits against the bound that no fit can pass."""

import contextlib
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from allocation_support import offering_run
from engine_support import raising
from shortlist.cascade.allocation import costs
from shortlist.cascade.allocation.costs import (
    BATCH,
    PASSES,
    ChainCosts,
    chain_set,
    count_flops,
    describe,
    machine,
    measure_costs,
    monotone,
    one_thread,
    rank_correlation,
    time_chains,
)
from shortlist.cascade.config import RunConfig
from shortlist.cascade.lessons import make_batch
from shortlist.cascade.meter import Meter
from shortlist.errors import DataError

FUNNEL = """
[surface]
k = 10
[stages.retrieval]
systems = ["counts", "popularity"]
keep = 200
offers = [{keep = 50}, {systems = ["popularity"], keep = 100}]
[stages.pre-ranking]
systems = ["counts"]
keep = 40
offers = [{keep = 20}, {systems = ["popularity"], keep = 20}]
[stages.ranking]
systems = ["popularity"]
"""


@pytest.fixture(scope="module")
def run():
    return offering_run()


@pytest.fixture
def chains(run):
    return list(run.config.chains())


# -- numbers of chains ------------------------------------------------------------------------------------------------


def test_a_stage_scores_what_the_one_before_lets_through():
    config = RunConfig.from_toml(FUNNEL)
    chains = [config.chain(name) for name in ("a0-b0-c0", "a1-b1-c0", "a2-b2-c0")]
    model_JK, count_JK = describe(config, 1000, chains)
    assert model_JK.tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 0]]
    assert count_JK.tolist() == [[200, 200, 40], [50, 50, 20], [100, 100, 20]]
    _, few_JK = describe(config, 60, chains)
    assert few_JK.tolist() == [[60, 60, 40], [50, 50, 20], [60, 60, 20]]


def test_counts_are_what_the_stages_report(run, chains):
    batch = make_batch(run.dataset, run.dataset.split.valid, run.cascade.max_history)
    _, count_JK = describe(run.config, run.dataset.num_items, chains)
    for j, chain in enumerate(chains):
        page = run.cascade.run(batch, chain=chain)
        received = [trace.num_received.max().item() for trace in page.traces[1:]]
        assert received == count_JK[j, 1:].tolist()
        assert page.traces[0].rows.lengths.max() == count_JK[j, 0]


def test_flops_are_what_the_meter_says(run, chains):
    valid = run.dataset.split.valid
    batches = [make_batch(run.dataset, valid.select(part), 500) for part in np.array_split(np.arange(len(valid)), 3)]
    meter = Meter()
    for batch in batches:
        for chain in chains:
            page = run.cascade.run(batch, chain=chain)
            meter.add(page.chain, page.reports)
    metered = {total.chain: total.spent_mflop / total.num_requests for total in meter.summary().chains}
    found_J = count_flops(run.cascade, batches, chains)
    np.testing.assert_allclose(found_J, [metered[chain.name] for chain in chains], rtol=1e-12)
    assert len(set(found_J.tolist())) > 2


# -- time -------------------------------------------------------------------------------------------------------------


class Clock:
    """Stands in for the clock and for the cascade: a chain takes `costs[name]`, and now and then much longer."""

    def __init__(self, monkeypatch, seconds, spike_every=0):
        self.now, self.seconds, self.calls, self.spike_every = 0.0, seconds, [], spike_every
        monkeypatch.setattr(costs.time, "perf_counter", lambda: self.now)

    def run(self, batch, chain):
        self.calls.append(chain.name)
        self.now += self.seconds[chain.name] * batch.size
        if self.spike_every and len(self.calls) % self.spike_every == 0:
            self.now += 100.0


def test_chains_are_timed_in_turns_and_spikes_count_for_none(run, chains, monkeypatch):
    clock = Clock(monkeypatch, {chain.name: 0.002 * (j + 1) for j, chain in enumerate(chains)}, spike_every=23)
    batches = [make_batch(run.dataset, run.dataset.split.valid.select(np.arange(n)), 500) for n in (1, 4, 3)]
    told = []
    ms_TJ = time_chains(clock, batches, chains, np.random.default_rng(0), lambda *done: told.append(done))
    np.testing.assert_allclose(ms_TJ, np.tile(2.0 * np.arange(1, len(chains) + 1), (3, 1)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    passes = np.array(clock.calls[len(chains) :]).reshape(-1, len(chains))
    assert len(passes) == 3 * PASSES
    assert all(sorted(one) == sorted(chain.name for chain in chains) for one in passes)
    assert any(a.tolist() != b.tolist() for a, b in pairwise(passes)), "the order should change"


def test_measured_costs_of_a_run(run, chains):
    before = torch.get_num_threads()
    told = []
    found = measure_costs(
        run.cascade,
        run.dataset,
        run.dataset.split.valid,
        chains,
        num_alone=4,
        num_batches=2,
        tell=lambda what, done, of: told.append((what, done, of)),
    )
    assert torch.get_num_threads() == before
    assert found.names == tuple(chain.name for chain in chains)
    assert found.num_requests == 4 + 2 * BATCH
    for column in (found.mflop_J, found.alone_J, found.batched_J):
        assert column.shape == (len(chains),)
        assert (column > 0).all()
    assert (found.batched_J < found.alone_J).all(), "a batch shares what each call costs"
    place = {name: j for j, name in enumerate(found.names)}
    assert found.alone_J[place["a1-b0-c0"]] <= found.alone_J[place["a0-b0-c0"]]
    assert found.mflop_J[place["a1-b1-c0"]] < found.mflop_J[place["a0-b1-c0"]]
    assert {what for what, *_ in told} == {"timing single requests", "timing batches"}
    assert set(found.agreement) == {"mflop_alone", "again_alone", "mflop_batched", "again_batched"}
    assert json.loads(json.dumps(found.as_dict()))["machine"] == machine() | {"load": found.machine["load"]}


def test_few_requests_make_one_small_batch_and_none_are_refused(run, chains):
    few = run.dataset.split.valid.select(np.arange(3))
    found = measure_costs(run.cascade, run.dataset, few, chains[:2], num_alone=5, num_batches=2)
    assert found.num_requests == 3 + 3
    with pytest.raises(DataError, match="no request to measure costs on"):
        measure_costs(run.cascade, run.dataset, few.select(np.arange(0)), chains)


def test_a_stage_that_fails_is_named(chains):
    other = offering_run()
    object.__setattr__(other.cascade.systems["mmr"], "rerank", raising)
    with pytest.raises(DataError, match=r"stage re-ranking does not work: mmr failed \(RuntimeError: out of order\)"):
        measure_costs(other.cascade, other.dataset, other.dataset.split.valid, chains)


def test_one_thread_comes_back_after_a_failure():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with contextlib.suppress(ValueError), one_thread():
        assert torch.get_num_threads() == 1
        raise ValueError
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


# -- fits -------------------------------------------------------------------------------------------------------------


def test_a_case_by_hand():
    one = np.zeros((4, 1), dtype=np.int64)
    count_JK = np.array([[10], [20], [30], [40]])
    np.testing.assert_allclose(monotone(np.array([1.0, 3.0, 2.0, 5.0]), one, count_JK), [1, 2.5, 2.5, 5])
    other = np.array([[0], [0], [1], [1]])  # chains of other systems are not compared
    np.testing.assert_allclose(monotone(np.array([1.0, 3.0, 2.0, 5.0]), other, count_JK), [1, 3, 2, 5])


@pytest.mark.parametrize("seed", range(20))
def test_no_monotone_costs_lie_nearer(seed):
    """Of a pair in the wrong order one must move by half of their distance: the fit moves none by more than the worst pair asks."""
    rng = np.random.default_rng(seed)
    model_JK, count_JK = rng.integers(0, 2, (30, 2)), rng.integers(1, 4, (30, 2))
    cost_J = rng.lognormal(size=30)
    fitted_J = monotone(cost_J, model_JK, count_JK)
    worst = 0.0
    for i in range(30):
        for j in range(30):
            if (model_JK[i] == model_JK[j]).all() and (count_JK[i] <= count_JK[j]).all():
                assert fitted_J[i] <= fitted_J[j] + 1e-12
                worst = max(worst, (cost_J[i] - cost_J[j]) / 2)
    assert np.abs(fitted_J - cost_J).max() == pytest.approx(worst)
    np.testing.assert_allclose(monotone(fitted_J, model_JK, count_JK), fitted_J)


def test_rank_correlation_is_spearman_s():
    rng = np.random.default_rng(0)
    for _ in range(10):
        a_J, b_J = rng.integers(0, 6, 25).astype(float), rng.normal(size=25)
        assert rank_correlation(a_J, b_J) == pytest.approx(spearmanr(a_J, b_J).statistic)
    assert np.isnan(rank_correlation(np.ones(3), np.arange(3.0)))


def test_the_set_comes_by_rising_time(run, chains):
    J = len(chains)
    alone_J, batched_J = np.array([5.0, 3, 4, 1, 2, 2]), np.arange(J, dtype=float) + 0.5
    found = ChainCosts(
        names=tuple(chain.name for chain in chains),
        mflop_J=np.array([9.0, 8, 7, 6, 5, 4]),
        alone_J=alone_J,
        batched_J=batched_J,
        measured_alone_J=alone_J,
        measured_batched_J=batched_J,
        agreement={},
        num_requests=1,
        machine={},
    )
    by_alone, order_J = chain_set(run.config, run.dataset.num_items, chains, found)
    assert order_J.tolist() == [3, 5, 4, 1, 2, 0]  # equals by FLOPs
    assert by_alone.names == tuple(found.names[j] for j in order_J)
    assert by_alone.costs_JC.tolist() == [[6, 1], [4, 2], [5, 2], [8, 3], [7, 4], [9, 5]]
    assert by_alone.stages == ("retrieval", "ranking", "re-ranking")
    by_batch, order_J = chain_set(run.config, run.dataset.num_items, chains, found, measured="batched")
    assert order_J.tolist() == list(range(J))
    np.testing.assert_array_equal(by_batch.costs_JC[:, 1], batched_J)
