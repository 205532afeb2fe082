"""Experiments at work: who is served what, what the answers and the log say, and that a broken variant costs nobody a page."""

from collections import Counter

import pytest
import torch

from engine_support import RUN, break_system, raising, shop_live
from shortlist.cascade import engine as engine_module
from shortlist.cascade import trials as trials_module
from shortlist.cascade.allocation.base import Budget
from shortlist.cascade.engine import Engine
from shortlist.cascade.experiments import INTERLEAVED, read_experiments
from shortlist.cascade.exposures import defined_experiments, read_exposures, read_stops
from shortlist.cascade.questions import Question
from shortlist.cascade.request_log import RequestLog
from shortlist.cascade.rules import Rules
from shortlist.cascade.trials import ALONE, Trials
from shortlist.errors import ConfigError, DataError

torch.set_num_threads(1)
TWO_CHAINS = RUN.replace("keep = 15", 'keep = 15\noffers = [{systems = ["counts"], keep = 7}]')
SHORT = """
[experiments.width.variants.wide]
[experiments.width.variants.narrow]
chain = "a0-b1-c0"
"""
MIXED = """
[experiments.draft]
interleave = true
[experiments.draft.variants.old]
[experiments.draft.variants.new]
run = "second"
"""
USERS = [f"user-{number}" for number in range(40)]


@pytest.fixture(scope="module")
def live():
    return shop_live(text=TWO_CHAINS)


@pytest.fixture
def engine(live, tmp_path):
    with Engine(live, request_log=RequestLog(tmp_path / "requests.db")) as engine:
        yield engine


def ids(answer):
    return [item.item_id for item in answer.items]


def exposed(engine, experiment=None):
    engine.request_log.flush()
    return list(read_exposures(engine.request_log.path, experiment))


def test_everyone_gets_their_variant_and_the_log_says_so(engine):
    with Trials(engine, read_experiments(SHORT)) as trials:
        answers = trials.answer([Question(user=user) for user in USERS])
        again = trials.answer([Question(user=user) for user in USERS])
    given = [answer.variants["width"] for answer in answers]
    assert given == [answer.variants["width"] for answer in again]
    assert set(given) == {"wide", "narrow"}
    for user, variant, answer in zip(USERS, given, answers):
        assert answer.user == user
        assert answer.chain == ("a0-b1-c0" if variant == "narrow" else "a0-b0-c0")
        assert ids(answer) == ids(engine.recommend(user, chain=answer.chain))
    rows = exposed(engine)[: len(USERS)]
    assert [(row.unit, row.variant, row.request_id) for row in rows] == [
        (user, variant, answer.request_id) for user, variant, answer in zip(USERS, given, answers)
    ]
    assert all(row.propensity == 0.5 and not row.degraded and row.spent_ms > 0 for row in rows)
    assert [list(map(int, row.items)) for row in rows] == [ids(answer) for answer in answers]
    assert engine.request_log.find(rows[0].request_id)["page"] == ids(answers[0])


def test_who_takes_no_part_is_served_as_ever(engine):
    text = SHORT.replace(
        "[experiments.width.variants.wide]",
        "[experiments.width]\nsurface = 'search'\n[experiments.width.variants.wide]",
    )
    with Trials(engine, read_experiments(text)) as trials:
        answer = trials.answer([Question(user="user-3")])[0]
        assert dict(answer.variants) == {}
        assert ids(answer) == ids(engine.recommend("user-3"))
    with Trials(engine, read_experiments(SHORT)) as trials:
        own = [Question(user="user-3", chain="a0-b1-c0"), Question(user="user-3", at=2e9)]
        assert [dict(answer.variants) for answer in trials.answer(own)] == [{}, {}]
    assert exposed(engine) == []


def test_units_are_users_then_sessions_then_requests(engine):
    with Trials(engine, read_experiments(SHORT)) as trials:
        trials.answer([Question(user="u", session="s"), Question(user=None, session="s"), Question(user=None)])
        first, second, third = exposed(engine)
    assert (first.unit, second.unit) == ("u", "s")
    assert third.unit.startswith(ALONE)


