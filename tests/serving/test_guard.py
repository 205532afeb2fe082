"""Who may ask what, how often and from where; and what is written down of it."""

import asyncio
import io
import json
import logging
import random

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from engine_support import raising, shop_live
from shortlist.cascade.engine import Engine
from shortlist.errors import ConfigError
from shortlist.serving import logs
from shortlist.serving.app import create_app
from shortlist.serving.gate import Gate
from shortlist.serving.guard import MAX_TRIES, needed
from shortlist.serving.keys import ROLES, add_key, revoke_key
from shortlist.serving.limits import Buckets, network
from shortlist.serving.settings import ServerConfig, bind, bind_admin
from shortlist.store.events import EventStore

CHEAP = 2**10
EVENT = {"user": "u", "item": "101"}


@pytest.fixture(scope="module")
def live():
    return shop_live()


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A file with a key of each role, and the keys."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    return file, {role: add_key(file, role, role, cost=CHEAP)[1] for role in ROLES}


@pytest.fixture
def client_of(live, tmp_path):
    """Clients of servers with given settings."""
    made = []

    def make(**settings):
        engine = Engine(live, events=EventStore(tmp_path / f"{len(made)}.db"))
        client = TestClient(create_app(engine, ServerConfig(**settings)))
        client.__enter__()
        made.append((engine, client))
        return client

    yield make
    for engine, client in made:
        client.__exit__(None, None, None)
        engine.close()


# -- keys and roles --------------------------------------------------------------------------------------------------

ROUTES = [
    ("GET", "/v1/recommend/u", "read"), ("POST", "/v1/recommend", "read"), ("GET", "/v1/search", "read"), ("POST", "/v1/ads", "read"),
    ("GET", "/v1/similar/1", "read"), ("GET", "/v1/explain/1", "read"), ("GET", "/metrics", "read"), ("GET", "/v1/later", "read"),
    ("POST", "/v1/events", "write"), ("POST", "/v1/items", "write"), ("DELETE", "/v1/items/1", "write"), ("GET", "/v1/users/u", "write"),
    ("DELETE", "/v1/users/u", "write"), ("GET", "/v1/admin", "admin"), ("GET", "/v1/admin/snapshots", "admin"),
    ("POST", "/v1/admin/publish", "admin"), ("POST", "/v1/later", "admin"), ("DELETE", "/", "admin"), ("POST", "/metrics", "admin"),
    ("GET", "/v1/health/live", None), ("GET", "/v1/health/ready", None), ("GET", "/docs", None), ("GET", "/openapi.json", None),
    ("POST", "/v1/ads/click", "write"), ("PUT", "/v1/ads/campaigns", "write"), ("GET", "/v1/ads/campaigns/c", "write"),
    ("PUT", "/v1/ads", "admin"), ("DELETE", "/v1/recommend", "admin"), ("POST", "/v1/similar/1", "admin"),
    ("POST", "/v1/experiments/e/stop", "admin"), ("GET", "/v1/experiments", "read"),
    ("POST", "/v1/recommendations", "admin"), ("GET", "/documents", "read"), ("GET", "/v1/administrators", "read"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "role"), ROUTES)
def test_roles_of_routes(method, path, role):
    assert needed(method, path) == role


def test_every_route_of_the_server_has_a_role_that_was_thought_of(client_of):
    """A route that changes something and is named by no rule would ask for the highest role; that is safe, but should be a choice."""
    for path, methods in client_of().get("/openapi.json").json()["paths"].items():
        for method in methods:
            if method != "get" and not path.startswith(("/v1/admin", "/v1/experiments")):
                assert needed(method.upper(), path) in ("read", "write"), (method, path)


