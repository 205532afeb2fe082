"""A spike of traffic on a real HTTP server: with the stress cap it shrinks chains, answers nearly all in time, and comes back.

The short form of benchmarks/spike.py: chains are stand-ins that take a known time on one worker; the server, its queue, the governor and
the load are real.
"""

import json
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import uvicorn

from engine_support import shop_live
from shortlist.cascade.allocation.base import Allocator, ChainSet, Choice
from shortlist.cascade.allocation.stress import MaxPower, MaxPowerConfig
from shortlist.cascade.engine import Engine
from shortlist.cascade.governor import Governor
from shortlist.evaluation.load import open_loop
from shortlist.serving.app import create_app
from shortlist.serving.settings import ServerConfig, bind
from shortlist.simulation.traffic import Audience, Steps, arrive

MS = {"dear": 20.0, "cheap": 1.0}
"""What a request takes: one worker bears 50 dear ones a second, or 1,000 cheap ones."""
LIMIT_MS = 250.0
CALM_S, SPIKE_S, AFTER_S = 1.5, 3.0, 4.0
CHAINS = ChainSet(
    names=("cheap", "dear"),
    stages=("ranking",),
    model_JK=np.zeros((2, 1), dtype=np.int64),
    count_JK=np.array([[10], [200]]),
    costs_JC=np.array([[1.0, MS["cheap"]], [20.0, MS["dear"]]]),
)


class Dearest(Allocator):
    """The dearest chain that the cap allows."""

    def aim(self, budget, contexts_RF):
        self.budget = budget

    def choose(self, contexts_RF, *, most_C=None, rng=None):
        best = int(np.flatnonzero(np.ones(2, dtype=bool) if most_C is None else CHAINS.within_J(most_C)).max())
        count = len(contexts_RF)
        return Choice(
            chain_R=np.full(count, best),
            value_R=np.full(count, np.nan),
            capped_R=np.full(count, best < 1),
            propensity_R=np.ones(count),
            prices_C=np.zeros(2),
        )


@pytest.fixture(scope="module")
def live():
    return shop_live()


def served(live, *, capped):
    """Replies of a server to the trace, and their chains: None where a request failed."""
    engine = Engine(live)
    page = engine.recommend("user-1", 3)
    stress = MaxPower(
        CHAINS, MaxPowerConfig(target_ms=60.0, period_seconds=0.2, recover_seconds=1.0), now=time.monotonic()
    )
    governor = Governor(
        Dearest(None, CHAINS, 1),
        lambda count: np.zeros((count, 1), dtype=np.float32),
        stress=stress if capped else None,
    )

    def answer(questions, *, deadline_ms=None):
        decision = governor.choose(len(questions))
        time.sleep(sum(MS[name] for name in decision.chains) / 1e3)
        return [replace(page, chain=name, allotted=told) for name, told in zip(decision.chains, decision.told)]

    engine.answer = answer
    engine.answered = governor.answered
    config = ServerConfig(port=0, num_workers=1, max_batch=4, time_limit_ms=LIMIT_MS)
    listener = bind(config)
    server = uvicorn.Server(uvicorn.Config(create_app(engine, config), log_level="error", access_log=False))
    over = threading.Event()

    def tick():
        while not over.wait(0.05):
            governor.tick()

    threads = [threading.Thread(target=lambda: server.run(sockets=[listener])), threading.Thread(target=tick)]
    for thread in threads:
        thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        rate = Steps(per_second=12.5, at=(0.0, CALM_S, CALM_S + SPIKE_S), factors=(1.0, 8.0, 1.0))
        arrivals = arrive(rate, Audience.by_activity(np.ones(2)), start=0.0, end=CALM_S + SPIKE_S + AFTER_S, seed=0)
        port = listener.getsockname()[1]
        replies = open_loop(
            port, arrivals.time, ["/v1/recommend/user-1"] * len(arrivals), timeout_s=LIMIT_MS / 1e3 + 0.2
        )
    finally:
        over.set()
        server.should_exit = True
        for thread in threads:
            thread.join()
    pages = [json.loads(body) if status == 200 else None for status, body in zip(replies.status, replies.bodies)]
    return replies, [None if page is None or page["chain"] not in MS else page["chain"] for page in pages]


def test_an_overloaded_server_shrinks_chains_before_it_refuses_anybody(live):
    replies, chains = served(live, capped=True)
    fixed_replies, fixed_chains = served(live, capped=False)
    np.testing.assert_array_equal(replies.due_s, fixed_replies.due_s)  # the same trace
    spike = (replies.due_s >= CALM_S) & (replies.due_s < CALM_S + SPIKE_S)
    failed, fixed_failed = (
        np.mean([chain is None for chain, inside in zip(of, spike) if inside]) for of in (chains, fixed_chains)
    )
    assert fixed_failed > 0.15
    assert failed < fixed_failed / 2
    assert failed < 0.2
    calm, late = replies.due_s < CALM_S, replies.due_s > CALM_S + SPIKE_S + AFTER_S - 1.0
    assert {chain for chain, inside in zip(chains, calm) if inside} == {"dear"}
    assert "cheap" in {chain for chain, inside in zip(chains, spike) if inside}
    assert {chain for chain, inside in zip(chains, late) if inside} == {"dear"}  # it came back
    answered = replies.status == 200
    assert (replies.latency_ms[answered] <= LIMIT_MS + 100).all()
