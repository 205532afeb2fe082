"""Experiments over HTTP: answers name their variants, sessions are told apart, harm ends an experiment, and who may end one."""

import multiprocessing
import threading

import pytest
from fastapi.testclient import TestClient

from engine_support import shop_live
from shortlist.cascade.engine import Engine
from shortlist.cascade.experiments import read_experiments
from shortlist.cascade.exposures import Exposure, read_exposures, write_stop
from shortlist.cascade.questions import Question
from shortlist.cascade.request_log import RequestLog
from shortlist.cascade.trials import Trials
from shortlist.errors import DataError
from shortlist.serving.app import create_app
from shortlist.serving.experimenting import Referee, harms, judge_beside, tell_harms
from shortlist.serving.guard import needed

TEXT = """
[experiments.seen]
hours = 0.001
planned = 500
[experiments.seen.variants.control]
[experiments.seen.variants.fresh]
rules = {seen = "drop"}
[experiments.seen.guardrails.speed]
metric = "spent_ms"
bad = "up"
"""


@pytest.fixture(scope="module")
def live():
    return shop_live()


@pytest.fixture
def trials(live, tmp_path):
    with (
        Engine(live, request_log=RequestLog(tmp_path / "requests.db")) as engine,
        Trials(engine, read_experiments(TEXT)) as trials,
    ):
        yield trials


@pytest.fixture
def client(trials):
    with TestClient(create_app(trials.engine, trials=trials)) as client:
        yield client


def test_an_answer_names_its_variant_and_keeps_it(client, trials):
    given = [client.get(f"/v1/recommend/user-{n}").json()["variants"]["seen"] for n in range(20)]
    again = [client.get(f"/v1/recommend/user-{n}").json()["variants"]["seen"] for n in range(20)]
    assert given == again
    assert set(given) == {"control", "fresh"}
    by_session = client.post("/v1/recommend", json={"session": "phone-7"}).json()
    assert by_session["user"] is None
    trials.engine.request_log.flush()
    exposures = list(read_exposures(trials.engine.request_log.path))
    assert exposures[-1].unit == "phone-7"
    assert exposures[-1].request_id == by_session["request_id"]
    assert [exposure.variant for exposure in exposures[:20]] == given
    text = client.get("/metrics").text
    for variant in ("control", "fresh"):
        pages = 2 * given.count(variant) + (by_session["variants"]["seen"] == variant)
        assert f'shortlist_experiment_pages_total{{experiment="seen",variant="{variant}"}} {pages:.1f}' in text
    assert 'shortlist_experiment_running{experiment="seen"} 1.0' in text


def test_experiments_are_listed_and_stopped(client, trials):
    client.get("/v1/recommend/user-1")
    listed = client.get("/v1/experiments").json()["experiments"][0]
    assert listed["shares"] == {"control": 0.5, "fresh": 0.5}
    assert sum(listed["pages"].values()) == 1
    assert listed["running"]
    stopped = client.post("/v1/experiments/seen/stop", json={"reason": "enough"}).json()["experiments"][0]
    assert (stopped["running"], stopped["stopped"]) == (False, "enough")
    assert client.get("/v1/recommend/user-1").json()["variants"] == {}
    missing = client.post("/v1/experiments/other/stop", json={})
    assert missing.status_code == 422
    assert "there are seen" in missing.json()["error"]
    assert 'shortlist_experiment_running{experiment="seen"} 0.0' in client.get("/metrics").text


def test_a_server_without_experiments(live):
    with Engine(live) as engine, TestClient(create_app(engine)) as client:
        assert client.get("/v1/experiments").json() == {"experiments": []}
        assert client.post("/v1/experiments/x/stop", json={}).status_code == 422
        assert client.get("/v1/recommend/user-1").json()["variants"] == {}


def test_only_an_admin_may_stop_one():
    assert needed("POST", "/v1/experiments/seen/stop") == "admin"
    assert needed("GET", "/v1/experiments") == "read"


# -- the referee -----------------------------------------------------------------------------------------------------


