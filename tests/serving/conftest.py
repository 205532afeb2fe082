"""One small run, trained once for all tests of the server."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from engine_support import trained_shop
from shortlist.cascade.allocation.calibration import allocation_path, calibrate, save_allocation
from shortlist.cascade.engine import Engine
from shortlist.cascade.run import load_run
from shortlist.serving.app import create_app
from shortlist.serving.settings import ServerConfig

TRAINED = """
[surface]
k = 6
[trainer]
epochs = 2
[stages.retrieval]
systems = ["counts", "popularity"]
keep = 25
[stages.ranking]
systems = ["dnn"]
keep = 12
[stages.re-ranking]
systems = ["mmr"]
[systems.dnn]
dim = 4
widths = [8]
max_history = 10
"""

OFFERING = """
[surface]
k = 5
[data]
valid_share = 0.2
[trainer]
epochs = 1
[stages.retrieval]
systems = ["counts", "popularity"]
keep = 18
offers = [{systems = ["popularity"], keep = 9}]
[stages.ranking]
systems = ["dnn"]
keep = 8
offers = [{systems = ["counts"], keep = 8}]
[systems.dnn]
dim = 4
widths = [8]
[allocation]
system = "dcaf"
max_requests = 60
"""


def train(folder: Path, seed: int, settings: str = TRAINED) -> Path:
    return trained_shop(folder, settings, seed)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Folder of a trained run."""
    return train(tmp_path_factory.mktemp("runs") / "first", 0)


@pytest.fixture(scope="session")
def other_run(tmp_path_factory):
    """Folder of another one on another year."""
    return train(tmp_path_factory.mktemp("runs") / "second", 1)


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory):
    """Folder of a run with four chains, calibrated."""
    folder = train(tmp_path_factory.mktemp("runs") / "calibrated", 0, OFFERING)
    save_allocation(allocation_path(folder), calibrate(load_run(folder)))
    return folder


@pytest.fixture
def engine(run, tmp_path):
    with Engine.load(run, events=tmp_path / "events.db", request_log=tmp_path / "requests.db") as engine:
        yield engine


@pytest.fixture
def client(engine):
    with TestClient(create_app(engine, ServerConfig(max_body_bytes=50_000, max_events=100))) as client:
        yield client


@pytest.fixture(scope="session")
def reader(run, tmp_path_factory):
    """A client for tests that leave nothing behind."""
    folder = tmp_path_factory.mktemp("reader")
    with Engine.load(run, events=folder / "events.db") as engine:
        config = ServerConfig(max_body_bytes=50_000, max_events=100)
        with TestClient(create_app(engine, config)) as client:
            yield client
