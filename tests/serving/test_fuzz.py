"""Requests that a machine makes up from the API's description: the short form of benchmarks/api_fuzz.py, without a port."""

import pytest
import torch
from fastapi.testclient import TestClient

from cli_support import benchmark
from engine_support import raising, shop_live
from shortlist.cascade.engine import Engine
from shortlist.cascade.request_log import RequestLog
from shortlist.serving.app import create_app
from shortlist.serving.settings import ServerConfig
from shortlist.store.events import EventStore

torch.set_num_threads(1)
pytest.importorskip("schemathesis")


@pytest.fixture(scope="module")
def api_fuzz():
    return benchmark("api_fuzz")


@pytest.fixture
def engine(tmp_path):
    log = RequestLog(tmp_path / "requests.db")
    with Engine(shop_live(), events=EventStore(tmp_path / "events.db"), request_log=log) as engine:
        yield engine


def test_no_request_breaks_the_server(api_fuzz, engine):
    app = create_app(engine, ServerConfig(max_body_bytes=50_000, max_events=100, admin=True))
    with TestClient(app) as client:
        found = api_fuzz.fuzz(client, app.openapi(), 200, limit_s=5.0)
        assert not found.problems, "\n".join(found.problems)
        assert found.num_cases >= 200
        routes = {route.split()[1] for route, _ in found.counts}
        assert routes == set(app.openapi()["paths"])
        # Not all of it is refused at the door.
        assert found.statuses()["200"] >= 30
        assert found.statuses()["422"] >= 30
        assert client.get("/v1/recommend/user-3").json()["degraded"] is None


def test_what_is_wrong_is_found(api_fuzz, engine):
    """A route that breaks, and one that refuses without a sentence, are both reported with a line that asks again."""
    object.__setattr__(engine, "answer", raising)
    app = create_app(engine)
    description = app.openapi()
    description["paths"] = {
        path: routes for path, routes in description["paths"].items() if path in ("/v1/recommend/{user}", "/metrics")
    }
    with TestClient(app) as client:
        found = api_fuzz.fuzz(client, description, 10)
    assert any(line.startswith("500") and "curl -X GET" in line and "/v1/recommend/" in line for line in found.problems)
    assert not any("/metrics" in line for line in found.problems)
