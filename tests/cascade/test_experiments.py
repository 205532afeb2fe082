"""Experiments as data: what is read and refused, who gets what, and pages of two teams."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest

from shortlist.cascade.experiments import (
    INTERLEAVED,
    Guardrail,
    experiment_of,
    random_page,
    read_experiments,
    team_draft,
    uniform,
)
from shortlist.cascade.rules import Rules
from shortlist.errors import ConfigError
from shortlist.metrics.sequential import chi_square_tail

TEXT = """
[experiments.ranker]
primary = "clicks"
traffic = 0.5
[experiments.ranker.variants.control]
share = 2
[experiments.ranker.variants.longer]
chain = "a0-b1-c0"
[experiments.ranker.variants.dear]
budget_ms = 3.5
[experiments.ranker.metrics.clicks]
of = "events"
actions = ["click"]
[experiments.ranker.guardrails.speed]
metric = "spent_ms"
bad = "up"
margin = 5.0

[experiments.fresh.variants.control]
[experiments.fresh.variants.unseen]
rules = {seen = "drop", deny = ["a", 3]}
"""
UNITS = [f"user-{number}" for number in range(20_000)]


@pytest.fixture(scope="module")
def experiments():
    return read_experiments(TEXT)


def test_what_is_written_is_what_is_read(experiments):
    ranker, fresh = experiments["ranker"], experiments["fresh"]
    assert ranker.control == "control"
    assert ranker.shares == {"control": 0.5, "longer": 0.25, "dear": 0.25}
    assert ranker.metrics["clicks"].actions == ("click",)
    assert ranker.guardrails["speed"].margin == 5.0
    assert ranker.primary == "clicks"
    assert ranker.knobs == {"run, chain or budget"}
    assert fresh.variants["unseen"].rules == Rules(seen="drop", deny=["a", 3])
    assert fresh.primary == "converted"
    assert experiment_of("ranker", ranker.to_table()) == ranker
    assert experiment_of("fresh", json.loads(json.dumps(fresh.to_table()))) == fresh
    assert set(fresh.all_metrics) == {"converted", "spent_ms", "degraded"}


def chi_square_p(counts, shares):
    counts, wanted = np.array(counts), np.array(shares) * np.sum(counts)
    return chi_square_tail(float(((counts - wanted) ** 2 / wanted).sum()), len(counts) - 1)


def test_units_come_in_the_shares_that_were_set(experiments):
    got = [experiments["ranker"].variant_of(unit) for unit in UNITS]
    counts = Counter(got)
    assert chi_square_p([counts[None], 20_000 - counts[None]], [0.5, 0.5]) > 1e-3
    assert chi_square_p([counts[name] for name in ("control", "longer", "dear")], [0.5, 0.25, 0.25]) > 1e-3
    again = read_experiments(TEXT)["ranker"]
    assert got == [again.variant_of(unit) for unit in UNITS]


def test_hashes_are_uniform_and_fixed():
    values = np.array([uniform("salt", unit) for unit in UNITS])
    assert chi_square_p(np.bincount((values * 20).astype(int), minlength=20), np.full(20, 0.05)) > 1e-3
    assert 0 <= values.min() < values.max() < 1
    assert uniform("a", "bc") != uniform("ab", "c")
    # Other servers and later versions must send users the same way: the first 64 bits of `b2sum -l 64` of "6:rankeruser-1".
    assert uniform("ranker", "user-1") == 0x28F6BB6E56D8ABB2 / 2**64


def test_experiments_are_independent_of_each_other(experiments):
    """A 2 x 3 table of two experiments has no more dependence than chance."""
    pairs = [(experiments["fresh"].variant_of(u), experiments["ranker"].variant_of(u)) for u in UNITS]
    pairs = [pair for pair in pairs if pair[1]]
    counts = Counter(pairs)
    left, right = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    wanted = {(a, b): left[a] * right[b] / len(pairs) for a, b in itertools.product(left, right)}
    assert chi_square_tail(sum((counts[c] - w) ** 2 / w for c, w in wanted.items()), 2) > 1e-3


def test_another_salt_draws_anew_and_a_stopped_experiment_has_nobody(experiments):
    again = read_experiments(TEXT.replace("traffic = 0.5", 'salt = "second"'))["ranker"]
    same = np.mean([again.variant_of(u) == experiments["ranker"].variant_of(u) for u in UNITS[:2_000]])
    assert 0.1 < same < 0.3
    stopped = read_experiments(TEXT.replace("traffic = 0.5", "running = false"))["ranker"]
    assert all(stopped.variant_of(unit) is None for unit in UNITS[:100])
    both = read_experiments(
        "[experiments.x]\ninterleave = true\n[experiments.x.variants.a]\n[experiments.x.variants.b]\nchain = 'c'\n"
    )
    assert both["x"].variant_of("u") == INTERLEAVED


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("traffic = 0.5", "trafic = 0.5", "no setting 'trafic': did you mean 'traffic'"),
        ("traffic = 0.5", "traffic = 0", "above 0 and at most 1"),
        ('primary = "clicks"', 'primary = "click"', "names the metric 'click': did you mean 'clicks'"),
        ('metric = "spent_ms"', 'metric = "spend"', "speed names the metric 'spend'"),
        ('bad = "up"', 'bad = "left"', "bad is 'left'"),
        ("margin = 5.0", "margin = -1", "margin must be 0 or above"),
        ("share = 2", "share = 0", "share must be above 0"),
        ("budget_ms = 3.5", "explore = 2.0", "share from 0 to 1"),
        ('chain = "a0-b1-c0"', 'rules = {seen = "drop"}', "both turn rules of recommend"),
        ("traffic = 0.5", "interleave = true", "takes 2 variants, has 3"),
        ("[experiments.fresh.variants.unseen]\nrules", "rules", "at least 2 variants, has 1"),
        ("[experiments.ranker]", "[experiment.ranker]", "did you mean 'experiments'"),
    ],
)
def test_what_is_wrong_is_refused_with_a_sentence(old, new, sentence):
    assert old in TEXT
    with pytest.raises(ConfigError, match=sentence):
        read_experiments(TEXT.replace(old, new))


def test_a_file_that_is_not_there_or_empty(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml can not be read"):
        read_experiments(tmp_path / "none.toml")
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(ConfigError, match=r"there is no \[experiments"):
        read_experiments(tmp_path / "empty.toml")


def test_guardrails_stop_only_when_it_is_sure():
    up, down = Guardrail(metric="spent_ms", bad="up", margin=5), Guardrail(metric="converted", bad="down", margin=0.01)
    assert up.crossed(5.1, 9)
    assert not up.crossed(4.9, 9)
    assert not up.crossed(-9, -6)
    assert down.crossed(-0.03, -0.011)
    assert not down.crossed(-0.03, 0.0)


# -- two teams on one page ---------------------------------------------------------------------------------------------


class Coins:
    """A generator whose tosses are told."""

    def __init__(self, tosses):
        self.tosses = iter(tosses)

    def integers(self, _):
        return next(self.tosses)


def test_team_draft_by_hand():
    """The paper's way: whoever has fewer picks, else whom the coin says."""
    page = team_draft("abcd", "bdef", 4, Coins([0, 1]))
    assert page == [("a", 0), ("b", 1), ("d", 1), ("c", 0)]
    page = team_draft("abcd", "bdef", 4, Coins([1, 0]))
    assert page == [("b", 1), ("a", 0), ("c", 0), ("d", 1)]


