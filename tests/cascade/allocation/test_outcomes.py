"""What chains bring: pages judged by hand and by scikit-learn, replays against single runs, pruning against a plain loop."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import dcg_score

from allocation_support import offering_run
from engine_support import raising
from shortlist.cascade.allocation.base import ChainSet, Outcomes
from shortlist.cascade.allocation.contexts import CONTEXT_NAMES, Contexts, popularity
from shortlist.cascade.allocation.outcomes import (
    best_within,
    dominated,
    page_worth,
    pages_differ,
    prune,
    replay,
    split_parts,
)
from shortlist.cascade.lessons import make_batch
from shortlist.data.histories import Requests
from shortlist.errors import DataError


@pytest.fixture(scope="module")
def run():
    return offering_run()


@pytest.fixture(scope="module")
def contexts(run):
    batch = make_batch(run.dataset, run.dataset.split.valid, 500)
    popularity_N = popularity(run.dataset.histories.item, run.dataset.num_items)
    return Contexts.measured([batch], popularity_N, has_clock=True)


def asked(targets, values=None, users=None, times=None):
    """Requests of which only the targets matter."""
    n, sizes = len(targets), [len(t) for t in targets]
    zeros = np.zeros(n, dtype=np.int64)
    flat = np.array([x for t in targets for x in t], dtype=np.int64)
    return Requests(
        user=zeros if users is None else np.array(users),
        time=zeros if times is None else np.array(times),
        start=zeros,
        end=zeros,
        target_offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        target=flat,
        target_value=np.ones(len(flat), np.float32) if values is None else np.array(values, dtype=np.float32),
    )


# -- worth ------------------------------------------------------------------------------------------------------------


def test_worth_of_pages_by_hand():
    rows_Bk = np.array([[7, 3, 9], [1, 2, 0], [5, 6, 7]])
    requests = asked([[3, 9, 4], [8], [5]], values=[10.0, 2.5, 100.0, 3.0, 6.0])
    found = page_worth(rows_Bk, requests, 3, "choice")
    np.testing.assert_allclose(found, [1 / np.log2(3) + 1 / np.log2(4), 0, 1])
    np.testing.assert_allclose(page_worth(rows_Bk, requests, 3, "value"), [12.5, 0, 6])
    np.testing.assert_allclose(page_worth(rows_Bk, requests, 2, "choice"), [1 / np.log2(3), 0, 1])
    np.testing.assert_allclose(page_worth(rows_Bk, requests, 2, "value"), [10, 0, 6])


def test_choice_is_the_gain_that_scikit_learn_finds():
    rng = np.random.default_rng(0)
    targets = [np.sort(rng.choice(np.arange(1, 21), rng.integers(1, 6), replace=False)).tolist() for _ in range(30)]
    rows_Bk = np.stack([rng.permutation(np.arange(1, 21))[:10] for _ in range(30)])
    hit_Bk = np.array([[row in chosen for row in page] for page, chosen in zip(rows_Bk.tolist(), targets)])
    expected = [dcg_score([hit_k.astype(float)], [np.arange(10, 0, -1)]) for hit_k in hit_Bk]
    np.testing.assert_allclose(page_worth(rows_Bk, asked(targets), 10, "choice"), expected)


# -- replay -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("worth", ["choice", "value"])
def test_a_replay_is_every_chain_on_every_request(run, contexts, worth):
    chains, requests = list(run.config.chains()), run.dataset.split.valid.select(np.arange(12))
    told = []
    outcomes = replay(
        run.cascade,
        run.dataset,
        requests,
        chains,
        worth=worth,
        contexts=contexts,
        tell=lambda *done: told.append(done),
    )
    assert told[-1] == ("replaying", 12, 12)
    assert outcomes.rewards_RJ.shape == (12, 6)
    for r in range(12):
        one = requests.select(np.array([r]))
        batch = make_batch(run.dataset, one, run.cascade.max_history)
        np.testing.assert_array_equal(outcomes.contexts_RF[r], contexts(batch)[0])
        for j, chain in enumerate(chains):
            page = run.cascade.run(batch, chain=chain).rows.numpy()
            assert outcomes.rewards_RJ[r, j] == page_worth(page, one, 4, worth)[0]
    np.testing.assert_array_equal(outcomes.users_R, requests.user)
    np.testing.assert_array_equal(outcomes.times_R, requests.time)
    assert outcomes.propensity_RJ is None
    assert 0 < pages_differ(outcomes) <= 1


def test_chains_that_know_the_ring_bring_more(run, contexts):
    chains = list(run.config.chains())
    outcomes = replay(run.cascade, run.dataset, run.dataset.split.valid, chains, contexts=contexts)
    worth = dict(zip([chain.name for chain in chains], outcomes.rewards_RJ.mean(0).tolist()))
    assert worth["a0-b0-c0"] > 2 * worth["a0-b1-c0"]
    assert worth["a0-b0-c0"] > worth["a2-b0-c0"]


def test_a_replay_goes_chunk_by_chunk(run, contexts, monkeypatch):
    chains, requests = list(run.config.chains()), run.dataset.split.valid
    whole = replay(run.cascade, run.dataset, requests, chains, contexts=contexts)
    monkeypatch.setattr("shortlist.cascade.lessons.CHUNK", 7)
    parts = replay(run.cascade, run.dataset, requests, chains, contexts=contexts)
    np.testing.assert_array_equal(parts.rewards_RJ, whole.rewards_RJ)
    np.testing.assert_array_equal(parts.contexts_RF, whole.contexts_RF)


def test_what_is_held_out_reaches_no_feature(run, contexts):
    requests = run.dataset.split.valid
    moved = replace(requests, target=requests.target[::-1].copy(), target_value=requests.target_value[::-1] * 7)
    chains = list(run.config.chains())[:1]
    one, other = (replay(run.cascade, run.dataset, part, chains, contexts=contexts) for part in (requests, moved))
    np.testing.assert_array_equal(one.contexts_RF, other.contexts_RF)
    assert one.contexts_RF.shape[1] == len(CONTEXT_NAMES)


def test_a_stage_that_fails_stops_the_replay(contexts):
    other = offering_run()
    object.__setattr__(other.cascade.systems["counts"], "score_all", raising)
    with pytest.raises(DataError, match="stage retrieval does not work: counts failed"):
        replay(other.cascade, other.dataset, other.dataset.split.valid, list(other.config.chains()), contexts=contexts)


# -- pruning ----------------------------------------------------------------------------------------------------------


def chain_set(costs):
    costs_JC = np.array(costs, dtype=float)
    J = len(costs_JC)
    numbers = np.arange(J)[:, None]
    return ChainSet(
        names=tuple(f"a{j}" for j in range(J)),
        stages=("retrieval",),
        model_JK=0 * numbers,
        count_JK=numbers,
        costs_JC=costs_JC,
    )


def rewarded(worth, R=4):
    rewards_RJ = np.tile(np.array(worth, dtype=float), (R, 1))
    none = np.zeros(R, dtype=np.int64)
    return Outcomes(contexts_RF=np.zeros((R, 2), np.float32), rewards_RJ=rewards_RJ, users_R=none, times_R=none)


@pytest.mark.parametrize("seed", range(10))
def test_dominated_is_what_a_plain_loop_finds(seed):
    rng = np.random.default_rng(seed)
    costs_JC, worth_J = rng.integers(0, 5, (25, 2)).astype(float), rng.integers(0, 6, 25).astype(float)
    expected = []
    for j in range(25):
        others = [i for i in range(25) if i != j and (costs_JC[i] <= costs_JC[j]).all() and worth_J[i] >= worth_J[j]]
        equal = [i for i in others if (costs_JC[i] == costs_JC[j]).all() and worth_J[i] == worth_J[j]]
        expected.append(any(i not in equal or i < j for i in others))
    assert dominated(costs_JC, worth_J).tolist() == expected


def test_pruning_leaves_the_frontier():
    chains = chain_set([[9, 1], [5, 2], [5, 3], [6, 4], [2, 5], [9, 6]])
    outcomes = rewarded([0.1, 0.5, 0.4, 0.6, 0.3, 0.6])
    outcomes.rewards_RJ[:, 5] += [0.1, -0.1, 0.1, -0.1]
    # 2 costs more time than 1 and brings less; 5 brings what 3 does; 4 brings less but needs the fewest FLOPs.
    assert prune(chains, outcomes, least=1).tolist() == [0, 1, 3, 4]
    assert prune(chains, outcomes, resources=[1], least=1).tolist() == [0, 1, 3]
    # When five are wanted, 5 loses nothing against 3 and comes back before 2, which loses 0.1.
    assert prune(chains, outcomes, least=5).tolist() == [0, 1, 3, 4, 5]
    assert prune(chains, outcomes, least=99).tolist() == [0, 1, 2, 3, 4, 5]


def test_twins_do_not_come_back():
    """A chain that costs more and brings the same to every request can help nobody."""
    chains = chain_set([[1, 1], [2, 2], [3, 3], [4, 4]])
    outcomes = rewarded([0.1, 0.5, 0.5, 0.4])
    assert prune(chains, outcomes, least=1).tolist() == [0, 1]
    assert prune(chains, outcomes, least=4).tolist() == [0, 1, 3]
    outcomes.rewards_RJ[:, 2] += [0.2, -0.2, 0, 0]  # the same on average, better for some
    assert prune(chains, outcomes, least=3).tolist() == [0, 1, 2]


def test_the_cheapest_chain_stays_and_untried_ones_do_not_disturb():
    chains = chain_set([[1, 1], [1, 1], [2, 2]])
    outcomes = rewarded([0.0, 0.5, 0.7])
    outcomes.rewards_RJ[0] = np.nan
    outcomes.rewards_RJ[1, 2] = np.nan
    assert prune(chains, outcomes, least=1).tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="without requests"):
        prune(chains, outcomes.select(np.arange(0)))


def test_the_best_single_chain_within_limits():
    chains, outcomes = chain_set([[1, 1], [5, 2], [3, 4]]), rewarded([0.1, 0.5, 0.9])
    assert best_within(chains, outcomes, np.array([np.inf, np.inf])) == 2
    assert best_within(chains, outcomes, np.array([np.inf, 3.0])) == 1
    assert best_within(chains, outcomes, np.array([2.0, 3.0])) == 0
    assert best_within(chains, outcomes, np.array([0.5, 0.5])) == 0


# -- parts ------------------------------------------------------------------------------------------------------------


def test_parts_are_of_other_people_and_later():
    rng = np.random.default_rng(0)
    requests = asked([[1]] * 900, users=rng.integers(1, 90, 900), times=rng.permutation(900))
    first, second = split_parts(requests, by_time=True)
    assert not set(requests.user[first]) & set(requests.user[second])
    assert requests.time[first].max() < requests.time[second].min()
    assert len(first) == pytest.approx(400, abs=60)
    assert len(second) == pytest.approx(100, abs=40)
    again = split_parts(requests, by_time=True)
    assert (again[0] == first).all()
    assert (again[1] == second).all()
    assert set(split_parts(requests, by_time=True, seed=1)[0]) != set(first)


def test_without_times_users_alone_decide():
    requests = asked([[1]] * 30, users=np.repeat(np.arange(10), 3), times=np.arange(30))
    first, second = split_parts(requests, by_time=False)
    assert sorted([*first, *second]) == list(range(30))
    assert len(set(requests.user[first])) == 7
    frozen = replace(requests, time=np.zeros(30, dtype=np.int64))
    assert [part.tolist() for part in split_parts(frozen, by_time=True)] == [first.tolist(), second.tolist()]
    two = requests.select(np.array([0, 29]))
    assert sorted(len(part) for part in split_parts(two, by_time=True)) == [1, 1]


def test_one_person_is_too_few():
    with pytest.raises(DataError, match="at least two people, the window has 3 of 1"):
        split_parts(asked([[1]] * 3, users=[4, 4, 4]), by_time=False)