def test_rules_of_a_variant_lie_beneath_those_of_the_request(engine):
    best = ids(engine.recommend("user-3"))
    text = f"[experiments.r.variants.a]\nrules = {{deny = [{best[0]}]}}\n[experiments.r.variants.b]\nrules = {{deny = [{best[0]}]}}"
    with Trials(engine, read_experiments(text)) as trials:
        plain, also, alone = trials.answer(
            [
                Question(user="user-3"),
                Question(user="user-3", rules=Rules(deny=(best[1],))),
                Question(user="user-3", rules=Rules(with_surface=False)),
            ]
        )
    assert best[0] not in ids(plain)
    assert best[1] in ids(plain)
    assert not set(best[:2]) & set(ids(also))
    assert ids(alone) == best


def test_two_experiments_at_once(engine):
    text = SHORT + "[experiments.r.variants.a]\n[experiments.r.variants.b]\nrules = {seen = 'drop'}\n"
    with Trials(engine, read_experiments(text)) as trials:
        answers = trials.answer([Question(user=user) for user in USERS])
    assert len({tuple(sorted(answer.variants.items())) for answer in answers}) == 4
    assert sum(trials.shown.values()) == 80
    assert Counter(row.experiment for row in exposed(engine)) == {"width": 40, "r": 40}
    dropped = [answer for answer in answers if answer.variants["r"] == "b"]
    assert all("seen" in answer.removed for answer in dropped)


def test_random_pages_carry_their_chances(engine):
    text = "[experiments.e.variants.a]\nexplore = 0.5\nexplore_from = 20\n[experiments.e.variants.b]\nexplore = 0.5\nexplore_from = 20"
    own = ids(engine.recommend("user-3", 20))
    with Trials(engine, read_experiments(text), seed=0) as trials:
        answers = trials.answer([Question(user="user-3")] * 60)
    rows = exposed(engine)
    drawn = 0
    for answer, row in zip(answers, rows):
        assert len(set(ids(answer))) == len(row.chances) == 6
        assert set(ids(answer)) <= set(own)
        assert row.chances == tuple(0.5 / 20 + 0.5 * (item == own[place]) for place, item in enumerate(ids(answer)))
        drawn += ids(answer) != own[:6]
    assert 15 < drawn < 45


def test_both_variants_make_one_page(engine, monkeypatch):
    monkeypatch.setattr(trials_module, "load_live", lambda _: shop_live(1, version="two"))
    with Trials(engine, read_experiments(MIXED), seed=0) as trials:
        answers = trials.answer([Question(user=user) for user in USERS])
        other = next(iter(trials._engines.values()))
        assert other.snapshot_version == "two"
        pages = [(ids(engine.recommend(user)), ids(other.recommend(user))) for user in USERS]
    for answer, row, sides in zip(answers, exposed(engine), pages):
        assert dict(answer.variants) == {"draft": INTERLEAVED}
        assert len(set(ids(answer))) == 6
        assert answer.request_id == row.request_id
        for item, team in zip(ids(answer), row.teams, strict=True):
            assert item in sides[team]
        assert abs(sum(row.teams) - 3) <= 1
    assert engine.recommend("user-3").items  # the shared log is still open


def test_a_variant_that_fails_costs_nobody_a_page(engine, monkeypatch):
    with Trials(engine, read_experiments(SHORT)) as trials:
        inner = engine.answer

        def failing(questions, **settings):
            found = inner(questions, **settings)
            return [DataError("no such thing") if q.chain else a for q, a in zip(questions, found)]

        monkeypatch.setattr(engine, "answer", failing)
        answers = trials.answer([Question(user=user) for user in USERS])
    rows = exposed(engine)
    for answer, row in zip(answers, rows):
        assert len(answer.items) == 6
        assert row.degraded == (answer.variants["width"] == "narrow")
        assert (answer.degraded == "a variant failed (no such thing)") == row.degraded
    assert any(row.degraded for row in rows)


def test_a_wrong_question_is_the_callers_own_fault(engine):
    with Trials(engine, read_experiments(SHORT)) as trials:
        wrong, good = trials.answer([Question(user="u", k=10_000), Question(user="u")])
        assert isinstance(wrong, ConfigError)
        assert good.items
    assert len(exposed(engine)) == 1


