"""Items like an item, and why a page looked as it did, over HTTP."""

from engine_support import FIRST_ITEM


def test_items_like_an_item(reader):
    told = reader.get("/v1/similar/120?k=3").json()
    assert told["item"] == "120"
    assert told["by"]
    assert len(told["items"]) == 3
    assert "120" not in [str(item["item_id"]) for item in told["items"]]
    body = {"item": 120, "k": 4, "rules": {"filters": [{"field": "shelf", "equals": "shelf-1"}]}}
    ruled = reader.post("/v1/similar", json=body).json()
    assert {(item["item_id"] - FIRST_ITEM) % 4 for item in ruled["items"]} == {1}
    assert ruled["removed"] == {"filters.shelf": 32}


def test_an_unknown_item_is_no_error(reader):
    response = reader.get("/v1/similar/no/such item")
    assert response.status_code == 200
    assert response.json()["items"] == []
    assert response.json()["ignored"] == {"item": 1}


def test_bad_questions_are_refused(reader):
    assert reader.get("/v1/similar/120?k=0").status_code == 422
    assert reader.post("/v1/similar", json={"k": 3}).json() == {"error": "item is missing"}
    wrong = reader.post("/v1/similar", json={"item": "120", "rules": {"mix": {"field": "price", "weight": 3}}})
    assert wrong.status_code == 422


def test_a_page_is_explained_until_it_is_gone(client):
    page = client.get("/v1/recommend/user-3").json()
    told = client.get(f"/v1/explain/{page['request_id']}").json()
    assert [item["item_id"] for item in told["items"]] == [item["item_id"] for item in page["items"]]
    assert told["scored_by"] == "ranking"
    assert any(item["events"] for item in told["items"])
    assert told["notes"] == []
    about = client.get(f"/v1/explain/{page['request_id']}?item=nowhere").json()
    assert about["asked"]["lost_by"] == "catalogue"
    gone = client.get("/v1/explain/0123456789abcdef")
    assert gone.status_code == 404
    assert "not in the request log" in gone.json()["error"]


def test_a_server_without_a_log_says_so(reader):
    response = reader.get("/v1/explain/x")
    assert response.status_code == 422
    assert "request_log" in response.json()["error"]
