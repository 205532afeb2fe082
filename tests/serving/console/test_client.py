"""The console's client against the real application: every answer read, every refusal one sentence."""

import asyncio
import json

import httpx
import pytest

from shortlist.cascade.engine import Engine
from shortlist.errors import ConfigError
from shortlist.serving.app import create_app
from shortlist.serving.console.client import Api, ApiError, Limits, Target, read_report
from shortlist.serving.console.numbers import History, parse
from shortlist.serving.keys import add_key
from shortlist.serving.settings import ServerConfig
from shortlist.serving.watching import Watcher
from shortlist.store.published import Place

ADDRESS = "http://server"


def ask(engine, work, *, config=None, watcher=None, key=None):
    """What `work(api)` gives against the application of an engine."""

    async def through():
        app = create_app(engine, config or ServerConfig(admin=True), watcher=watcher)
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app=app)
            async with Api(Target(server=ADDRESS, key=key), transport=transport) as api:
                return await work(api)

    return asyncio.run(through())


def answering(status, content):
    """An API whose server says one thing."""
    transport = httpx.MockTransport(lambda request: httpx.Response(status, content=content))
    return Api(Target(server=ADDRESS), transport=transport)


@pytest.fixture
def priced(calibrated, tmp_path):
    with Engine.load(calibrated, events=tmp_path / "e.db", request_log=tmp_path / "r.db") as engine:
        yield engine


def test_a_page_is_followed_through_its_stages(priced):
    async def work(api):
        page = await api.page("user-3", 4, None)
        why = await api.explain(page.request_id)
        return page, why, await api.metrics()

    page, why, text = ask(priced, work)
    same = priced.recommend("user-3", 4, chain=page.chain)
    assert [item.item_id for item in page.items] == [item.item_id for item in same.items]
    assert [item.title for item in page.items] == [item.title for item in same.items]
    assert [stage.stage for stage in page.stages] == ["retrieval", "ranking"]
    assert page.allotted.reason == "price"
    assert page.allotted.ms > 0
    assert [one.item_id for one in why.items] == [item.item_id for item in page.items]
    assert all(one.stages and one.found for one in why.items)
    history = History()
    history.add(parse(text, 0.0))
    assert history.reading().snapshot == priced.snapshot_version
    assert set(history.reading().prices) == {"mflop", "ms"}


def test_the_budget_is_read_set_and_drawn(priced):
    async def work(api):
        before = await api.budget()
        after = await api.set_budget(Limits(ms=0.03))
        return before, after, await api.set_budget(Limits()), await api.curve()

    before, after, back, curve = ask(priced, work)
    assert before.is_calibrated
    assert before.budget == before.calibrated == back.budget
    assert after.budget == Limits(ms=0.03)
    assert {chain.name for chain in before.chains} <= {chain.name for chain in curve.calibration.chains}
    assert all(chain.worth is not None and chain.ms > 0 for chain in curve.calibration.chains)
    assert curve.report is None


def test_health_and_experiments(priced):
    async def work(api):
        return await api.health(), await api.experiments()

    health, experiments = ask(priced, work)
    assert health.data.items == 43
    assert health.metrics["validation"]["requests"] > 0
    assert experiments == []


def test_snapshots_are_listed_published_and_rolled_back(run, other_run, tmp_path):
    place = Place(tmp_path / "place")
    first = place.publish(other_run, note="other").version
    second = place.publish(run).version
    with Engine.load(place.current_run) as engine:

        async def work(api):
            return await api.snapshots(), await api.rollback(), await api.publish(second)

        listed, back, again = ask(engine, work, watcher=Watcher(engine, place))
        assert [(v.version, v.note) for v in listed.versions] == [(first, "other"), (second, "")]
        assert listed.serving == listed.current == again.serving == second
        assert back.serving == first
        assert engine.snapshot_version == second


def test_refusals_are_the_servers_sentence_or_say_what_to_do(priced, run):
    def said(work, **how):
        with pytest.raises(ApiError) as told:
            ask(how.pop("engine", priced), work, **how)
        return str(told.value)

    assert "k" in said(lambda api: api.page("u", 10_000, None))
    assert "not in the request log" in said(lambda api: api.explain("no-such-request"))
    assert "publish runs to a place" in said(lambda api: api.snapshots())
    with Engine.load(run) as plain:
        assert "not calibrated" in said(lambda api: api.set_budget(Limits(ms=1.0)), engine=plain)
    shut = ServerConfig()
    for work in (lambda api: api.budget(), lambda api: api.health(), lambda api: api.snapshots()):
        assert "start it with --admin" in said(work, config=shut)


def test_keys(priced, tmp_path):
    file = tmp_path / "keys.json"
    keys = {role: add_key(file, role, role, cost=2**10)[1] for role in ("read", "admin")}
    config = ServerConfig(admin=True, keys=file)
    assert ask(priced, lambda api: api.budget(), config=config, key=keys["admin"]).is_calibrated
    assert ask(priced, lambda api: api.page("user-3", 2, None), config=config, key=keys["read"]).items
    for key, words in ((None, "wants a key"), (keys["read"], "wants another key")):
        with pytest.raises(ApiError, match=words) as told:
            ask(priced, lambda api: api.budget(), config=config, key=key)
        assert told.value.status in (401, 403)


def test_nobody_there_nonsense_and_another_version_are_told_in_a_sentence():
    async def away():
        async with Api(Target(server="http://127.0.0.1:9")) as api:
            await api.budget()

    with pytest.raises(ApiError, match="does not answer; start it"):
        asyncio.run(away())
    for content in (b"<html>", b"{}", b'{"snapshot_version": 3}'):
        with pytest.raises(ApiError, match="can not be read"):
            asyncio.run(answering(200, content).budget())
    with pytest.raises(ApiError, match="status 502"):
        asyncio.run(answering(502, b"<html>bad gateway").health())
    more = {"snapshot_version": "v", "is_calibrated": False, "why": "no", "something_new": 1}
    assert not asyncio.run(answering(200, json.dumps(more).encode()).budget()).is_calibrated


def test_inner_paths_go_to_the_admin_port():
    target = Target(server="http://a:1/", admin="http://b:2/")
    assert target.base("/metrics") == target.base("/v1/admin/budget") == "http://b:2"
    assert target.base("/v1/recommend") == target.base("/v1/experiments") == "http://a:1"
    for bad in ("127.0.0.1:8000", "ftp://x", "http://", "http://x?y"):
        with pytest.raises(ConfigError, match="--server must be an address"):
            Target(server=bad)


def test_a_report_is_read_from_a_file_and_nothing_else_is():
    point = {"arm": "dcaf", "ms": 1.0, "mflop": 2.0, "worth": {"mean": 0.5, "low": 0.4, "high": 0.6}, "gain": None}
    chain = {"name": "a0", "ms": 1.0, "mflop": 2.0, "worth": 0.5}
    frontier = {"resource": "ms", "chains": [chain], "points": [point], "num_requests": 9}
    content = {"run": "r", "window": "test", "sentence": "It saves.", "calibration": {}, "frontier": frontier}
    report = read_report(json.dumps(content).encode())
    assert report.frontier.points[0].worth.mean == 0.5
    with pytest.raises(ConfigError, match=r"no budget\.json"):
        read_report(b"[]")
