"""The budget of a running server: seen, set, kept across a swap, followed by other processes, refused where it can not be kept."""

import json
import shutil
import threading

import pytest
from fastapi.testclient import TestClient

from shortlist.cascade.allocation.base import Budget
from shortlist.cascade.allocation.calibration import allocation_path
from shortlist.cascade.engine import Engine, EngineConfig
from shortlist.cascade.governor import GovernorConfig
from shortlist.serving.app import create_app
from shortlist.serving.budgeting import Budgets
from shortlist.serving.settings import ServerConfig

ADMIN = ServerConfig(admin=True)
PATH = "/v1/admin/budget"


@pytest.fixture
def priced(calibrated):
    with Engine.load(calibrated) as engine:
        yield engine


@pytest.fixture
def admin(priced):
    with TestClient(create_app(priced, ADMIN)) as client:
        yield client


def test_it_tells_budget_prices_and_what_chains_cost(admin, calibrated):
    told = admin.get(PATH).json()
    summary = json.loads((allocation_path(calibrated) / "summary.json").read_text())
    assert told["is_calibrated"]
    assert told["budget"] == told["calibrated"] == summary["budget"]
    assert told["prices"] == summary["prices"]
    assert told["cap_ms"] is None
    assert told["chains"] == [
        {"name": chain["name"], "mflop": chain["mflop"], "ms": chain["ms"]}
        for chain in summary["chains"]
        if chain["kept"]
    ]


def test_another_budget_changes_the_prices_at_which_requests_get_their_chains(admin):
    """Of a poor budget chains are chosen at a price, of one that binds nowhere at none; so they cost no more."""
    costs = [chain["ms"] for chain in admin.get(PATH).json()["chains"]]
    cost = {}
    for name, ms in (("poor", min(costs) / 2), ("rich", 1e4)):
        told = admin.put(PATH, json={"ms": ms}).json()
        assert told["budget"] == {"mflop": None, "ms": ms}
        assert told["prices"]["mflop"] == 0
        assert (told["prices"]["ms"] > 0) == (name == "poor")
        allotted = [admin.get(f"/v1/recommend/user-{n}").json()["allotted"] for n in range(12)]
        assert {one["price_ms"] for one in allotted} == {told["prices"]["ms"]}
        cost[name] = sum(one["ms"] for one in allotted)
    assert cost["poor"] <= cost["rich"] + max(costs)  # one of the rich may explore
    back = admin.put(PATH, json={}).json()
    assert back["budget"] == back["calibrated"]


def test_a_budget_outlasts_a_swap(admin, priced, calibrated):
    admin.put(PATH, json={"ms": 0.05, "mflop": 3.0})
    priced.swap(calibrated)
    assert admin.get(PATH).json()["budget"] == {"ms": 0.05, "mflop": 3.0}
    admin.put(PATH, json={})
    priced.swap(calibrated)
    told = admin.get(PATH).json()
    assert told["budget"] == told["calibrated"]


def test_what_can_not_be_is_refused_with_a_sentence_and_changes_nothing(admin, run):
    before = admin.get(PATH).json()
    for body, words in (({"ms": 0}, "ms"), ({"ms": "2"}, "ms"), ({"seconds": 2}, "seconds"), ({"ms": 1e400}, "ms")):
        refused = admin.put(PATH, content=json.dumps(body), headers={"content-type": "application/json"})
        assert refused.status_code in (400, 422)
        assert words in refused.json()["error"]
    assert admin.get(PATH).json() == before
    with Engine.load(run) as plain, TestClient(create_app(plain, ADMIN)) as client:
        assert client.put(PATH, json={"ms": 2.0}).status_code == 422
        assert "not calibrated" in client.put(PATH, json={"ms": 2.0}).json()["error"]
        told = client.get(PATH).json()
        assert not told["is_calibrated"]
        assert "default chain" in told["why"]
        assert plain.config.governor.budget == Budget()


def test_prices_that_follow_the_traffic_are_left_alone(calibrated):
    config = EngineConfig(governor=GovernorConfig(capacity=Budget(ms=500.0)))
    with Engine.load(calibrated, config=config) as engine, TestClient(create_app(engine, ADMIN)) as client:
        assert client.get(PATH).json()["follows_traffic"]
        refused = client.put(PATH, json={"ms": 2.0})
        assert refused.status_code == 422
        assert "follow the traffic" in refused.json()["error"]
        assert engine.config == config


