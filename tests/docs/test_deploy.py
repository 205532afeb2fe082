"""What deploy/ holds agrees with the program: options exist, nobody is root, health is asked for, and a backup can be read."""

import json
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import typer

from shortlist.cli import build
from shortlist.store.events import Event, EventStore

DEPLOY = Path(__file__).parents[2] / "deploy"
UNIT, IMAGE = DEPLOY / "shortlist.service", DEPLOY / "Dockerfile"


def served(words):
    """Options of `shortlist serve`, read as the command line reads them."""
    assert words[0] == "serve"
    command = typer.main.get_command(build("serve")).commands["serve"]
    return command.make_context("serve", list(words[1:])).params


def instructions():
    """Of the Dockerfile, in order: name and text, continued lines joined."""
    lines = IMAGE.read_text().replace("\\\n", " ").splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line and not line.startswith("#")]


def instruction(name):
    return [text for found, text in instructions() if found == name]


def setting(name):
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)


def test_the_unit_serves_a_place_with_keys_and_limits():
    words = shlex.split(setting("ExecStart")[0])
    assert words[0] == "/opt/shortlist/bin/shortlist"
    options = served(words[1:])
    folder = Path("/var/lib") / setting("StateDirectory")[0]
    assert options["run"].parent == options["keys"].parent == folder
    assert options["time_limit_ms"] == 500
    assert options["admin_port"] == 9100
    assert options["host"] == options["admin_host"] == "127.0.0.1"
    assert setting("User") == ["shortlist"]
    assert float(setting("TimeoutStopSec")[0]) > 20  # longer than the server gives requests and itself
    assert not setting("MemoryDenyWriteExecute")  # PyTorch writes code and runs it


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
def test_systemd_takes_the_unit_and_finds_it_closed(tmp_path):
    copy = tmp_path / UNIT.name
    text = UNIT.read_text().replace("/opt/shortlist/bin/shortlist", sys.executable)
    copy.write_text(re.sub(r"^(User|Group)=.*$", r"\1=daemon", text, flags=re.MULTILINE))
    checked = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, timeout=60)
    about_it = [line for line in checked.stderr.splitlines() if UNIT.name in line]
    assert not about_it
    words = ["systemd-analyze", "security", "--offline=true", "--threshold=20", copy]
    judged = subprocess.run(words, capture_output=True, text=True, timeout=60)
    if "unrecognized option" in judged.stderr:
        pytest.skip("systemd is too old to judge a file")
    assert judged.returncode == 0, judged.stdout[-500:]


def test_the_image_serves_with_keys_as_nobody_special():
    assert instruction("FROM")[-1] == "docker.io/library/python:3.11-slim"
    assert instruction("USER") == ["10001:10001"]
    names = [name for name, _ in instructions()]
    assert names.index("USER") > max(n for n, name in enumerate(names) if name in ("COPY", "RUN"))
    assert json.loads(instruction("ENTRYPOINT")[0]) == ["shortlist"]
    options = served(json.loads(instruction("CMD")[0]))
    assert options["host"] == "0.0.0.0"
    volume = Path(instruction("VOLUME")[0])
    assert options["keys"].parent == options["run"].parent == volume
    assert {options["port"], options["admin_port"]} == set(map(int, instruction("EXPOSE")[0].split()))
    for source in " ".join(instruction("COPY")).split():
        if not source.startswith(("-", "/", ".")):
            assert (DEPLOY.parent / source).exists(), source
    wanted = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in wanted if line.startswith("!")} == {
        "pyproject.toml", "constraints.txt", "README.md", "LICENSE", "src",
    }  # fmt: skip


def test_the_images_extras_exist():
    extras = re.search(r"'\.\[([\w,]+)\]'", " ".join(instruction("RUN")))[1].split(",")
    declared = (DEPLOY.parent / "pyproject.toml").read_text()
    for extra in extras:
        assert re.search(rf"^{extra} = \[", declared, re.MULTILINE), extra


def test_the_health_check_tells_a_server_that_is_ready_from_one_that_is_not():
    """The image's own line, asked of a server that answers 200, then 503."""
    from http.server import BaseHTTPRequestHandler, HTTPServer

    check = instruction("HEALTHCHECK")[0]
    words = json.loads(check[check.index("[") :])
    answers = [200, 503]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.path == "/v1/health/ready"
            self.send_response(answers.pop(0))
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code = words[2].replace(":8000/", f":{server.server_port}/")
        assert code != words[2]
        codes = [subprocess.run([sys.executable, *words[1:2], code], capture_output=True).returncode for _ in range(2)]
        server.shutdown()
    assert codes[0] == 0
    assert codes[1] != 0


def test_a_backup_taken_while_events_come_is_whole(tmp_path):
    """The page's VACUUM INTO, and what it warns of: the file alone lacks what stands in its -wal."""
    store = EventStore(tmp_path / "events.db")
    done, count = threading.Event(), [0]

    def write():
        while not done.is_set():
            store.append([Event(user="u", item=str(count[0]), timestamp=1.7e9 + count[0])])
            count[0] += 1

    writer = threading.Thread(target=write)
    writer.start()
    while count[0] < 20:
        pass
    before = count[0]
    with sqlite3.connect(tmp_path / "events.db") as file:
        file.execute(f"VACUUM INTO '{tmp_path / 'backup.db'}'")
    after = count[0] + 1
    done.set()
    writer.join()
    store.close()
    restored = EventStore(tmp_path / "backup.db")
    assert before <= len(restored) <= after
    assert restored.history(["u"]).item == [str(n) for n in range(len(restored))][-1_000:]
    restored.close()
