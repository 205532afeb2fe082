"""The HTTP surface: what it answers, what it refuses and how, and that bad input is never the server's fault."""

import json
import re
import sqlite3
import threading
import time

import pytest
import torch
from fastapi.testclient import TestClient

from engine_support import FIRST_ITEM, NUM_ITEMS, NUM_NEW, after, break_system, raising, shop_frames, shop_live
from shortlist.cascade.engine import Engine
from shortlist.cascade.request_log import RequestLog
from shortlist.serving.app import create_app
from shortlist.store.events import EventStore

torch.set_num_threads(1)


def ids(response):
    assert response.status_code == 200, response.text
    return [item["item_id"] for item in response.json()["items"]]


def last_item(user):
    events, _ = shop_frames()
    return events.filter(events["user_id"] == user)["item_id"][-1]


def metric(client, name, **labels):
    """A sample of /metrics, read as a scraper does; 0 where it is not there."""
    from prometheus_client.parser import text_string_to_metric_families

    families = text_string_to_metric_families(client.get("/metrics").text)
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


# -- pages -----------------------------------------------------------------------------------------------------------


def test_a_page_carries_what_is_promised(client, engine):
    response = client.get("/v1/recommend/user-3?k=4")
    page = response.json()
    assert len(ids(response)) == 4
    assert after(last_item("user-3")) in ids(response)
    assert set(page) == {
        "request_id",
        "user",
        "items",
        "chain",
        "stages",
        "snapshot_version",
        "degraded",
        "removed",
        "arranged",
        "ignored",
        "num_history",
        "at",
        "spent_ms",
        "allotted",
        "note",
        "variants",
    }
    assert set(page["items"][0]) == {"item_id", "score", "title", "scores"}
    assert page["items"][0]["title"] == f"Item number {page['items'][0]['item_id'] - FIRST_ITEM}"
    assert [stage["stage"] for stage in page["stages"]] == ["retrieval", "ranking", "re-ranking"]
    assert all(stage["spent_ms"] >= 0 and stage["spent_mflop"] >= 0 for stage in page["stages"])
    assert page["degraded"] is None
    assert page["snapshot_version"] == engine.snapshot_version
    assert engine.request_log.find(page["request_id"])["page"] == ids(response)


def test_without_k_it_is_a_page_of_the_surface(reader):
    assert len(ids(reader.get("/v1/recommend/user-3"))) == 6


@pytest.mark.parametrize("user", ["nobody", "a b", "ä/ö", "%00", "x" * 512, "..", "user-3?", "4711"])
def test_any_user_gets_a_page(reader, user):
    from urllib.parse import quote

    path = quote(user, safe="") if user != ".." else "%2E%2E"
    response = reader.get(f"/v1/recommend/{path}?k=3")
    assert len(ids(response)) == 3


def test_a_visitor_with_a_history(reader):
    followed = ids(reader.post("/v1/recommend", json={"history": ["110", "111", 112], "k": 8}))
    assert 113 in followed
    assert not {110, 111, 112} & set(followed)
    timed = [{"item": 130, "timestamp": "2024-03-01T10:00:00Z"}, {"item": "120", "timestamp": 1.6e9, "action": "buy"}]
    assert 131 in ids(reader.post("/v1/recommend", json={"user": "visitor", "history": timed}))


def test_candidates_allow_and_deny(reader):
    body = {"user": "user-3", "candidates": [131, "132", "unknown"], "deny": ["132", "lost"]}
    response = reader.post("/v1/recommend", json=body)
    assert ids(response) == [131]
    assert response.json()["ignored"] == {"deny": 1, "candidates": 1}
    assert response.json()["removed"]["deny"] == 1
    allow = list(range(120, 130))
    response = reader.post("/v1/recommend", json={"user": "user-3", "allow": allow, "k": 5, "seen": "keep"})
    assert set(ids(response)) <= set(allow)
    assert len(ids(response)) == 5
    assert response.json()["removed"] == {"allow": NUM_ITEMS + NUM_NEW - 10}


def test_at_answers_for_a_moment(reader):
    events, _ = shop_frames()
    third = events.filter(events["user_id"] == "user-3")["timestamp"][2]
    for at in (third.timestamp(), third.isoformat(), third.replace(tzinfo=None).isoformat()):
        page = reader.post("/v1/recommend", json={"user": "user-3", "at": at}).json()
        assert page["num_history"] == 3
        assert page["at"] == int(third.timestamp())


# -- events ----------------------------------------------------------------------------------------------------------


