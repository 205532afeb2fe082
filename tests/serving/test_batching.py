"""Requests that wait together are answered together; none waits longer than its time."""

import asyncio
import threading
import time

import pytest

from shortlist.cascade.questions import Question
from shortlist.errors import ConfigError, DataError
from shortlist.serving.batching import Batcher, Late, Overloaded
from shortlist.serving.settings import ServerConfig


class Answers:
    """Stands in for an engine: answers a question with its user, notes batches, and can be made to wait, fail or refuse."""

    def __init__(self, takes_s=0.0):
        self.batches, self.left, self.takes_s = [], [], takes_s
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, questions, left_ms):
        self.batches.append([question.user for question in questions])
        self.left.append(left_ms)
        self.gate.wait(5)
        time.sleep(self.takes_s)
        if any(question.user == "fault" for question in questions):
            raise RuntimeError("a fault")
        return [DataError("no such thing") if q.user == "refused" else q.user for q in questions]


@pytest.fixture
def batcher_of():
    made = []

    def make(answers, **settings):
        made.append(Batcher(answers, ServerConfig(**settings)))
        return made[-1]

    yield make
    for batcher in made:
        batcher.close()


def ask_all(batcher, users):
    """Outcomes of questions asked at the same time: answers or exceptions."""

    async def main():
        return await asyncio.gather(*(batcher.ask(Question(user=user)) for user in users), return_exceptions=True)

    return asyncio.run(main())


def test_everyone_gets_their_own_answer(batcher_of):
    users = [f"u{i}" for i in range(200)]
    answers = Answers()
    assert ask_all(batcher_of(answers, max_batch=7), users) == users
    assert sorted(user for batch in answers.batches for user in batch) == sorted(users)
    assert max(map(len, answers.batches)) <= 7


def test_what_waits_while_a_worker_is_busy_becomes_one_batch(batcher_of):
    answers = Answers()
    answers.gate.clear()
    batcher = batcher_of(answers, num_workers=1, max_batch=16)

    async def main():
        first = asyncio.create_task(batcher.ask(Question(user="first")))
        while not answers.batches:
            await asyncio.sleep(0.001)
        others = [asyncio.create_task(batcher.ask(Question(user=str(i)))) for i in range(10)]
        while batcher.num_waiting < 10:
            await asyncio.sleep(0.001)
        answers.gate.set()
        return await asyncio.gather(first, *others)

    assert asyncio.run(main()) == ["first", *map(str, range(10))]
    assert answers.batches == [["first"], [str(i) for i in range(10)]]


def test_a_free_worker_waits_for_no_company_unless_told_to(batcher_of):
    def seconds_of_one(**settings):
        batcher = batcher_of(Answers(), **settings)
        ask_all(batcher, ["warm"])
        began = time.perf_counter()
        ask_all(batcher, ["one"])
        return time.perf_counter() - began

    assert seconds_of_one() < 0.15
    assert seconds_of_one(linger_ms=200.0) > 0.19


def test_refusals_and_faults_reach_only_those_they_concern(batcher_of):
    answers = Answers()
    batcher = batcher_of(answers)
    refused, fine, fault, after = ask_all(batcher, ["refused", "fine", "fault", "after"])
    assert isinstance(refused, DataError)
    assert str(refused) == "no such thing"
    assert fine == "fine"
    assert isinstance(fault, RuntimeError)
    assert str(fault) == "a fault"
    assert after == "after"  # the worker lives on


def test_the_time_that_is_left_is_passed_on(batcher_of):
    answers = Answers()
    ask_all(batcher_of(answers, time_limit_ms=400.0), ["u"])
    assert 200.0 < answers.left[0] <= 400.0
    unlimited = Answers()
    ask_all(batcher_of(unlimited), ["u"])
    assert unlimited.left == [None]


def test_nobody_waits_longer_than_the_limit_and_a_hanging_worker_is_replaced(batcher_of):
    answers = Answers()
    answers.gate.clear()
    batcher = batcher_of(answers, num_workers=1, time_limit_ms=60.0)
    began = time.perf_counter()
    assert isinstance(ask_all(batcher, ["stuck"])[0], Late)
    assert time.perf_counter() - began < 1.0
    time.sleep(0.1)  # twice the limit is over
    assert isinstance(ask_all(batcher, ["waits in vain"])[0], Late)
    assert batcher.num_replaced == 1
    taken = len(answers.batches)
    answers.gate.set()
    assert ask_all(batcher, ["next"]) == ["next"]
    assert ["waits in vain"] not in answers.batches[:taken]  # its time was over, so nothing was spent on it


def test_too_many_are_refused_at_once(batcher_of):
    answers = Answers()
    answers.gate.clear()
    batcher = batcher_of(answers, num_workers=1, max_batch=1, max_waiting=3)

    async def main():
        tasks = []
        for user in range(6):
            tasks.append(asyncio.create_task(batcher.ask(Question(user=user))))
            await asyncio.sleep(0.02)
        answers.gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    outcomes = asyncio.run(main())
    assert outcomes[:4] == [0, 1, 2, 3]  # one at work, three waiting
    assert all(isinstance(one, Overloaded) for one in outcomes[4:])


def test_a_request_that_would_come_too_late_is_refused_before_it_costs_anything(batcher_of):
    answers = Answers(takes_s=0.04)
    batcher = batcher_of(answers, num_workers=1, max_batch=1, time_limit_ms=150.0)
    for _ in range(15):  # so that it knows how long a batch takes
        ask_all(batcher, ["warm"])
    worked = len(answers.batches)
    outcomes = ask_all(batcher, [str(i) for i in range(20)])
    answered = [one for one in outcomes if isinstance(one, str)]
    refused = [one for one in outcomes if isinstance(one, Overloaded)]
    assert 2 <= len(answered) <= 5
    assert len(refused) >= 14
    assert len(answers.batches) - worked <= 5


def test_closing_answers_what_waits(batcher_of):
    answers = Answers(takes_s=0.01)
    batcher = Batcher(answers, ServerConfig(num_workers=1, max_batch=1))

    async def main():
        tasks = [asyncio.create_task(batcher.ask(Question(user=user))) for user in range(5)]
        await asyncio.sleep(0)
        await asyncio.to_thread(batcher.close)
        return await asyncio.gather(*tasks)

    assert asyncio.run(main()) == list(range(5))


@pytest.mark.parametrize(
    "setting", [{"num_workers": 0}, {"max_batch": 0}, {"linger_ms": -1.0}, {"time_limit_ms": 0.0}, {"max_waiting": 0}]
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        ServerConfig(**setting)


def test_slow_times_behind_refuse_nobody_when_nobody_waits(batcher_of):
    """Else a server that hung for a while would refuse everything for good, since what it refuses never shows that it is well again."""
    batcher = batcher_of(Answers(), time_limit_ms=100.0)
    batcher._batch_s = 60.0
    assert ask_all(batcher, ["next"]) == ["next"]
    assert batcher._batch_s < 60.0
