"""The guard around a real process: two ports, keys, bounded heads, logs that a machine can read."""

import http.client
import json
import re
import signal
import socket
import urllib.error
import urllib.request

import pytest

from cli_support import refused, started
from shortlist.serving.keys import add_key


@pytest.fixture(scope="module")
def guarded(run, tmp_path_factory):
    """The process, its outer and inner address, and keys by role."""
    folder = tmp_path_factory.mktemp("guarded")
    keys = {role: add_key(folder / "keys.json", role, role, cost=2**10)[1] for role in ("read", "admin")}
    files = ("--events", folder / "events.db", "--request-log", folder / "requests.db", "--keys", folder / "keys.json")
    process = started("serve", run, "--port", 0, "--admin-port", 0, "--host", "0.0.0.0", "--log-requests", *files)
    line = process.stdout.readline()
    found = re.search(r"at http://0\.0\.0\.0:(\d+) \(docs.*\); metrics and admin at (http://127\.0\.0\.1:\d+)", line)
    assert found, line + process.stderr.read()
    yield process, f"http://127.0.0.1:{found[1]}", found[2], keys
    if process.poll() is None:
        process.kill()
        process.communicate()


def call(address, path, key=None, **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(address + path, headers=named | ({"x-api-key": key} if key else {}))
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, dict(response.headers), response.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def test_beyond_this_machine_only_with_keys(run, tmp_path):
    for options in (["--host", "0.0.0.0"], ["--admin-port", 0, "--admin-host", "0.0.0.0"]):
        said = refused("serve", run, "--port", 0, "--events", tmp_path / "events.db", *options)
        assert "shortlist keys add NAME --role read" in said
    assert "no such file" in refused("serve", run, "--port", 0, "--keys", tmp_path / "keys.json")
    assert not list(tmp_path.iterdir())


def test_two_ports_of_one_process(guarded):
    _, outer, inner, keys = guarded
    assert call(outer, "/v1/health/live")[0] == call(inner, "/v1/health/live")[0] == 200
    assert call(outer, "/v1/recommend/user-3")[0] == 401
    status, headers, page = call(outer, "/v1/recommend/user-3", keys["read"], x_request_id="trace-9")
    assert status == 200
    assert headers["x-request-id"] == "trace-9"
    assert "server" not in {name.lower() for name in headers}
    assert len(json.loads(page)["items"]) == 6
    assert call(outer, "/metrics", keys["admin"])[0] == 404
    assert call(inner, "/metrics")[0] == 401
    status, _, numbers = call(inner, "/metrics", keys["read"])
    assert status == 200
    assert b"shortlist_http_requests_total" in numbers
    assert call(inner, "/v1/recommend/user-3", keys["admin"])[0] == 404


def test_heads_are_bounded(guarded):
    _, outer, _, keys = guarded
    host, port = outer.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as line:
        line.sendall(b"GET /v1/health/live HTTP/1.1\r\nhost: x\r\n" + b"x-filler: " + b"y" * 40_000)
        assert line.recv(4_096).startswith(b"HTTP/1.1 400")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    connection.request("GET", "/v1/recommend/" + "%F0%9F%90%88" * 512, headers={"x-api-key": keys["read"]})
    assert connection.getresponse().status == 200  # the longest id of the widest letters fits
    connection.close()


def test_what_is_logged_is_json_and_nobody_is_in_it(guarded):
    process, outer, _, keys = guarded
    call(outer, "/v1/recommend/somebody-private?k=2", keys["read"])
    call(outer, "/v1/recommend/somebody-private?k=0", keys["read"])
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0
    lines = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    requests = [line for line in lines if line["event"] == "request"]
    assert [line["status"] for line in requests[-2:]] == [200, 422]
    assert requests[-1]["key"] == keys["read"].split("_")[1]
    assert all(line["request_id"] for line in requests)
    for secret in ("somebody-private", keys["read"][12:], "127.0.0.1"):
        assert secret not in err
