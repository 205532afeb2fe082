"""/v1/ads: what it answers and refuses, clicks and campaigns, and that it is described."""

import pytest
from fastapi.testclient import TestClient

from ads_support import ITEMS, ads_engine
from engine_support import FIRST_ITEM
from shortlist.serving.app import create_app
from shortlist.serving.guard import needed
from shortlist.serving.settings import ServerConfig

SPRING = {"campaign": "spring", "budget": 5, "bid": 1.0, "items": [FIRST_ITEM, "101"]}


@pytest.fixture
def served(tmp_path):
    engine = ads_engine(tmp_path)
    with engine, TestClient(create_app(engine, ServerConfig(max_body_bytes=50_000, max_events=3))) as client:
        yield client


def refused(response, status=422):
    assert response.status_code == status, response.text
    sentence = response.json()["error"]
    assert "\n" not in sentence
    return sentence


def test_campaigns_are_kept_told_changed_and_ended(served):
    made = served.put("/v1/ads/campaigns", json=SPRING)
    assert made.status_code == 200, made.text
    (told,) = made.json()
    assert told == {
        "campaign": "spring", "budget": 5.0, "bid": 1.0, "items": ["100", "101"], "reserve": 0.0, "start": None, "end": None,
        "pacing": "bid", "max_per_day": None, "spent": 0.0, "reserved": 0.0, "expected": 0.0, "left": 5.0,
    }  # fmt: skip
    assert served.get("/v1/ads/campaigns/spring").json() == told
    two = [{**SPRING, "campaign": "a/b c", "end": "2099-01-01T00:00:00Z"}, {**SPRING, "budget": 7, "max_per_day": 3}]
    assert [c["left"] for c in served.put("/v1/ads/campaigns", json=two).json()] == [5, 7]
    assert [c["campaign"] for c in served.get("/v1/ads/campaigns").json()] == ["a/b c", "spring"]
    assert served.get("/v1/ads/campaigns/a/b c").json()["end"] == 4_070_908_800.0
    assert served.delete("/v1/ads/campaigns/a/b c").json()["campaign"] == "a/b c"
    assert refused(served.get("/v1/ads/campaigns/a/b c"), 404) == "there is no campaign 'a/b c'"
    assert refused(served.delete("/v1/ads/campaigns/a/b c"), 404) == "there is no campaign 'a/b c'"


def test_ads_are_chosen_and_clicks_charged_once(served):
    served.put("/v1/ads/campaigns", json=[SPRING, {**SPRING, "campaign": "autumn", "bid": 0.4}])
    answer = served.post("/v1/ads", json={"user": "user-3", "slots": 2}).json()
    assert [(ad["campaign"], ad["slot"], ad["price"]) for ad in answer["ads"]] == [
        ("spring", 1, 0.4),
        ("autumn", 2, 0.0),
    ]
    assert set(answer["ads"][0]) == {
        "slot", "campaign", "item_id", "title", "bid", "probability", "ecpm", "price", "propensity"
    }  # fmt: skip
    assert answer["propensity"] == 1.0
    assert answer["degraded"] is None
    click = {"request_id": answer["request_id"], "slot": 1}
    first, second = (served.post("/v1/ads/click", json=click).json() for _ in range(2))
    assert (first["charged"], first["repeated"], first["campaign"]) == (0.4, False, "spring")
    assert (second["charged"], second["repeated"]) == (0.4, True)
    assert served.get("/v1/ads/campaigns/spring").json()["spent"] == 0.4
    lines = served.get("/metrics").text.splitlines()
    for outcome, number in (("shown", 2), ("charged", 1), ("repeated", 1)):
        assert f'shortlist_ads_total{{outcome="{outcome}"}} {number}.0' in lines
    assert "shortlist_ads_charged_total 0.4" in lines
    assert 'shortlist_stage_seconds_count{stage="ranking"} 1.0' in lines


