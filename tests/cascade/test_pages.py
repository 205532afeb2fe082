"""Pages of many chains at once: each is what `run` makes, and common beginnings are done once."""

import numpy as np
import pytest
import torch

from shortlist.data.jagged import Jagged
from shortlist.errors import ConfigError
from support import NUM_ITEMS, planted_batch

OFFERING = """
[surface]
k = 5
[stages.retrieval]
systems = ["tiny-counting", "tiny-closed-form"]
keep = 15
offers = [{keep = 10}, {systems = ["tiny-trie"], keep = 15}]
[stages.pre-ranking]
systems = ["tiny-closed-form"]
keep = 10
offers = [{systems = ["tiny-graph"], keep = 8}, {systems = ["tiny-closed-form", "tiny-graph"], keep = 6}]
[stages.ranking]
systems = ["tiny-pairs"]
keep = 8
offers = [{systems = ["tiny-graph"], keep = 6}, {systems = ["tiny-pairs", "tiny-graph"], keep = 5}]
[stages.re-ranking]
systems = ["tiny-reverse"]
offers = [{systems = ["tiny-graph"]}]
"""


@pytest.fixture
def cascade(make_cascade):
    return make_cascade(OFFERING)


def same(one: Jagged, other: Jagged) -> bool:
    return torch.equal(one.values, other.values) and torch.equal(one.offsets, other.offsets)


def assert_equal(found, expected):
    """Everything but the time is the same, to the last bit."""
    assert found.chain == expected.chain
    assert torch.equal(found.rows, expected.rows)
    assert torch.equal(found.scores, expected.scores)
    for mine, theirs in zip(found.traces, expected.traces, strict=True):
        assert (mine.name, mine.systems, mine.flops) == (theirs.name, theirs.systems, theirs.flops)
        assert same(mine.rows, theirs.rows)
        assert torch.equal(mine.scores, theirs.scores)
        assert torch.equal(mine.num_received, theirs.num_received)
        assert mine.system_scores.keys() == theirs.system_scores.keys()
        assert all(torch.equal(mine.system_scores[name], theirs.system_scores[name]) for name in mine.system_scores)
        assert not mine.problems
        assert not theirs.problems


@pytest.mark.parametrize("k", [None, 3, 12])
def test_each_page_is_that_of_run(cascade, k):
    batch = planted_batch()
    chains = [chain.name for chain in cascade.config.chains()]
    assert len(chains) > 30
    found = {chain.name: page for chain, page in cascade.pages(batch, chains, k=k)}
    assert sorted(found) == sorted(chains)
    for chain in chains:
        assert_equal(found[chain], cascade.run(batch, k=k, chain=chain))
    assert len({page.rows.numpy().tobytes() for page in found.values()}) > 5, "chains should differ"


def test_what_is_closed_is_closed_for_all_chains(cascade):
    batch = planted_batch()
    allowed = torch.ones(NUM_ITEMS + 1, dtype=torch.bool)
    allowed[1::3] = False
    for chain, page in cascade.pages(batch, list(cascade.config.chains()), allowed=allowed):
        assert not np.isin(page.rows, np.arange(1, NUM_ITEMS + 1, 3)).any()
        assert_equal(page, cascade.run(batch, chain=chain, allowed=allowed))


def test_common_beginnings_are_done_once(cascade, monkeypatch):
    asked = []
    stage = type(cascade)._stage

    def counting(self, funnel, number, action, keep, *rest, **given):
        asked.append((number, action.systems, keep))
        return stage(self, funnel, number, action, keep, *rest, **given)

    monkeypatch.setattr(type(cascade), "_stage", counting)
    chains = list(cascade.config.chains())
    list(cascade.pages(planted_batch(), chains))
    beginnings = {
        tuple((action.systems, action.keep or 5) for action in chain.actions[: n + 1])
        for chain in chains
        for n in range(len(chain.actions))
    }
    assert len(asked) == len(beginnings) < 4 * len(chains)
    assert len([number for number, *_ in asked if number == 0]) == 3


def test_the_order_is_that_of_the_tree_and_chains_may_come_twice(cascade):
    names = ["a0-b0-c0-d0", "a2-b1-c1-d0", "a0-b0-c1-d0", "a0-b0-c0-d0"]
    found = [chain.name for chain, _ in cascade.pages(planted_batch(), names)]
    assert found == ["a0-b0-c0-d0", "a0-b0-c0-d0", "a0-b0-c1-d0", "a2-b1-c1-d0"]


def test_bad_questions_are_refused(cascade):
    batch = planted_batch()
    with pytest.raises(ConfigError, match="k must be"):
        next(cascade.pages(batch, ["a0-b0-c0-d0"], k=0))
    with pytest.raises(ConfigError, match="no chain"):
        next(cascade.pages(batch, ["a0-b9-c0-d0"]))
    assert list(cascade.pages(batch, [])) == []


def test_a_page_that_is_wider_than_what_stages_keep(make_cascade):
    """Actions that keep less than a page all keep a page, so that they are one."""
    cascade = make_cascade(OFFERING)
    (_, first), (_, second) = cascade.pages(planted_batch(), ["a0-b0-c0-d0", "a1-b0-c0-d0"], k=16)
    assert first.traces[0] is second.traces[0]
