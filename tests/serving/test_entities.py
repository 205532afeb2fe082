"""Items and users over HTTP: told, removed, forgotten, and what is refused."""

import pytest

from engine_support import after, shop_frames


def ids(response):
    assert response.status_code == 200, response.text
    return [item["item_id"] for item in response.json()["items"]]


def last_item(user):
    events, _ = shop_frames()
    return events.filter(events["user_id"] == user)["item_id"][-1]


def test_rules_in_the_body(reader):
    rules = {
        "filters": [{"field": "shelf", "any_of": ["shelf-1", "shelf-2"]}, {"field": "price", "at_most": 5}],
        "pins": [{"item": 101, "position": 2}],
        "quotas": [{"field": "shelf", "most": 3}],
        "diversity": {"relevance": 0.5, "fields": ["shelf"]},
        "mix": {"field": "shelf", "weight": 0.2},
        "seen": "keep",
    }
    response = reader.post("/v1/recommend", json={"user": "user-3", "k": 6, "rules": rules})
    page = response.json()
    assert ids(response)[1] == 101
    assert {(i - 100) % 4 for i in ids(response)} == {1, 2}
    assert page["removed"].keys() == {"filters.shelf", "filters.price", "pins"}
    assert set(page["arranged"]) == {"pins", "quotas", "diversity", "mix"}
    assert page["degraded"] is None


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"rules": {"filters": [{"field": "colour", "equals": "red"}]}}, "no field 'colour'"),
        ({"rules": {"filters": [{"field": "shelf"}]}}, "needs one of"),
        ({"rules": {"filters": [{"field": "shelf", "equal": "x"}]}}, "equal"),
        ({"rules": {"pins": [{"item": "1", "position": 0}]}}, "at least 1"),
        ({"rules": {"quotas": [{"field": "shelf", "least": 1}]}}, "needs the value"),
        ({"rules": {"seen_days": -1}}, "above 0"),
        ({"rules": {"mix": {"field": "shelf", "weight": 2}}}, "from 0 to 1"),
        ({"rules": {"deny": "100"}}, "deny"),
        ({"rules": {"denied": []}}, "denied"),
        ({"rules": {}, "deny": ["100"]}, "not both"),
    ],
    ids=str,
)
def test_bad_rules_are_refused_in_one_sentence(reader, body, sentence):
    response = reader.post("/v1/recommend", json=body)
    assert response.status_code == 422
    assert sentence in response.json()["error"]


def test_an_item_is_told_of_removed_and_brought_back(client):
    first = after(last_item("user-3"))
    told = client.post("/v1/items", json={"item": first, "title": "Told", "attributes": {"shelf": "shelf-3", "x": [1]}})
    assert told.json() == {"num_kept": 1, "num_unknown": 0, "num_unknown_attributes": 1}
    titles = {item["item_id"]: item["title"] for item in client.get("/v1/recommend/user-3").json()["items"]}
    assert titles[first] == "Told"
    assert client.delete(f"/v1/items/{first}").json()["num_kept"] == 1
    page = client.get("/v1/recommend/user-3")
    assert first not in ids(page)
    assert page.json()["removed"]["unavailable"] == 1
    many = client.post("/v1/items", json=[{"item": first}, {"item": "not there", "available": False}])
    assert many.json() == {"num_kept": 2, "num_unknown": 1, "num_unknown_attributes": 0}
    assert first in ids(client.get("/v1/recommend/user-3"))


def test_a_user_is_forgotten(client, engine):
    client.post("/v1/events", json={"user": "user-5", "item": "110"})
    request_id = client.get("/v1/recommend/user-5").json()["request_id"]
    assert client.post("/v1/users", json={"user": "user-5", "attributes": {"city": "Rome"}}).status_code == 200
    done = client.delete("/v1/users/user-5").json()
    assert done == {
        "user": "user-5",
        "in_snapshot": True,
        "num_events": 1,
        "num_requests": 1,
        "num_summaries": 0,
        "written_anew": True,
    }
    assert engine.request_log.find(request_id) is None
    assert client.get("/v1/recommend/user-5").json()["num_history"] == 0
    assert client.delete("/v1/users/user-5").json()["num_events"] == 0
    assert client.delete("/v1/users/nobody").json()["in_snapshot"] is False


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/items", {"title": "no item"}),
        ("/v1/items", {"item": "a", "attributes": {"x": {"deep": 1}}}),
        ("/v1/items", {"item": "a", "available": "yes"}),
        ("/v1/items", [{"item": "a"}, {"item": ""}]),
        ("/v1/items", {"item": "a", "attributes": {str(i): 1 for i in range(201)}}),
        ("/v1/items", [{"item": str(i)} for i in range(101)]),
        ("/v1/users", {"user": "u"}),
        ("/v1/users", {"user": "u", "attributes": {"": 1}}),
    ],
    ids=str,
)
def test_bad_bodies_keep_nothing(client, engine, path, body):
    response = client.post(path, json=body)
    assert response.status_code == 422
    assert response.json()["error"]
    assert engine.upkeep.store.items() == []


def test_a_server_without_a_store_says_so(run):
    from fastapi.testclient import TestClient

    from shortlist.cascade.engine import Engine
    from shortlist.serving.app import create_app

    with Engine.load(run) as engine, TestClient(create_app(engine)) as client:
        for response in (client.post("/v1/items", json={"item": "a"}), client.delete("/v1/users/u")):
            assert response.status_code == 422
            assert "--events" in response.json()["error"]