def test_a_body_brings_candidates_a_history_and_rules(served):
    candidates = [{"campaign": "x", "item": item, "bid": 1 + n} for n, item in enumerate(ITEMS)]
    body = {"slots": 1, "candidates": candidates, "history": [110, {"item": 111}], "rules": {"deny": [ITEMS[3]]}}
    answer = served.post("/v1/ads", json=body).json()
    assert str(answer["ads"][0]["item_id"]) == ITEMS[2]
    assert answer["ads"][0]["bid"] == 3
    assert answer["removed"] == {"deny": 1}


def test_nobody_bids_is_an_empty_page(served):
    assert served.post("/v1/ads", json={}).json()["ads"] == []


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/ads", {"slots": 0}, "slots"),
        ("/v1/ads", {"slots": 99}, "slots must be from 1 to 20, got 99"),
        ("/v1/ads", {"candidates": []}, "candidates"),
        ("/v1/ads", {"candidates": [{"campaign": "x", "item": "100"}]}, "candidate 0: no campaign 'x' is registered, so it needs a bid"),
        ("/v1/ads", {"candidates": [{"campaign": "x", "item": "100", "bid": -1}]}, "candidates.0.bid"),
        ("/v1/ads", {"rules": {"allowed": []}}, "rules.allowed"),
        ("/v1/ads", {"budget": 3}, "budget is not a known field"),
        ("/v1/ads/click", {"request_id": "never", "slot": 1}, "no ad is known at slot 1 of the request 'never'"),
        ("/v1/ads/click", {"request_id": "never", "slot": 10**30}, "slot"),
        ("/v1/ads/click", {"slot": 1}, "request_id is missing"),
    ],
)  # fmt: skip
def test_what_can_not_be_answered_is_refused_with_a_sentence(served, path, body, said):
    assert said in refused(served.post(path, json=body))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"budget": -1}, "budget"),
        ({"budget": 1e12}, "budget"),
        ({"bid": "1"}, "bid"),
        ({"bid": 0}, "bid of a campaign must be at least one millionth"),
        ({"items": []}, "items"),
        ({"reserve": 2}, "its bid 1 is below its reserve 2"),
        ({"pacing": "fast"}, "pacing"),
        ({"start": 10, "end": 5}, "ends after it starts"),
        ({"max_per_day": 0}, "max_per_day"),
        ({"spent": 0}, "spent is not a known field"),
    ],
)
def test_campaigns_are_checked_and_bad_ones_change_nothing(served, change, said):
    assert said in refused(served.put("/v1/ads/campaigns", json=[SPRING, {**SPRING, **change}]))
    assert served.get("/v1/ads/campaigns").json() == []


def test_a_budget_can_not_fall_below_what_is_spent(served):
    served.put("/v1/ads/campaigns", json=[{**SPRING, "reserve": 1.0}])
    answer = served.post("/v1/ads", json={"user": "user-3"}).json()
    served.post("/v1/ads/click", json={"request_id": answer["request_id"], "slot": 1})
    assert "can not be 0.5: 1 is spent" in refused(served.put("/v1/ads/campaigns", json={**SPRING, "budget": 0.5}))
    assert served.get("/v1/ads/campaigns/spring").json()["budget"] == 5
    assert "at most 3 are taken" in refused(served.put("/v1/ads/campaigns", json=[SPRING] * 4))


def test_without_calibration_ads_are_refused_and_campaigns_are_not(served, tmp_path):
    (tmp_path / "b").mkdir()
    engine = ads_engine(tmp_path / "b")
    engine.ads._calibration = None
    with engine, TestClient(create_app(engine)) as client:
        assert "run `shortlist ads` on it" in refused(client.post("/v1/ads", json={}))
        assert client.put("/v1/ads/campaigns", json=SPRING).status_code == 200


def test_who_may_ask_what():
    assert needed("POST", "/v1/ads") == "read"
    assert needed("POST", "/v1/ads/click") == "write"
    assert {needed(method, "/v1/ads/campaigns/x") for method in ("GET", "PUT", "DELETE")} == {"write"}


def test_they_are_described(served):
    paths = served.get("/openapi.json").json()["paths"]
    assert set(paths["/v1/ads"]) == {"post"}
    assert set(paths["/v1/ads/campaigns"]) == {"get", "put"}
    assert set(paths["/v1/ads/campaigns/{campaign}"]) == {"get", "delete"}
