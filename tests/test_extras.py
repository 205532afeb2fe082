import sys

import pytest

from shortlist.errors import ConfigError
from shortlist.extras import installed, library


def test_a_library_that_is_here_is_given_and_one_that_is_not_is_named_with_its_extra():
    assert installed("json")
    assert not installed("no_such_library")
    assert library("json.decoder", extra="tune", user="search") is sys.modules["json.decoder"]
    with pytest.raises(
        ConfigError,
        match=r"search needs the library 'no_such_library'.*install it with: pip install 'shortlist\[tune\]'",
    ):
        library("no_such_library.part", extra="tune", user="search")


def test_looking_for_a_library_does_not_import_it():
    before = set(sys.modules)
    installed("lightgbm")
    assert {name for name in set(sys.modules) - before if name.startswith("lightgbm")} == set()
