"""A server holds no more after many requests than after some: new users, rules, events, explanations, news of items and users.

The short form of benchmarks/soak.py: where that watches the memory of a process, this counts what Python's containers hold.
"""

import gc
import weakref
from collections import OrderedDict, deque

import torch
from fastapi.testclient import TestClient

from engine_support import shop_live
from shortlist.cascade.engine import Engine
from shortlist.cascade.pasts import Numbers
from shortlist.cascade.request_log import RequestLog
from shortlist.serving.app import create_app
from shortlist.serving.settings import ServerConfig
from shortlist.store.catalogue import CatalogueStore
from shortlist.store.events import EventStore

torch.set_num_threads(1)
WARM, ROUNDS = 20, 40
KINDS = (dict, list, set, deque, OrderedDict)


def num_held():
    """Entries of all containers there are, but for lists of weak references: SQLite's connections keep those, up to 200 each."""
    gc.collect()
    # A dictionary of plain values is nothing to the collector, and is only found through what holds it.
    there = {id(one): one for one in gc.get_referents(*gc.get_objects()) if type(one) in KINDS}
    return sum(len(one) for one in there.values() if not _is_of_weak_references(one))


def _is_of_weak_references(one):
    return type(one) is list and bool(one) and type(one[0]) is weakref.ReferenceType


def one_round(client, number):
    """A request of each kind, most of them with what was never there before."""
    page = client.get(f"/v1/recommend/user-{number % 50}").json()
    answers = [
        client.get(f"/v1/recommend/new-{number}"),
        client.post(
            "/v1/recommend",
            json={
                "user": f"other-{number}",
                "rules": {"deny": [100 + number % 40], "filters": [{"field": "price", "at_least": number / 10}]},
            },
        ),
        client.post("/v1/events", json=[{"user": f"visitor-{number}-{n}", "item": f"told-{number}"} for n in range(5)]),
        client.get(f"/v1/similar/{100 + number % 40}"),
        client.get(f"/v1/explain/{page['request_id']}"),
        client.post("/v1/items", json={"item": 100 + number % 40, "title": f"t{number}", "attributes": {"price": 3}}),
        client.post("/v1/users", json={"user": f"new-{number}", "attributes": {"country": "x"}}),
        client.get("/metrics"),
    ]
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    assert client.get(f"/nothing/{number}").status_code == 404


def test_what_the_package_holds_does_not_grow_with_requests(tmp_path):
    live = shop_live()
    live.users, live.items = Numbers(live.dataset.user_ids, 10), Numbers(live.dataset.item_ids, 10)
    events, log = tmp_path / "events.db", RequestLog(tmp_path / "requests.db")
    engine = Engine(live, events=EventStore(events), catalogue=CatalogueStore(events), request_log=log)
    with engine, TestClient(create_app(engine, ServerConfig(time_limit_ms=30_000.0))) as client:
        for number in range(WARM):
            one_round(client, number)
        log.flush()
        before = num_held()
        for number in range(WARM, WARM + ROUNDS):
            one_round(client, number)
        log.flush()
        assert num_held() - before < ROUNDS, "an entry is left behind by every round"
