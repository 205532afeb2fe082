"""For all tests: one thread, since two make tiny tensors many times slower on a busy machine and no test measures speed."""

import tempfile

import pytest
import torch

import services

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_measuring_lock(tmp_path_factory):
    """Tests do not wait, perhaps for hours, for a measurement that holds this machine's lock: theirs stands in a folder of their own."""
    folder = tmp_path_factory.mktemp("lock")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", None)
        yield


@pytest.fixture(scope="session")
def postgres():
    """A real PostgreSQL server; installed where it is missing."""
    yield from _running(services.Postgres)


@pytest.fixture(scope="session")
def redis_server():
    """A real Redis server; installed where it is missing."""
    yield from _running(services.Redis)


def _running(kind):
    try:
        services.install()
        service = kind()
    except services.CanNotBeHad as error:
        pytest.skip(str(error))
    try:
        service.start()
        yield service
    finally:
        service.close()
