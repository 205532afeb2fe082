import pytest

from cli_support import train_shop


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    """Folder of a run of the planted shop; its tables and settings stand two folders above."""
    return train_shop(tmp_path_factory.mktemp("shop"))