@pytest.mark.parametrize("role", [None, *ROLES])
def test_a_key_opens_what_its_role_allows(client_of, keys, role):
    file, secrets = keys
    client = client_of(keys=file)
    headers = {} if role is None else {"authorization": f"Bearer {secrets[role]}"}
    asked = {
        "read": client.get("/v1/recommend/user-3", headers=headers),
        "write": client.post("/v1/events", json=EVENT, headers=headers),
        "admin": client.get("/v1/admin/nothing-yet", headers=headers),
    }
    for needs, response in asked.items():
        if role is None:
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert "authorization: Bearer KEY" in response.json()["error"]
        elif ROLES.index(role) < ROLES.index(needs):
            assert response.status_code == 403
            assert f"needs a key of the role {needs}" in response.json()["error"]
            assert secrets[role] not in response.text
        else:
            assert response.status_code == (404 if needs == "admin" else 200)
    for path in ("/v1/health/live", "/v1/health/ready", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 200


def test_a_key_comes_in_either_header(client_of, keys):
    file, secrets = keys
    client = client_of(keys=file)

    def status(**headers):
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return client.get("/v1/recommend/user-3", headers=named).status_code

    secret = secrets["read"]
    assert status(x_api_key=secret) == 200
    assert status(authorization=f"bearer {secret}") == 200
    assert status(authorization="Basic b3BlbjpzZXNhbWU=", x_api_key=secret) == 200  # a proxy's own
    assert status(authorization=f"Basic {secret}") == 401
    assert status(authorization=secret) == 401
    assert status(x_api_key="wrong") == 401
    assert status(x_api_key="") == 401
    assert status(x_api_key=b"\xff\xfe".decode("latin-1").encode("latin-1")) == 401
    assert status(authorization=f"Bearer {'x' * 5_000}") == 401
    schemes = client.get("/openapi.json").json()["components"]["securitySchemes"]
    assert schemes["header"]["name"] == "x-api-key"


def test_a_path_can_not_be_written_around_its_role(client_of, keys):
    """Whatever is served as an admin path is guarded as one: the guard reads the path that the router reads."""
    file, secrets = keys
    client = client_of(keys=file)
    headers = {"x-api-key": secrets["read"]}
    for path in ("/v1/%61dmin/x", "/v1/admin%2Fx", "/v1/admin/../admin/x"):
        assert client.get(path, headers=headers).status_code == 403, path
    for path in ("//v1/admin/x", "/v1//admin/x", "/V1/ADMIN/x", "/v1/admin;x"):
        assert client.get(path, headers=headers).status_code == 404, path
    assert client.post("/v1/%65vents", json=EVENT, headers=headers).status_code == 403


def test_a_revoked_key_is_refused_by_the_running_server(client_of, tmp_path, monkeypatch):
    monkeypatch.setattr("shortlist.serving.keys._LOOK_S", 0.0)
    file = tmp_path / "keys.json"
    _, secret = add_key(file, "shop", "read", cost=CHEAP)
    client = client_of(keys=file)
    assert client.get("/v1/recommend/user-3", headers={"x-api-key": secret}).status_code == 200
    revoke_key(file, "shop")
    response = client.get("/v1/recommend/user-3", headers={"x-api-key": secret})
    assert response.status_code == 401
    assert "may have been revoked" in response.json()["error"]


def test_trying_keys_is_slow_and_leaves_known_ones_alone(client_of, keys):
    file, secrets = keys
    client = client_of(keys=file)
    fine = {"x-api-key": secrets["read"]}
    assert client.get("/v1/recommend/user-3", headers=fine).status_code == 200
    tried = [client.get("/v1/recommend/user-3", headers={"x-api-key": f"guess-{n}"}) for n in range(MAX_TRIES + 3)]
    assert {response.status_code for response in tried[: MAX_TRIES - 1]} == {401}
    assert tried[-1].status_code == 429
    assert client.get("/v1/recommend/user-3", headers=fine).status_code == 200


def test_right_keys_are_no_tries(client_of, tmp_path):
    """After a restart all callers behind one address show their keys for the first time."""
    file = tmp_path / "keys.json"
    secrets = [add_key(file, f"shop-{n}", "read", cost=CHEAP)[1] for n in range(MAX_TRIES + 5)]
    client = client_of(keys=file)
    for secret in secrets:
        assert client.get("/v1/recommend/user-3", headers={"x-api-key": secret}).status_code == 200


def test_others_can_only_reach_a_server_with_keys(keys):
    with pytest.raises(ConfigError, match="shortlist keys add NAME"):
        bind(ServerConfig(port=0, host="0.0.0.0"))
    with pytest.raises(ConfigError, match="shortlist keys add NAME"):
        bind_admin(ServerConfig(port=0, admin_port=0, admin_host="0.0.0.0"))
    with bind(ServerConfig(port=0, host="0.0.0.0", keys=keys[0])) as listener:
        assert listener.getsockname()[1]
    with pytest.raises(ConfigError, match="no such file"):
        bind(ServerConfig(port=0, keys=keys[0].with_name("missing.json")))
    for local in ("127.0.0.1", "localhost", "127.1.2.3"):
        bind(ServerConfig(port=0, host=local)).close()


# -- rates -----------------------------------------------------------------------------------------------------------


@given(
    rate=st.floats(0.1, 50),
    burst=st.integers(1, 20),
    gaps=st.lists(st.floats(0, 2), min_size=1, max_size=60),
)
def test_a_bucket_lets_through_what_it_promises(rate, burst, gaps):
    """In any window of t seconds at most burst + rate * t pass; one that waits as long as it is told gets through."""
    now = [0.0]
    buckets = Buckets(rate, burst, clock=lambda: now[0])
    passed = []
    for gap in gaps:
        now[0] += gap
        wait_s = buckets.take("caller")
        if not wait_s:
            passed.append(now[0])
    for first in range(len(passed)):
        for last in range(first, len(passed)):
            assert last - first + 1 <= burst + rate * (passed[last] - passed[first]) + 1e-6
    wait_s = buckets.take("caller")
    now[0] += wait_s * (1 + 1e-9) + 1e-9
    assert not wait_s or buckets.take("caller") == 0


def test_waiting_as_told_is_enough():
    now = [0.0]
    buckets = Buckets(4.0, 2, clock=lambda: now[0])
    assert [buckets.take("a") for _ in range(3)] == [0.0, 0.0, 0.25]
    assert buckets.take("b") == 0.0  # another's bucket is its own
    now[0] += 0.2
    assert buckets.take("a") == pytest.approx(0.05)
    now[0] += 0.05 + 1e-9
    assert buckets.take("a") == 0.0


def test_memory_is_bounded_and_the_oldest_is_forgotten():
    now = [0.0]
    buckets = Buckets(0.001, 1, max_callers=100, clock=lambda: now[0])
    for number in range(5_000):
        buckets.take(f"caller-{number}")
    assert len(buckets) == 100
    assert buckets.take("caller-4999") > 0
    assert buckets.take("caller-0") == 0.0


def test_callers_are_addresses_or_networks():
    assert network("192.0.2.1") == "192.0.2.1"
    assert network("2001:db8:1:2:3:4:5:6") == network("2001:db8:1:2::9") == "2001:db8:1:2::/64"
    assert network("2001:db8:1:3::9") != network("2001:db8:1:2::9")
    assert network("::ffff:192.0.2.1") == "192.0.2.1"
    assert network("testclient") == "testclient"


def test_too_many_requests_are_told_when_to_come_back(client_of):
    client = client_of(rate_per_s=0.5, burst=3)
    answers = [client.get("/v1/recommend/user-3") for _ in range(5)]
    assert [response.status_code for response in answers] == [200, 200, 200, 429, 429]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 2
    assert "try again in" in answers[-1].json()["error"]
    assert client.get("/v1/health/live").status_code == 200  # a load balancer is never sent away
    assert 'status="429"' in TestClient(client.app, client=("192.0.2.9", 1)).get("/metrics").text


def test_each_key_has_a_rate_of_its_own(client_of, keys):
    file, secrets = keys
    client = client_of(keys=file, rate_per_s=0.01, burst=1)

    def status(role):
        return client.get("/v1/recommend/user-3", headers={"x-api-key": secrets[role]}).status_code

    assert [status("read"), status("read"), status("write"), status("write")] == [200, 429, 200, 429]


# -- bodies, sites, ports --------------------------------------------------------------------------------------------


def test_who_may_not_ask_can_not_send_a_body_either(keys, live):
    """The refusal comes before the body is read."""

    async def never():
        raise AssertionError("the body was read")

    sent = []

    async def send(message):
        sent.append(message)

    async def app(*_):
        raise AssertionError("the route was reached")

    class Metrics:
        def answered(self, *_):
            pass

    async def main():
        gate = Gate(app, metrics=Metrics(), config=ServerConfig(keys=keys[0]))
        scope = {"type": "http", "method": "POST", "path": "/v1/events", "headers": [], "client": ("192.0.2.1", 5)}
        await gate(scope, never, send)

    asyncio.run(main())
    assert sent[0]["status"] == 401


def test_a_body_that_never_comes_is_given_up():
    sent = []

    async def slow():
        await asyncio.sleep(30)

    async def send(message):
        sent.append(message)

    class Metrics:
        def answered(self, *_):
            pass

    async def main():
        gate = Gate(None, metrics=Metrics(), config=ServerConfig(body_s=0.05))
        await gate({"type": "http", "method": "POST", "path": "/v1/events", "headers": []}, slow, send)

    asyncio.run(asyncio.wait_for(main(), 5))
    assert sent[0]["status"] == 408


def test_other_sites_are_kept_away_unless_named(client_of):
    asking = {"origin": "https://shop.example", "access-control-request-method": "POST"}
    asking["access-control-request-headers"] = "authorization,content-type"
    closed = client_of()
    assert closed.options("/v1/recommend", headers=asking).status_code == 405
    page = closed.get("/v1/recommend/u", headers={"origin": "https://shop.example"})
    assert "access-control-allow-origin" not in page.headers
    opened = client_of(cors=("https://shop.example",))
    asked = opened.options("/v1/recommend", headers=asking)
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == "https://shop.example"
    page = opened.get("/v1/recommend/u", headers={"origin": "https://shop.example"})
    assert page.headers["access-control-allow-origin"] == "https://shop.example"
    assert "access-control-allow-credentials" not in page.headers
    other = opened.get("/v1/recommend/u", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    assert opened.options("/v1/recommend", headers={**asking, "origin": "https://evil.example"}).status_code == 400


def test_a_named_site_may_ask_without_a_key_whether_it_may_ask(client_of, keys):
    client = client_of(cors=("https://shop.example",), keys=keys[0])
    asking = {"origin": "https://shop.example", "access-control-request-method": "GET"}
    assert client.options("/v1/recommend/u", headers=asking).status_code == 200
    refused = client.get("/v1/recommend/u", headers={"origin": "https://shop.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://shop.example"


def test_the_inner_port_has_metrics_and_admin_and_the_outer_one_does_not(client_of, keys):
    outer = client_of(admin_port=9100)
    inner = TestClient(outer.app, base_url="http://testserver:9100")
    assert outer.get("/metrics").status_code == 404
    assert outer.get("/v1/admin/nothing-yet").status_code == 404
    assert outer.get("/v1/recommend/user-3").status_code == 200
    assert "shortlist_http_requests_total" in inner.get("/metrics").text
    assert inner.get("/v1/health/live").status_code == 200
    assert inner.get("/v1/recommend/user-3").status_code == 404
    assert inner.post("/v1/events", json=EVENT).status_code == 404
    # The port is the socket's, so a header can not choose it.
    assert outer.get("/metrics", headers={"host": "testserver:9100"}).status_code == 404
    guarded = client_of(admin_port=9100, keys=keys[0])
    assert TestClient(guarded.app, base_url="http://testserver:9100").get("/metrics").status_code == 401


@pytest.mark.parametrize(("settings", "said"), [
    ({"admin_port": 8000}, "admin_port must be another"), ({"admin_port": -1}, "admin_port"),
    ({"cors": ("shop.example",)}, "an origin is like"),
    ({"cors": ("https://shop.example/",)}, "an origin is like"), ({"rate_per_s": 0}, "rate_per_s"), ({"burst": 3}, "goes with rate_per_s"),
    ({"rate_per_s": 1.0, "burst": 0}, "burst"), ({"max_callers": 0}, "max_callers"), ({"max_head_bytes": 0}, "max_head_bytes"),
    ({"body_s": 0}, "body_s"), ({"rate_per_s": float("inf")}, "rate_per_s"),
])  # fmt: skip
def test_settings_are_checked(settings, said):
    with pytest.raises(ConfigError, match=said):
        ServerConfig(**settings)


# -- request ids and logs --------------------------------------------------------------------------------------------


@pytest.fixture
def lines():
    """What is logged while a test runs."""
    stream = io.StringIO()
    handler = logs.install(requests=True, stream=stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logs.uninstall(handler)


def test_every_answer_has_an_id_that_its_line_carries(client_of, lines):
    client = client_of()
    page = client.get("/v1/recommend/user-3", headers={"x-request-id": "trace-1.a_B"})
    assert page.headers["x-request-id"] == "trace-1.a_B"
    assert page.headers["cache-control"] == "no-store"
    line = lines()[-1]
    assert line["request_id"] == "trace-1.a_B"
    assert line["page"] == page.json()["request_id"]
    assert (line["event"], line["method"], line["status"]) == ("request", "GET", 200)
    assert line["route"] == "/v1/recommend/{user:path}"
    assert 0 < line["ms"] < 10_000
    refused = client.get("/v1/recommend/user-3?k=0", headers={"x-request-id": 'a"b\\n' + "x" * 100})
    made = refused.headers["x-request-id"]
    assert len(made) == 16
    assert lines()[-1]["request_id"] == made
    assert "page" not in lines()[-1]
    other = client.get("/v1/health/live").headers["x-request-id"]
    assert other != made


def test_nothing_personal_and_no_key_is_logged(client_of, keys, lines):
    file, secrets = keys
    client = client_of(keys=file)
    marks = [f"private-{random.Random(n).getrandbits(40)}" for n in range(4)]
    headers = {"x-api-key": secrets["write"], "user-agent": marks[3], "x-forwarded-for": "198.51.100.77"}
    client.get(f"/v1/recommend/{marks[0]}?k=3", headers=headers)
    client.get(f"/v1/recommend/{marks[0]}?k={marks[1]}", headers=headers)
    client.get(f"/v1/nowhere/{marks[0]}", headers=headers)
    client.get(f"/v1/recommend/{marks[0]}", headers={"x-api-key": marks[2]})
    client.post("/v1/events", json={"user": marks[0], "item": marks[1]}, headers=headers)
    client.post("/v1/recommend", json={"user": marks[0], "wrong": marks[1]}, headers=headers)
    client.post("/v1/recommend", content=marks[0], headers=headers)
    written = json.dumps(lines())
    assert len(lines()) == 7
    for secret in (*marks, *secrets.values(), "198.51.100.77", "testclient", "user-agent"):
        assert secret not in written
    assert lines()[0]["key"] == secrets["write"].split("_")[1]


def test_a_fault_is_logged_with_its_place_and_without_its_words(live, lines):
    engine = Engine(live)

    def broken(*_, **__):
        raise KeyError("user-3 asked for this")

    object.__setattr__(engine, "answer", broken)
    with TestClient(create_app(engine), raise_server_exceptions=False) as client:
        answer = client.get("/v1/recommend/user-3", headers={"x-request-id": "trace-2"})
    assert answer.status_code == 500
    fault = next(line for line in lines() if line["level"] == "error")
    assert (fault["error"], fault["request_id"], fault["logger"]) == ("KeyError", "trace-2", "shortlist.serving")
    assert "test_guard.py" in fault["at"][-1]
    assert "broken" in fault["at"][-1]
    assert "asked for this" not in json.dumps(lines())


def test_lines_of_requests_are_written_only_where_wanted(client_of):
    stream = io.StringIO()
    handler = logs.install(requests=False, stream=stream)
    client_of().get("/v1/recommend/user-3")
    assert stream.getvalue() == ""
    logging.getLogger("shortlist.serving").error("a disk is full")
    logs.uninstall(handler)
    assert json.loads(stream.getvalue())["message"] == "a disk is full"


def test_a_method_nobody_knows_is_counted_as_other(client_of):
    client = client_of()
    for number in range(20):
        client.request(f"M{number}", "/v1/recommend/user-3")
    counted = client.get("/metrics").text
    assert 'method="other"' in counted
    assert 'method="M' not in counted


def test_a_broken_guard_is_no_open_door(client_of, keys, monkeypatch):
    file, secrets = keys
    client = client_of(keys=file)
    monkeypatch.setattr("shortlist.serving.keys.Keyring.known", raising)
    response = client.get("/v1/recommend/user-3", headers={"x-api-key": secrets["read"]})
    assert response.status_code == 500
    assert list(response.json()) == ["error"]