def test_an_event_changes_the_next_page(client):
    before = client.get("/v1/recommend/user-3").json()
    told = client.post("/v1/events", json={"user": "user-3", "item": "130", "action": "buy", "value": 2})
    assert told.status_code == 200
    assert told.json() == {
        "num_new": 1,
        "num_repeated": 0,
        "num_unknown_users": 0,
        "num_unknown_items": 0,
        "num_unknown_actions": 0,
    }
    after_it = client.get("/v1/recommend/user-3")
    assert after_it.json()["num_history"] == before["num_history"] + 1
    assert 131 in ids(after_it)
    assert 130 not in ids(after_it)


def test_a_list_of_events_is_kept_or_refused_as_a_whole(client, engine):
    good = {"user": "fresh", "item": 105, "timestamp": time.time() - 5, "event_id": "e-1"}
    assert client.post("/v1/events", json=[good, {**good, "item": 106, "event_id": "e-2"}]).json()["num_new"] == 2
    assert client.post("/v1/events", json=[good]).json()["num_repeated"] == 1
    assert client.post("/v1/events", json=[]).json()["num_new"] == 0
    refused = client.post("/v1/events", json=[{**good, "event_id": "e-3"}, {**good, "item": ""}])
    assert refused.status_code == 422
    assert refused.json()["error"].startswith("1.item: ")
    assert len(engine.events) == 2
    assert 107 in ids(client.get("/v1/recommend/fresh"))


def test_events_of_things_nobody_knows_are_kept_and_counted(client):
    told = client.post("/v1/events", json={"user": "new", "item": "new", "action": "new"}).json()
    assert (told["num_new"], told["num_unknown_users"], told["num_unknown_items"], told["num_unknown_actions"]) == (
        1,
        1,
        1,
        1,
    )
    assert metric(client, "shortlist_events_unknown_total", what="item") == 1


def test_a_store_that_fails_is_said_and_pages_go_on(client, engine):
    with sqlite3.connect(engine.events.path) as file:
        file.execute("DROP TABLE events")
    refused = client.post("/v1/events", json={"user": "u", "item": "100"})
    assert refused.status_code == 503
    assert "can not be kept now" in refused.json()["error"]
    assert client.get("/v1/health/ready").status_code == 503
    assert client.get("/v1/health/live").status_code == 200
    page = client.get("/v1/recommend/user-3")
    assert len(ids(page)) == 6
    assert "recent events are missing" in page.json()["degraded"]
    assert metric(client, "shortlist_degraded_total", part="engine") == 1


# -- bad input -------------------------------------------------------------------------------------------------------

BODIES = [
    (path, body)
    for path in ("/v1/recommend", "/v1/events")
    for body in (
        b"",
        b"{",
        b"not json",
        b'{"user": }',
        b"\xff\xfe\x00",
        b'"text"',
        b"17",
        b"true",
        b"[" * 5_000,
        b"[[[]]]",
        b'{"user": {"a": 1}}',
        b'{"user": [1]}',
        b'{"user": ""}',
        b'{"user": true}',
        b'{"user": 1.5}',
        b'{"user": "\\ud800", "item": "1"}',
        b'{"user": ' + b"9" * 5_000 + b"}",
        b'{"user": 99999999999999999999999.5, "item": 1}',
        b'{"user": "' + b"x" * 513 + b'", "item": "1"}',
        b'{"user": "u", "item": "1", "unheard_of": 1}',
        b'{"user": "u", "item": "1", "timestamp": "yesterday"}',
        b'{"user": "u", "item": "1", "timestamp": 1700000000000}',
        b'{"user": "u", "item": "1", "timestamp": NaN}',
        b'{"user": "u", "item": "1", "timestamp": -5}',
        b'{"user": "u", "item": "1", "value": Infinity}',
        b'{"user": "u", "item": "1", "value": "much"}',
        b'{"user": "u", "item": null}',
        b'{"item": "1", "k": 0}',
        b"x" * 60_000,
    )
] + [
    ("/v1/recommend", json.dumps(body).encode())
    for body in (
        {"k": 0},
        {"k": -3},
        {"k": 501},
        {"k": 10**30},
        {"k": "ten"},
        {"k": 2.5},
        {"k": [1]},
        {"history": "a,b"},
        {"history": [{"item": "a"}, {"item": "b", "timestamp": 5}]},
        {"history": [{"timestamp": 5}]},
        {"history": [["a", 5]]},
        {"history": [None]},
        {"candidates": []},
        {"candidates": "a"},
        {"allow": {"a": 1}},
        {"deny": None},
        {"deny": [[]]},
        {"seen": "sometimes"},
        {"context": {"weather": "rain"}},
        {"context": ["rain"]},
        {"at": "noon"},
        {"at": 1.7e12},
        {"items": []},
    )
]