def test_without_admin_there_is_no_such_route(priced):
    with TestClient(create_app(priced, ServerConfig())) as client:
        assert client.get(PATH).status_code == client.put(PATH, json={}).status_code == 404
        assert client.get("/v1/admin/health").status_code == 404


def test_other_processes_follow_and_late_ones_too(calibrated, tmp_path):
    """Two engines stand for two worker processes, which share nothing but the file."""
    file = tmp_path / "budget.json"
    with Engine.load(calibrated) as first, Engine.load(calibrated) as second, Engine.load(calibrated) as late:
        one, two = Budgets(first, file), Budgets(second, file)
        assert not two.look()
        one.set(Budget(ms=0.07))
        assert two.look()
        assert second.live.governor.allocator.budget == Budget(ms=0.07)
        assert not two.look()
        assert not one.look()  # its own
        two.set(Budget())
        assert one.look()
        assert first.live.governor.allocator.budget == first.live.governor.calibrated
        two.set(Budget(mflop=2.0))
        three = Budgets(late, file, every_s=0.01).start()
        three.close()
        assert late.live.governor.allocator.budget == Budget(mflop=2.0)
        file.write_text("{")
        assert not one.look()  # told in the log; the budget stays
        assert first.live.governor.allocator.budget == first.live.governor.calibrated


def test_budgets_set_under_requests_fail_none(priced, admin):
    """Threads ask while the budget moves; every answer is of a chain that the allocator has."""
    done, chains, errors = threading.Event(), set(), []

    def ask(user):
        while not done.is_set():
            try:
                chains.add(priced.recommend(user).chain)
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=ask, args=(f"user-{n}",)) for n in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(20):
        admin.put(PATH, json={"ms": [0.001, 1e3][turn % 2]})
    done.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert chains <= {chain["name"] for chain in admin.get(PATH).json()["chains"]}


def test_the_curve_is_what_files_beside_the_run_say(admin, calibrated, tmp_path):
    summary = json.loads((allocation_path(calibrated) / "summary.json").read_text())
    told = admin.get(f"{PATH}/curve").json()
    assert told["report"] is None
    assert told["calibration"]["default"] == summary["default"]["name"]
    assert [(c["ms"], c["worth"]) for c in told["calibration"]["chains"]] == [
        (c["ms"], c["worth"]) for c in summary["chains"]
    ]
    report = calibrated.with_name(f"{calibrated.name}-report")
    report.mkdir()
    try:
        content = {"sentence": "s", "window": "valid", "frontier": {"points": []}, "calibration": summary}
        (report / "budget.json").write_text(json.dumps(content))
        assert admin.get(f"{PATH}/curve").json()["report"] == {
            "sentence": "s", "window": "valid", "frontier": {"points": []},
        }  # fmt: skip
        for bad in ("{", "[]", json.dumps({**content, "calibration": {"version": "of another run"}})):
            (report / "budget.json").write_text(bad)
            assert admin.get(f"{PATH}/curve").json()["report"] is None
    finally:
        shutil.rmtree(report)


def test_health_tells_sizes_windows_and_measures(admin, calibrated):
    told = admin.get("/v1/admin/health").json()
    assert told["data"]["items"] == 43
    assert told["data"]["users"] == 50
    assert told["data"]["actions"] == ["buy", "view"]
    assert told["data"]["items_with_title"] == 43
    assert list(told["windows"]) == ["fit", "valid", "test", "end"]
    assert sorted(told["windows"].values()) == list(told["windows"].values())
    assert told["metrics"] == json.loads((calibrated / "metrics.json").read_text())
    assert told["events_kept"] is None
    assert told["problems"] == []


def test_health_counts_events_kept(client, engine):
    with TestClient(create_app(engine, ADMIN)) as admin:
        before = admin.get("/v1/admin/health").json()["events_kept"]
        admin.post("/v1/events", json={"user": "u", "item": "101"})
        assert admin.get("/v1/admin/health").json()["events_kept"] == before + 1
