"""Every part of a request goes into the log and comes back as the same question; what is too long is named and not kept."""

import json

import pytest

from engine_support import FIRST_ITEM, shop_live
from shortlist.cascade.allocation.base import Budget
from shortlist.cascade.engine import Engine, EngineConfig
from shortlist.cascade.pasts import PastEvent
from shortlist.cascade.questions import Question, check
from shortlist.cascade.repeating import MOST_KEPT, as_logged, as_question, brought_candidates
from shortlist.cascade.request_log import RequestLog
from shortlist.cascade.rules import Filter, Pin, Quota, Rules
from shortlist.errors import DataError


@pytest.fixture(scope="module")
def live():
    return shop_live()


@pytest.fixture
def asking(live, tmp_path):
    """Ask, and give the record that the log has of it."""
    log = RequestLog(tmp_path / "requests.db")
    with Engine(live, request_log=log) as engine:

        def ask(question):
            answer = engine.answer([question])[0]
            return log.find(answer.request_id)

        yield ask


RULES = Rules(
    deny=(100, "nothing"),
    filters=(Filter(field="price", at_most=5.0), Filter(field="shelf", any_of=("shelf-1", "shelf-2"))),
    seen="keep",
    pins=(Pin(item=109, position=2),),
    quotas=(Quota(field="shelf", value="shelf-1", most=3),),
)


def test_a_plain_request_leaves_nothing_behind(asking):
    record = asking(Question(user="user-3"))
    assert record["asked"] == {}
    assert as_question(record) == Question(user="user-3", k=6, at=float(record["moment"]))


@pytest.mark.parametrize(
    "question",
    [
        Question(user=None, k=3, history=[PastEvent(item=103, timestamp=1.7e9, action="buy", value=2.0)]),
        Question(user="user-1", k=5, history=[104, 105]),
        Question(user="user-1", candidates=[111, 103, 107]),
        Question(user="user-1", rules=RULES),
        Question(user="user-1", rules=Rules(allow=[])),
        Question(user="user-1", chain="a0-b0-c0"),
    ],
    ids=["history", "ids", "candidates", "rules", "nothing allowed", "chain"],
)
def test_the_question_of_a_record_gives_the_same_page_at_the_same_moment(live, asking, question):
    record = asking(question)
    again = asking(as_question(json.loads(json.dumps(record))))
    assert (again["page"], again["stages"], again["removed"]) == (record["page"], record["stages"], record["removed"])
    assert again["moment"] == record["moment"]
    assert again["asked"] == record["asked"] or "rules" in record["asked"]


def test_rules_come_back_whole(live, asking):
    back = as_question(asking(Question(user="user-1", rules=RULES))).rules
    assert (back.filters, back.pins, back.quotas, back.seen) == (RULES.filters, RULES.pins, RULES.quotas, "keep")
    assert list(back.deny) == [100, "nothing"]
    assert back.allow is None
    assert not back.with_surface


def test_other_rules_lie_over_those_of_the_request(asking):
    record = asking(Question(user="user-1", rules=Rules(deny=(100,), seen="keep")))
    over = as_question(record, Rules(deny=(101,), seen="drop")).rules
    assert (set(over.deny), over.seen) == ({100, 101}, "drop")
    assert as_question(asking(Question(user="user-1")), Rules(deny=(101,))).rules == Rules(deny=(101,))


def test_the_surface_s_own_rules_are_not_the_request_s(live):
    surface = Rules(deny=(100,))
    asked = check(live, Question(user="user-1", rules=surface), EngineConfig())
    assert as_logged(asked, 0, surface) == {}
    assert as_logged(asked, 0)["rules"]["deny"] == [100]


def test_budgets_are_kept_by_request(live):
    asked = check(live, Question(user="user-1", budget=Budget(ms=2.5)), EngineConfig())
    kept = as_logged(asked, 0)
    assert kept == {"budget": {"ms": 2.5}}
    assert as_question({"user": "u", "k": 2, "moment": 5, "asked": kept}).budget == Budget(ms=2.5)


def test_what_is_too_long_is_named_and_can_not_be_asked_again(live, asking):
    many = [FIRST_ITEM] * (MOST_KEPT + 1)
    assert asking(Question(user="user-1", history=many))["asked"] == {"left_out": ["history"]}
    record = asking(Question(user="user-1", rules=Rules(deny=many)))
    assert record["asked"] == {"left_out": ["rules"]}
    with pytest.raises(DataError, match="its rules had more than 1,000 entries"):
        as_question(record)
    # Candidates are counted as items, since only those that there are were kept.
    asked = check(live, Question(user="user-1", candidates=many), EngineConfig())
    assert as_logged(asked, 0) == {}
    assert brought_candidates(asked).tolist() == live.items([FIRST_ITEM]).tolist()


def test_a_record_of_an_earlier_version_is_refused():
    with pytest.raises(DataError, match="of an earlier version"):
        as_question({"user": "u", "k": 3})