@pytest.mark.parametrize(("path", "body"), BODIES, ids=lambda value: repr(value)[:40])
def test_bad_bodies_get_a_sentence(reader, path, body):
    response = reader.post(path, content=body, headers={"content-type": "application/json"})
    assert 400 <= response.status_code < 500, response.text
    assert list(response.json()) == ["error"]
    sentence = response.json()["error"]
    assert 10 < len(sentence) < 300
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("method", "path", "status", "sentence"),
    [
        ("GET", "/v1/recommend/u?k=0", 422, "k: it must be greater than or equal to 1, got '0'"),
        ("GET", "/v1/recommend/u?k=ten", 422, "k: it must be a valid integer.*got 'ten'"),
        ("GET", "/v1/recommend/u?k=501", 422, "k must be from 1 to 500, got 501"),
        ("GET", "/v1/recommend/" + "x" * 513, 422, "user: it must have at most 512 characters"),
        ("GET", "/v1/recommend/", 422, "user: it must have at least 1 character"),
        ("GET", "/v1/nowhere", 404, "there is nothing at /v1/nowhere"),
        ("DELETE", "/v1/events", 405, "DELETE is not possible at /v1/events"),
    ],
)
def test_bad_questions_get_a_sentence(reader, method, path, status, sentence):
    response = reader.request(method, path)
    assert response.status_code == status
    assert re.search(sentence, response.json()["error"])


def test_sentences_name_the_place(reader):
    def error(body):
        return reader.post("/v1/recommend", json=body).json()["error"]

    assert error({"user": "u", "histroy": []}) == "histroy is not a known field; /docs lists the fields"
    assert error({"history": ["a", {"item": ""}]}).startswith("history.1.item: it must have at least 1 character")
    assert error({"k": "ten"}) == "k: it must be a valid integer, got 'ten'"
    assert reader.post("/v1/events", json={"user": "u"}).json()["error"] == "item is missing"
    assert reader.post("/v1/events", json=[{"user": "u"}]).json()["error"] == "0.item is missing"
    many = [{"user": "u", "item": "1"}] * 101
    assert reader.post("/v1/events", json=many).json()["error"] == "101 events in one body; at most 100 are taken"


def test_long_bodies_are_refused_whether_declared_or_not(reader):
    long = b'{"user": "' + b"x" * 60_000 + b'"}'
    assert reader.post("/v1/recommend", content=long).status_code == 413
    streamed = reader.post("/v1/recommend", content=(long[i : i + 5_000] for i in range(0, len(long), 5_000)))
    assert streamed.status_code == 413
    assert "longer than 50,000 bytes" in streamed.json()["error"]
    parts = iter([b'{"user": "us', b'er-3", "k": 2}'])
    fits = reader.post("/v1/recommend", content=parts, headers={"content-type": "application/json"})
    assert len(ids(fits)) == 2


@pytest.mark.parametrize(
    "kind", [{}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}]
)
@pytest.mark.parametrize("path", ["/v1/recommend", "/v1/events"])
def test_a_body_must_be_declared_as_json(reader, path, kind):
    """A web page elsewhere can make a browser send plain text here unasked, but not JSON."""
    response = reader.post(path, content=b'{"user": "u", "item": "1"}', headers=kind)
    assert response.status_code == 415
    assert "content-type: application/json" in response.json()["error"]


def test_a_fault_of_the_server_is_a_sentence_without_a_traceback(run):
    engine = Engine.load(run)
    object.__setattr__(engine, "answer", raising)
    with TestClient(create_app(engine), raise_server_exceptions=False) as client:
        response = client.get("/v1/recommend/u")
    assert response.status_code == 500
    assert response.json() == {"error": "this is a fault of the server, not of the request (RuntimeError)"}


# -- faults, load, swap ----------------------------------------------------------------------------------------------


def test_a_broken_stage_still_gives_a_page_and_is_counted():
    live = shop_live()
    break_system(live, "mmr", raising)
    with TestClient(create_app(Engine(live))) as client:
        page = client.get("/v1/recommend/user-3")
        assert len(ids(page)) == 6
        assert "mmr failed" in page.json()["degraded"]
        assert "mmr failed" in page.json()["stages"][2]["degraded"]
        assert metric(client, "shortlist_degraded_total", part="re-ranking") == 1
        assert client.post("/v1/events", json={"user": "u", "item": "1"}).status_code == 422