def test_a_broken_stage_is_an_exposure_too(tmp_path):
    live = shop_live()
    break_system(live, "mmr", raising)
    with Engine(live, request_log=RequestLog(tmp_path / "r.db")) as engine:
        with Trials(engine, read_experiments("[experiments.x.variants.a]\n[experiments.x.variants.b]")) as trials:
            assert trials.answer([Question(user="user-1")])[0].degraded
        assert exposed(engine)[0].degraded


def test_a_page_that_came_too_late_counts_for_its_variant(engine):
    with Trials(engine, read_experiments(SHORT)) as trials:
        question = Question(user="user-5")
        late = trials.missed(question, engine.last_resort(question, "no answer within 5 ms"))
        assert late.variants == trials.answer([question])[0].variants
    assert [(row.unit, row.degraded) for row in exposed(engine)] == [("user-5", True), ("user-5", False)]


def test_a_stopped_experiment_stays_stopped(engine):
    experiments = read_experiments(SHORT)
    with Trials(engine, experiments) as trials, Trials(engine, experiments) as elsewhere:
        trials.stop("width", "slower")
        trials.stop("width", "again")
        assert dict(trials.answer([Question(user="user-1")])[0].variants) == {}
        assert elsewhere.answer([Question(user="user-1")])[0].variants
        elsewhere.look_for_stops()
        assert dict(elsewhere.answer([Question(user="user-1")])[0].variants) == {}
        with pytest.raises(ConfigError, match="no experiment 'wide'; there are width"):
            trials.stop("wide", "typo")
    assert read_stops(engine.request_log.path) == {"width": "slower"}
    assert defined_experiments(engine.request_log.path) == experiments
    assert Trials(engine, experiments).stopped == {"width": "slower"}


class FakeGovernor:
    """Enough of one for an engine that does not ask it."""

    def __init__(self, config):
        self.config = config


def test_a_budget_has_an_engine_of_its_own_that_follows_swaps(engine, monkeypatch):
    text = SHORT.replace('chain = "a0-b1-c0"', "budget_ms = 2.5")
    with pytest.raises(ConfigError, match=r"variants\.narrow\] a budget needs to know what chains cost"):
        Trials(engine, read_experiments(text))
    monkeypatch.setattr(engine_module, "open_governor", lambda folder, version, config: (FakeGovernor(config), ()))
    with Trials(engine, read_experiments(text)) as trials:
        other = next(iter(trials._engines.values()))
        assert other.live.governor.config.budget == Budget(ms=2.5)
        assert engine.live.governor is None
        engine.adopt(shop_live(1, version="two"))
        trials.answer([])
        assert other.snapshot_version == "two"
        assert other.live is not engine.live
        assert other.live.cascade.memories is not engine.live.cascade.memories
        assert other.live.governor.config.budget == Budget(ms=2.5)


@pytest.mark.parametrize(
    ("wish", "sentence"),
    [
        ('chain = "a0-b9-c0"', r"variants\.narrow\].*a0-b9-c0"),
        ('rules = {filters = [{field = "colour", equals = "red"}]}', r"variants\.narrow\].*colour"),
    ],
)
def test_what_the_run_can_not_do_is_refused_at_the_start(engine, wish, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Trials(engine, read_experiments(SHORT.replace('chain = "a0-b1-c0"', wish)))


def test_a_forgotten_user_leaves_no_exposure(engine):
    with Trials(engine, read_experiments(SHORT)) as trials:
        trials.answer([Question(user="user-1"), Question(user="user-2")])
    engine.request_log.forget("user-1")
    assert [row.unit for row in exposed(engine, "width")] == ["user-2"]


def test_files_without_exposures_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        list(read_exposures(tmp_path / "none.db"))
    import sqlite3

    with sqlite3.connect(tmp_path / "other.db") as file:
        file.execute("create table t (x)")
    with pytest.raises(DataError, match="has no exposures"):
        list(read_exposures(tmp_path / "other.db"))


def test_only_the_newest_exposures_are_kept(engine, monkeypatch):
    from shortlist.cascade import exposures

    monkeypatch.setattr(exposures, "MAX_ROWS", 5)
    with Trials(engine, read_experiments(SHORT)) as trials:
        for user in USERS[:9]:
            trials.answer([Question(user=user)])
            engine.request_log.flush()
    assert [row.unit for row in exposed(engine)] == USERS[4:9]
