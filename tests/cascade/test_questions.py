"""Questions are checked one by one and answered together where nothing is lost by it."""

import numpy as np
import pytest

from engine_support import shop_live
from shortlist.cascade.allocation.base import Budget
from shortlist.cascade.engine import Engine
from shortlist.cascade.governor import Allotted, Decision
from shortlist.cascade.questions import Question, check, together
from shortlist.cascade.request_log import RequestLog
from shortlist.cascade.rules import Rules
from shortlist.errors import ConfigError


@pytest.fixture(scope="module")
def engine():
    with Engine(shop_live()) as engine:
        yield engine


def asked(engine, **parts):
    return check(engine.live, Question(**{"user": "user-1", **parts}), engine.config)


def test_only_what_shares_everything_but_the_user_is_put_together(engine):
    one = [
        asked(engine, user="user-1"),
        asked(engine, user="user-2", k=3),
        asked(engine, user=None),
        asked(engine, user="user-3", k=3),
        asked(engine, user="user-4", history=["item-1"]),
        asked(engine, user="user-5", history=["item-1"]),
        asked(engine, user="user-6", rules=Rules(deny=("item-2",))),
        asked(engine, user="user-7", rules=Rules(deny=("item-2",))),
        asked(engine, user="user-8", at=10_000),
        asked(engine, user="user-9", chain=engine.live.cascade.config.default_chain.name),
        asked(engine, user="user-10", budget=Budget(ms=1.0)),
        asked(engine, user="user-11", budget=Budget(mflop=2.0)),
    ]
    groups = together(one)
    assert [places for _, places in groups] == [[0, 2], [1, 3], [4], [5], [6, 7], [8], [9], [10, 11]]
    assert [list(group.users) for group, _ in groups][:2] == [["user-1", None], ["user-2", "user-3"]]
    np.testing.assert_array_equal(groups[-1][0].most_BC, [[np.inf, 1.0], [2.0, np.inf]])


def test_a_chain_that_does_not_exist_is_refused(engine):
    with pytest.raises(ConfigError, match="no chain 'z9'"):
        asked(engine, chain="z9")


def test_answers_in_one_batch_are_those_given_one_by_one(engine):
    questions = [Question(user=f"user-{i}", k=3 + i % 2) for i in range(8)]
    questions += [Question(user="user-2", history=["item-1", "item-2"]), Question(user="user-3", k=0)]
    together_ = engine.answer(questions)
    assert isinstance(together_[-1], ConfigError)
    assert "k must be" in str(together_[-1])
    for question, answer in zip(questions[:-1], together_[:-1]):
        alone = engine.recommend(question.user, question.k, history=question.history)
        assert answer.user == question.user
        assert [item.item_id for item in answer.items] == [item.item_id for item in alone.items]


def test_a_budget_without_calibration_is_refused_with_the_remedy(engine):
    with pytest.raises(ConfigError, match="shortlist calibrate"):
        engine.recommend("user-1", budget=Budget(ms=1.0))


def test_the_last_resort_obeys_the_question_s_rules(engine):
    plain = engine.last_resort(Question(user="user-1", k=4), "no answer within 10 ms")
    first = plain.items[0].item_id
    assert plain.degraded == "no answer within 10 ms"
    assert plain.chain == "popular"
    assert len(plain.items) == 4
    other = engine.last_resort(Question(user="user-1", k=4, rules=Rules(deny=(first,))), "late")
    assert first not in [item.item_id for item in other.items]
    assert len(other.items) == 4


def test_the_last_resort_is_in_the_request_log(engine, tmp_path):
    engine.request_log = RequestLog(tmp_path / "requests.db")
    answer = engine.last_resort(Question(user="user-1", k=4), "late")
    found = engine.request_log.find(answer.request_id)
    engine.request_log.close()
    assert found["page"] == [item.item_id for item in answer.items]
    assert (found["chain"], found["reason"], found["degraded"]) == ("popular", "fallback", "late")


def test_what_goes_wrong_with_one_chain_is_not_told_to_the_requests_of_another(engine, monkeypatch):
    cascade = engine.live.cascade
    name = cascade.config.default_chain.name
    monkeypatch.setattr(engine.live, "governor", TwoChains(name))
    run = type(cascade).run

    def broken(self, batch, *, chain=None, **rest):
        if chain is not None:
            raise RuntimeError("out of order")
        return run(self, batch, chain=chain, **rest)

    monkeypatch.setattr(type(cascade), "run", broken)
    answers = engine.answer([Question(user=f"user-{n}", k=3) for n in range(4)])
    assert [answer.degraded is None for answer in answers] == [False, True, False, True]


class TwoChains:
    """Gives every other request the chain of that name, the others none in particular."""

    def __init__(self, name):
        self.name = name

    def choose(self, batch, most_BC=None):
        chains = [self.name if place % 2 == 0 else None for place in range(batch.size)]
        return Decision(chains, [Allotted(reason="price")] * batch.size)

    def note(self, decision, reports):
        assert len(reports) == len(decision.chains)