def test_eight_threads_read_and_write(client):
    expected = {user: ids(client.get(f"/v1/recommend/{user}")) for user in (f"user-{n}" for n in range(8))}
    wrong = []

    def work(number):
        for turn in range(6):
            if ids(client.get(f"/v1/recommend/user-{number}")) != expected[f"user-{number}"]:
                wrong.append((number, turn))
            told = client.post("/v1/events", json={"user": f"writer-{number}", "item": 100 + turn})
            page = client.get(f"/v1/recommend/writer-{number}").json()
            if told.status_code != 200 or page["num_history"] != turn + 1:
                wrong.append((number, turn, page["num_history"]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_swapping_under_load_fails_no_request(client, engine, run, other_run):
    bad, versions, done = [], set(), threading.Event()

    def ask(number):
        while not done.is_set():
            response = client.get(f"/v1/recommend/user-{number}")
            if response.status_code != 200 or response.json()["degraded"] or len(response.json()["items"]) != 6:
                bad.append(response.text)
            versions.add(response.json()["snapshot_version"])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for folder in [other_run, run] * 4:
        engine.swap(folder)
        time.sleep(0.05)
    done.set()
    for thread in threads:
        thread.join()
    assert not bad
    assert len(versions) == 2
    assert engine.snapshot_version in client.get("/metrics").text


# -- state, metrics, docs --------------------------------------------------------------------------------------------


def test_health(client, engine):
    assert client.get("/v1/health/live").json() == {"status": "alive"}
    assert client.get("/v1/health/ready").json() == {
        "status": "ready",
        "snapshot_version": engine.snapshot_version,
        "keeps_events": True,
        "keeps_requests": True,
    }


def test_metrics_count_what_happened(client):
    for _ in range(3):
        client.get("/v1/recommend/user-3?k=2")
    client.get("/v1/recommend/user-3?k=0")
    client.get("/v1/nowhere")
    client.post("/v1/events", json=[{"user": "u", "item": "101", "event_id": "1"}] * 2)
    route = "/v1/recommend/{user:path}"
    assert metric(client, "shortlist_http_requests_total", route=route, status="200", method="GET") == 3
    assert metric(client, "shortlist_http_requests_total", route=route, status="422") == 1
    assert metric(client, "shortlist_http_requests_total", route="other", status="404") == 1
    assert metric(client, "shortlist_http_seconds_count", route=route) == 4
    assert metric(client, "shortlist_stage_seconds_count", stage="ranking") == 3
    assert metric(client, "shortlist_stage_mflop_total", stage="ranking") > 0
    assert metric(client, "shortlist_items_shown_total") == 6
    assert metric(client, "shortlist_events_total", outcome="new") == 1
    assert metric(client, "shortlist_events_total", outcome="repeated") == 1
    assert metric(client, "shortlist_request_log_dropped_total") == 0


def test_dropped_log_lines_are_stated(tmp_path):
    log = RequestLog(tmp_path / "requests.db", max_waiting=1)
    blocked = threading.Event()
    engine = Engine(shop_live(), request_log=log)
    inner = log._write
    object.__setattr__(log, "_write", lambda records: (blocked.wait(10), inner(records)))
    with TestClient(create_app(engine)) as client:
        for _ in range(6):
            assert len(ids(client.get("/v1/recommend/user-3"))) == 6
        assert metric(client, "shortlist_request_log_dropped_total") >= 3  # the writer holds two at most, and one waits
    blocked.set()
    engine.close()


def test_the_docs_page_needs_nothing_from_elsewhere(reader):
    page = reader.get("/docs").text
    assert "swagger" in page
    addresses = re.findall(r'(?:src|href)="([^"]+)"', page) + re.findall(r"url: '([^']+)'", page)
    assert len(addresses) >= 3
    for address in addresses:
        assert address.startswith("/"), address
        assert reader.get(address).status_code == 200
    assert reader.get("/redoc").status_code == 404


def test_the_api_description_lists_every_route(reader):
    description = reader.get("/openapi.json").json()
    assert set(description["paths"]) == {
        "/v1/recommend/{user}",
        "/v1/recommend",
        "/v1/search",
        "/v1/similar/{item}",
        "/v1/similar",
        "/v1/explain/{request_id}",
        "/v1/items",
        "/v1/items/{item}",
        "/v1/users",
        "/v1/users/{user}",
        "/v1/events",
        "/v1/ads",
        "/v1/ads/click",
        "/v1/ads/campaigns",
        "/v1/ads/campaigns/{campaign}",
        "/v1/experiments",
        "/v1/experiments/{name}/stop",
        "/v1/health/live",
        "/v1/health/ready",
        "/metrics",
    }
    schemas = description["components"]["schemas"]
    assert {"Answer", "Item", "StageReport", "RecommendIn", "EventIn", "RecordedOut", "Problem"} <= set(schemas)
    assert schemas["Problem"]["properties"] == {"error": {"title": "Error", "type": "string"}}


def test_an_engine_without_an_event_store_says_so(run):
    engine = Engine.load(run)
    with TestClient(create_app(engine)) as client:
        assert client.post("/v1/events", json={"user": "u", "item": "1"}).status_code == 422
        assert client.get("/v1/health/ready").json()["keeps_events"] is False
        engine.events = EventStore(run.parent / "later.db")
        assert client.post("/v1/events", json={"user": "u", "item": "1"}).status_code == 200
    engine.close()