def page(unit, at_ms, variant, spent_ms):
    """An exposure."""
    fixed = {"experiment": "seen", "propensity": 0.5, "degraded": False, "items": ("a",)}
    return Exposure(request_id=f"of-{unit}", at_ms=at_ms, variant=variant, unit=unit, spent_ms=spent_ms, **fixed)


def harmful(trials, num_units=600):
    """Exposures as they would be if the variant were slow."""
    log = trials.engine.request_log
    log.expose(
        [page(f"u{n}", n * 10, ("control", "fresh")[n % 2], 2 + 5 * (n % 2) + 0.1 * (n % 7)) for n in range(num_units)]
    )
    log.expose([page("last", 10**7, "control", 2.0)])
    log.flush()
    return log.path


def test_harm_is_found_in_a_process_of_its_own_and_told_once(trials):
    path = harmful(trials)
    assert harms(path, None) == {"seen": "guardrail crossed: speed by fresh (spent_ms up)"}
    referee = Referee(trials, judge_beside(path, None))
    referee.judge_now()
    assert trials.stopped == {"seen": "guardrail crossed: speed by fresh (spent_ms up)"}
    assert harms(path, None) == {}


def test_what_keeps_the_judge_from_judging_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("os.nice", lambda _: None)
    words, theirs = multiprocessing.Pipe(duplex=False)
    tell_harms(theirs, tmp_path / "none.db", None)
    is_well, reason = words.recv()
    assert not is_well
    assert "no such file" in reason


def test_a_referee_looks_by_itself(trials):
    judged = threading.Event()

    def judge():
        judged.set()
        return {"seen": "slow"}

    referee = Referee(trials, judge, look_s=0.01, judge_s=0.02).start()
    assert judged.wait(5)
    referee.close()
    assert trials.stopped == {"seen": "slow"}


def test_what_another_server_stopped_is_taken_over(trials):
    referee = Referee(trials)
    write_stop(trials.engine.request_log.path, "seen", "elsewhere", 1)
    assert trials.stopped == {}
    referee.look()
    assert trials.stopped == {"seen": "elsewhere"}


@pytest.mark.parametrize("error", [DataError("gone"), RuntimeError("bug")])
def test_a_judge_that_fails_stops_nothing(trials, error):
    def judge():
        raise error

    referee = Referee(trials, judge)
    referee.judge_now()
    assert trials.stopped == {}


def test_without_guardrails_nobody_judges(trials):
    calm = read_experiments("[experiments.x.variants.a]\n[experiments.x.variants.b]\n")
    with Trials(trials.engine, calm) as others:
        referee = Referee(others, lambda: pytest.fail("asked"))
        referee.judge_now()


def test_a_server_process_opens_experiments_and_their_runs(run, tmp_path, monkeypatch):
    """Relative folders of runs begin at the file's own; the first process judges, and all is closed at the end."""
    from shortlist.serving import server
    from shortlist.serving.settings import ServerConfig
    from shortlist.serving.workers import Opening, serve

    (tmp_path / "second").symlink_to(run)
    text = TEXT.replace('rules = {seen = "drop"}', 'run = "second"')
    (tmp_path / "experiments.toml").write_text(text)
    seen = {}

    def look(engine, *_, trials, **__):
        variants = {trials.answer([Question(user=f"u{n}")])[0].variants["seen"] for n in range(20)}
        seen.update(variants=variants, threads={thread.name for thread in threading.enumerate()})

    monkeypatch.setattr(server, "run", look)
    opening = Opening(
        folder=run,
        events=tmp_path / "events.db",
        request_log=tmp_path / "requests.db",
        config=ServerConfig(),
        experiments=tmp_path / "experiments.toml",
    )
    serve(opening, None, None, print)
    assert seen["variants"] == {"control", "fresh"}
    assert "referee" in seen["threads"]
    assert "referee" not in {thread.name for thread in threading.enumerate()}
    assert len(list(read_exposures(tmp_path / "requests.db"))) == 20
