"""A server follows its place: under load, in threads and in a process of its own, with no request lost; and the admin's routes."""

import threading
import time

import pytest
from fastapi.testclient import TestClient

from shortlist.cascade.engine import Engine
from shortlist.serving.app import create_app
from shortlist.serving.settings import ServerConfig
from shortlist.serving.watching import Watcher
from shortlist.store.published import Place
from shortlist.store.snapshot import read_snapshot


@pytest.fixture
def place(run, other_run, tmp_path):
    """Two versions; the first run's is current."""
    place = Place(tmp_path / "place")
    place.publish(other_run, note="other")
    place.publish(run, note="first")
    return place


@pytest.fixture
def versions(run, other_run):
    return read_snapshot(run).version, read_snapshot(other_run).version


@pytest.fixture
def watched(place, tmp_path):
    """An engine on the place's current version, and its watcher, which looks when it is told to."""
    with Engine.load(place.current_run, events=tmp_path / "events.db") as engine:
        yield Watcher(engine, place)


@pytest.fixture
def admin(watched):
    with TestClient(create_app(watched.engine, ServerConfig(admin=True), watcher=watched)) as client:
        yield client


def test_a_look_takes_up_what_is_current(watched, place, versions):
    first, other = versions
    assert not watched.look()
    place.rollback()
    assert watched.engine.snapshot_version == first
    assert watched.look()
    assert watched.engine.snapshot_version == other == watched.engine.recommend("user-3").snapshot_version
    assert not watched.look()
    assert watched.following.num_swaps == 1


def test_a_damaged_version_is_left_out_and_told(watched, place, versions, monkeypatch):
    first, other = versions
    watched.look()
    place.rollback()
    file = next(path for path in place.run(other).rglob("dnn.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()  # the run shares the file
    file.write_bytes(content)
    assert not watched.look()
    assert watched.engine.recommend("user-3").snapshot_version == first
    assert "dnn.safetensors is damaged" in watched.following.problem
    assert watched.following.num_failed == 1
    watched.look()  # it does not try again at once
    assert watched.following.num_failed == 1
    monkeypatch.setattr("shortlist.serving.watching.RETRY_S", 0)
    place.select(first)
    watched.look()
    assert watched.following.problem is None
    assert watched.following.serving == first


def test_swaps_in_a_loop_under_requests_lose_none(place, tmp_path, versions):
    """Threads ask without pause while the current version changes a dozen times."""
    with Engine.load(place.current_run, events=tmp_path / "events.db") as engine:
        watcher = Watcher(engine, place, every_s=0.01).start()
        done, answers, errors = threading.Event(), [], []

        def ask(user):
            while not done.is_set():
                try:
                    answers.append(engine.recommend(user, 5))
                except Exception as error:
                    errors.append(error)

        threads = [threading.Thread(target=ask, args=(f"user-{n}",)) for n in range(3)]
        for thread in threads:
            thread.start()
        for turn in range(8):
            wanted = versions[1 - turn % 2]
            place.select(wanted)
            until = time.monotonic() + 20
            while engine.snapshot_version != wanted and time.monotonic() < until:
                time.sleep(0.005)
            assert engine.snapshot_version == wanted
        done.set()
        for thread in threads:
            thread.join()
        watcher.close()
    assert errors == []
    assert {answer.snapshot_version for answer in answers} == set(versions)
    assert all(answer.degraded is None and len(answer.items) == 5 for answer in answers)
    assert watcher.following.num_swaps == 8


def test_a_watcher_stops_when_it_is_closed(watched, place, versions):
    watched.every_s = 0.01
    watched.start().close()
    place.rollback()
    time.sleep(0.05)
    assert watched.engine.snapshot_version == versions[0]


# -- the admin's routes ----------------------------------------------------------------------------------------------


def test_there_are_no_admin_routes_unless_asked_for(watched):
    with TestClient(create_app(watched.engine, ServerConfig(), watcher=watched)) as client:
        assert client.get("/v1/admin/snapshots").status_code == 404
        assert client.post("/v1/admin/rollback", json={}).status_code == 404
        assert "/v1/admin/snapshots" not in client.get("/openapi.json").json()["paths"]


def test_snapshots_are_listed(admin, versions):
    told = admin.get("/v1/admin/snapshots").json()
    assert [one["version"] for one in told["versions"]] == [versions[1], versions[0]]
    assert [one["note"] for one in told["versions"]] == ["other", "first"]
    assert told["current"] == told["serving"] == versions[0]


def test_rollback_and_publish_are_served_at_once(admin, place, versions):
    first, other = versions
    assert admin.post("/v1/admin/rollback", json={}).json()["serving"] == other
    assert admin.get("/v1/recommend/user-3").json()["snapshot_version"] == other
    assert place.state().current == other
    assert admin.post("/v1/admin/publish", json={"version": first}).json()["serving"] == first
    assert admin.get("/v1/recommend/user-3").json()["snapshot_version"] == first
    assert admin.post("/v1/admin/rollback", json={"version": other}).json()["current"] == other
    metrics = admin.get("/metrics").text
    assert "shortlist_swaps_total 3.0" in metrics
    assert f'version="{other}"' in metrics


def test_what_can_not_be_served_is_refused_in_a_sentence(admin, place, versions):
    refused = admin.post("/v1/admin/publish", json={"version": "0" * 12})
    assert refused.status_code == 422
    assert f"has no version '{'0' * 12}'" in refused.json()["error"]
    for body in ({}, {"version": "../../etc"}, {"version": versions[0], "more": 1}):
        assert admin.post("/v1/admin/publish", json=body).status_code == 422
    assert admin.post("/v1/admin/rollback", json={}).status_code == 200
    refused = admin.post("/v1/admin/rollback", json={})
    assert refused.status_code == 422
    assert "no version from before" in refused.json()["error"]
    (place.folder / "current.json").write_text("{")
    assert "is damaged" in admin.get("/v1/admin/snapshots").json()["error"]
    assert admin.get("/v1/recommend/user-3").status_code == 200


def test_a_server_of_a_single_run_says_so(engine):
    with TestClient(create_app(engine, ServerConfig(admin=True))) as client:
        for refused in (client.get("/v1/admin/snapshots"), client.post("/v1/admin/rollback", json={})):
            assert refused.status_code == 422
            assert "serves a single run; publish runs to a place" in refused.json()["error"]
        assert "start the server with --shadow" in client.get("/v1/admin/shadow").json()["error"]
