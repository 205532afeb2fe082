"""The real thing once: a server process that starts, answers, is killed or stopped, and has lost nothing."""

import http.client
import json
import re
import signal
import socket
import sqlite3
import time
import urllib.request

import pytest

from cli_support import started
from shortlist.cascade.engine import Engine
from shortlist.cli import main
from shortlist.errors import ConfigError
from shortlist.serving.settings import ServerConfig, bind
from shortlist.store.events import EventStore


@pytest.fixture
def served(run, tmp_path):
    """A copy-free run behind a real server: the process, its address and its files."""
    events, requests = tmp_path / "events.db", tmp_path / "requests.db"
    process = started("serve", run, "--port", 0, "--events", events, "--request-log", requests)
    line = process.stdout.readline()
    found = re.search(r"serving (\w+) at (http://127\.0\.0\.1:\d+)", line)
    assert found, line + process.stderr.read()
    yield process, found[2], events, requests
    if process.poll() is None:
        process.kill()
    process.communicate()


def call(address, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data=data, headers={"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as response:
        return json.load(response)


def test_start_ask_tell_stop(served, run):
    process, address, events, requests = served
    before = call(address, "/v1/recommend/user-3?k=6")
    assert len(before["items"]) == 6
    assert call(address, "/v1/events", {"user": "user-3", "item": 130})["num_new"] == 1
    after = call(address, "/v1/recommend/user-3?k=6")
    assert 131 in [item["item_id"] for item in after["items"]]
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    with sqlite3.connect(requests) as file:  # the request log was flushed
        logged = [row[0] for row in file.execute("SELECT request_id FROM requests ORDER BY id")]
    assert logged == [before["request_id"], after["request_id"]]
    with Engine.load(run, events=events) as engine:  # and the in-process engine agrees
        assert [i.item_id for i in engine.recommend("user-3").items] == [i["item_id"] for i in after["items"]]
        assert engine.recommend("user-3").at >= after["at"]


def test_answers_do_not_wait_for_acknowledgements(served):
    """Head and body of an answer are two packets; held back by Nagle's algorithm, they take 40 ms on a kept connection."""
    connection = http.client.HTTPConnection(served[1].removeprefix("http://"))
    times = []
    for _ in range(15):
        began = time.perf_counter()
        connection.request("GET", "/v1/health/live")
        connection.getresponse().read()
        times.append(time.perf_counter() - began)
    connection.close()
    assert sorted(times)[7] < 0.03


def test_kill_9_loses_no_acknowledged_event(served):
    process, address, events, _ = served
    sent = [{"user": "u", "item": n, "event_id": str(n)} for n in range(30)]
    acknowledged = sum(call(address, "/v1/events", sent[n : n + 3])["num_new"] for n in range(0, 30, 3))
    process.kill()
    process.communicate()
    store = EventStore(events)
    assert len(store) == acknowledged == 30
    store.close()


def test_a_taken_port_is_said_at_once(run, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SystemExit, match="2"):
            main(["serve", str(run), "--port", str(port)])
    err = capsys.readouterr().err
    assert err.startswith(f"shortlist: can not listen on 127.0.0.1 port {port}: Address already in use; choose another")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["serve", "recommend"])
def test_what_is_no_run_is_said(tmp_path, name, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([name, str(tmp_path / "nothing"), *(["--port", "0"] if name == "serve" else [])])
    err = capsys.readouterr().err
    assert "nothing is not a snapshot" in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_settings_are_checked():
    for wrong in ({"port": -1}, {"port": 70_000}, {"max_body_bytes": 0}, {"num_threads": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ServerConfig(**wrong)
    with pytest.raises(ConfigError, match=r"can not listen on no\.such\.host\.invalid"):
        bind(ServerConfig(host="no.such.host.invalid"))
