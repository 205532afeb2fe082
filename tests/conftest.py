"""For all tests: one thread, since two make tiny tensors many times slower on a busy machine and no test measures speed."""

import tempfile

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_measuring_lock(tmp_path_factory):
    """Tests do not wait, perhaps for hours, for a measurement that holds this machine's lock: theirs stands in a folder of their own."""
    folder = tmp_path_factory.mktemp("lock")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", None)
        yield