def test_the_same_page_stays_as_it_is():
    page = team_draft("abcdef", "abcdef", 6, np.random.default_rng(0))
    assert [item for item, _ in page] == list("abcdef")


def test_a_team_without_items_lets_the_other_pick():
    rng = np.random.default_rng(0)
    assert [item for item, _ in team_draft("a", "xyz", 9, rng)] in (list("axyz"), list("xayz"))
    assert team_draft("", "", 3, rng) == []


def test_random_clicks_prefer_no_team():
    """Fair: over pages of two different lists, every place goes to each team as often."""
    rng = np.random.default_rng(1)
    teams = np.array([[team for _, team in team_draft("abcdef", "fedcba", 5, rng)] for _ in range(4_000)])
    assert np.abs(teams.mean(0) - 0.5).max() < 4 * 0.5 / np.sqrt(4_000)


def test_chances_of_random_pages_are_those_of_the_draw():
    """Every item's logged chance at every place against how often it was there."""
    rng, own, explore, draws = np.random.default_rng(2), list("abcde"), 0.4, 6_000
    seen, told = Counter(), {}
    for _ in range(draws):
        page, chances = random_page(own, 3, explore, rng)
        assert len(set(page)) == 3
        for place, (item, chance) in enumerate(zip(page, chances)):
            seen[item, place] += 1
            assert told.setdefault((item, place), chance) == chance
    assert len(told) == 15
    for cell, chance in told.items():
        assert abs(seen[cell] / draws - chance) < 4.5 * np.sqrt(chance * (1 - chance) / draws)
    assert random_page(own, 9, 0.0, rng) == (own, [1.0] * 5)
    assert random_page([], 3, 0.5, rng) == ([], [])
