"""Real servers of a place: one and several processes, swapped under requests, stopped, orphaned, and one worker killed."""

import http.client
import json
import os
import re
import signal
import threading
import time

import pytest

from cli_support import started
from shortlist.cli import main
from shortlist.store.published import Place
from shortlist.store.snapshot import read_snapshot


def children(process):
    """Process ids of the workers: children that hold the port, the resource tracker of Python being none."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as stat, open(f"/proc/{name}/cmdline") as line:
                    if int(stat.read().rpartition(")")[2].split()[1]) == process.pid and "spawn_main" in line.read():
                        found.append(int(name))
            except OSError:
                continue
    return sorted(found)


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(true, seconds=30.0):
    """Wait for something to come true; whether it did."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture
def place(run, other_run, tmp_path):
    place = Place(tmp_path / "place")
    place.publish(other_run)
    place.publish(run)
    return place


@pytest.fixture
def start(place, tmp_path):
    """Starts servers of the place; each as its process and port."""
    running = []

    def begin(*options):
        process = started("serve", place.folder, "--port", 0, *options)
        running.append(process)
        line = process.stdout.readline()
        found = re.search(r"serving (\w+) at http://127\.0\.0\.1:(\d+)", line)
        assert found, line + process.stderr.read()
        return process, int(found[2]), line

    yield begin
    for process in running:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=30)


class Asking:
    """A client that asks without pause, a new connection every few requests, so that every worker is reached."""

    def __init__(self, port, user):
        self.port, self.user = port, user
        self.versions, self.errors = [], []
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._ask, daemon=True)
        self.thread.start()

    def _ask(self):
        while not self.done.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
            try:
                for _ in range(5):
                    connection.request("GET", f"/v1/recommend/{self.user}?k=3")
                    response = connection.getresponse()
                    page = json.load(response)
                    if response.status != 200 or page["degraded"] is not None or len(page["items"]) != 3:
                        self.errors.append(page)
                    self.versions.append(page["snapshot_version"])
            except Exception as error:
                self.errors.append(error)
            finally:
                connection.close()

    def stop(self):
        self.done.set()
        self.thread.join(timeout=20)


def ask(port, path="/v1/recommend/user-3?k=3", body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    data = None if body is None else json.dumps(body)
    connection.request("GET" if body is None else "POST", path, data, {"content-type": "application/json"})
    response = connection.getresponse()
    told = json.load(response)
    connection.close()
    assert response.status == 200, told
    return told


def versions_met(port):
    """By a dozen connections in a row."""
    return {ask(port)["snapshot_version"] for _ in range(12)}


def test_two_workers_follow_the_place_and_lose_no_request(start, place, run, other_run):
    """Published and rolled back under requests, in both workers; then a clean stop that leaves no process behind."""
    first, other = (read_snapshot(folder).version for folder in (run, other_run))
    process, port, line = start("--workers", 2, "--admin")
    assert line.startswith(f"serving {first}")
    assert "with 2 workers" in line
    workers = children(process)
    assert len(workers) == 2
    clients = [Asking(port, f"user-{n}") for n in range(2)]
    for wanted in (other, first):
        place.select(wanted)
        assert until(lambda wanted=wanted: versions_met(port) == {wanted})
        asked = [len(client.versions) for client in clients]
        assert until(lambda asked=asked: all(len(c.versions) > before for c, before in zip(clients, asked)))
    told = ask(port, "/v1/admin/rollback", {})
    assert told["current"] == told["serving"] == other
    assert until(lambda: versions_met(port) == {other})
    for client in clients:
        client.stop()
        assert client.errors == []
    assert {version for client in clients for version in client.versions} == {first, other}
    known = ask(port)["num_history"]
    assert ask(port, "/v1/events", {"user": "user-3", "item": 130})["num_new"] == 1
    assert {ask(port)["num_history"] for _ in range(12)} == {known + 1}  # what one worker is told, the other knows
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert not any(is_alive(pid) for pid in workers)


def test_a_dead_worker_is_replaced_and_none_outlives_the_parent(start):
    process, port, _ = start("--workers", 2)
    workers = children(process)
    os.kill(workers[0], signal.SIGKILL)  # started first, so worker 0, as long as process ids rise
    assert until(lambda: len(children(process)) == 2 and workers[0] not in children(process))
    assert f"worker 0 ended (exit code {-signal.SIGKILL}) and is replaced" in process.stdout.readline()
    assert ask(port)["degraded"] is None
    workers = children(process)
    process.kill()  # no chance to tell anybody
    assert until(lambda: not any(is_alive(pid) for pid in workers))


def test_what_can_not_be_served_is_said_once(tmp_path, capfd):
    with pytest.raises(SystemExit, match="2"):
        main(["serve", str(tmp_path / "nothing"), "--port", "0", "--workers", "2"])
    assert capfd.readouterr().err.count("nothing is not a snapshot") == 1
