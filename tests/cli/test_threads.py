"""`--threads`: how many PyTorch works with, wherever something is trained or asked."""

import pytest
import torch

from cli_support import shortlist, succeeds, train_shop


@pytest.fixture(autouse=True)
def put_back():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return train_shop(tmp_path_factory.mktemp("threads"), "counted")


@pytest.mark.parametrize("count", [1, 2])
def test_commands_work_with_so_many(folder, count):
    torch.set_num_threads(3 - count)
    for words in (("evaluate", folder), ("compare", folder, "popularity")):
        succeeds(*words, "--threads", count)
        assert torch.get_num_threads() == count


def test_without_it_nothing_changes(folder):
    before = torch.get_num_threads()
    succeeds("evaluate", folder)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("command", ["train", "tune", "demo", "evaluate", "compare", "serve"])
def test_every_command_that_computes_has_it(command):
    assert "--threads" in succeeds(command, "--help").out


def test_none_is_refused(folder):
    ended = shortlist("evaluate", folder, "--threads", 0)
    assert ended.code == 2
    assert "Invalid value for '--threads'" in ended.err
