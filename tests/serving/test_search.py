"""/v1/search: what it answers, what it refuses, and that it is described."""

import sys
import time

import pytest
import torch
from fastapi.testclient import TestClient

from engine_support import FIRST_ITEM, break_system, raising, shop_live
from shortlist.cascade import engine as engines
from shortlist.cascade.engine import Engine
from shortlist.serving.app import create_app
from shortlist.serving.settings import ServerConfig

pytest.importorskip("bm25s", reason="pip install 'shortlist[search]'")
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def reader():
    """A client of a shop whose items are called "Item number N" and stand on shelves 0 to 3."""
    with TestClient(create_app(Engine(shop_live()), ServerConfig(max_body_bytes=50_000))) as client:
        yield client


def ids(response):
    assert response.status_code == 200, response.text
    return [item["item_id"] for item in response.json()["items"]]


def test_a_query_is_answered_with_a_page_like_any_other(reader):
    response = reader.get("/v1/search", params={"q": "number 14", "user": "user-3", "k": 4})
    page = response.json()
    assert ids(response)[0] == FIRST_ITEM + 14
    assert len(ids(response)) == 4
    assert page["items"][0]["scores"]["search"] == 1.0
    assert [stage["stage"] for stage in page["stages"]] == ["search", "retrieval", "ranking", "re-ranking", "blend"]
    assert page["note"] is None
    assert set(page) == set(reader.get("/v1/recommend/user-3").json())


def test_nobody_in_particular_may_ask(reader):
    assert ids(reader.get("/v1/search?q=number+7"))[0] == FIRST_ITEM + 7
    assert len(ids(reader.get("/v1/search?q=number+7"))) == 6


def test_a_body_brings_rules_candidates_and_a_history(reader):
    body = {"query": "item 14", "user": "user-3", "k": 3, "deny": [FIRST_ITEM + 14]}
    response = reader.post("/v1/search", json=body)
    assert FIRST_ITEM + 14 not in ids(response)
    assert response.json()["removed"]["deny"] == 1
    few = reader.post(
        "/v1/search", json={"query": "item", "candidates": [FIRST_ITEM, str(FIRST_ITEM + 1)], "history": [110]}
    )
    assert sorted(ids(few)) == [FIRST_ITEM, FIRST_ITEM + 1]
    assert few.json()["num_history"] == 1


def test_what_nothing_matches_is_an_empty_page_with_a_note(reader):
    response = reader.get("/v1/search?q=xylophone")
    assert ids(response) == []
    assert "nothing matches the query" in response.json()["note"]


@pytest.mark.parametrize("query", ["Ünïcode 14", "14 咖啡", "%00", "a" * 999, "'; drop table items", "🙂"])
def test_any_text_is_a_query(reader, query):
    assert reader.get("/v1/search", params={"q": query}).status_code == 200


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/v1/search", "q"),
        ("/v1/search?q=", "q"),
        ("/v1/search?q=%20", "the query is empty; give at least one word"),
        ("/v1/search?q=mug&k=0", "k"),
        ("/v1/search?q=mug&k=501", "k must be from 1 to 500"),
        ("/v1/search?q=" + "a" * 1001, "the query has 1,001 characters; at most 1,000 are taken"),
    ],
)
def test_what_can_not_be_answered_is_refused_with_a_sentence(reader, path, said):
    response = reader.get(path)
    assert response.status_code == 422
    assert said in response.json()["error"]


@pytest.mark.parametrize(
    "body", [{}, {"query": ""}, {"query": 5}, {"query": "mug", "words": 1}, {"query": "mug", "k": "x"}]
)
def test_bodies_are_checked(reader, body):
    response = reader.post("/v1/search", json=body)
    assert response.status_code == 422
    assert response.json()["error"]


def test_a_missing_extra_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with TestClient(create_app(Engine(shop_live()))) as client:
        response = client.get("/v1/search?q=mug")
        assert response.status_code == 422
        assert "pip install 'shortlist[search]'" in response.json()["error"]
        assert client.get("/v1/recommend/user-3").status_code == 200


def test_a_broken_stage_still_gives_the_matches():
    live = shop_live()
    break_system(live, "counts", raising)
    with TestClient(create_app(Engine(live))) as client:
        response = client.get("/v1/search?q=number+14&user=user-3")
        assert ids(response)[0] == FIRST_ITEM + 14
        assert response.json()["degraded"]


def test_a_search_that_hangs_is_given_up_at_the_time_limit(monkeypatch):
    monkeypatch.setattr(engines, "find", lambda *_: time.sleep(1.5))
    with TestClient(create_app(Engine(shop_live()), ServerConfig(time_limit_ms=200, num_workers=1))) as client:
        response = client.get("/v1/search?q=number+14&user=user-3")
        assert ids(response) == []
        assert "no answer within 200 ms" in response.json()["degraded"]


def test_it_is_counted_and_described(reader):
    reader.get("/v1/search?q=number+7")
    text = reader.get("/metrics").text
    assert 'stage="search"' in text
    assert 'stage="blend"' in text
    described = reader.get("/openapi.json").json()["paths"]["/v1/search"]
    assert set(described) == {"get", "post"}
    assert {parameter["name"] for parameter in described["get"]["parameters"]} == {"q", "user", "k"}
