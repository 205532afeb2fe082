"""`shortlist datasets`: what is there, what is missing and where it can be had."""

import re

import pytest

from cli_support import succeeds
from shortlist.data.datasets import data_sets, names


@pytest.fixture
def root(tmp_path, monkeypatch):
    (tmp_path / "ml-100k").mkdir()
    (tmp_path / "ml-100k" / "u.data").write_text("1\t1\t3\t978300760\n")
    (tmp_path / "ratings.dat").write_text("1::1::3::978300760\n")
    monkeypatch.setenv("SHORTLIST_DATA", str(tmp_path))
    return tmp_path


def test_json_says_where_each_set_is(root):
    listed = {row["name"]: row for row in succeeds("datasets", "--json").json}
    assert tuple(listed) == names()
    found = {name: row["found"] for name, row in listed.items() if row["found"]}
    assert found == {
        "builtin": "package",
        "ml-100k": str(root / "ml-100k" / "u.data"),
        "ml-1m": str(root / "ratings.dat"),
    }
    assert listed["ml-100k"]["num_users"] == 943


def test_text_tells_a_stranger_how_to_get_the_rest(root):
    said = succeeds("datasets").out
    assert said.startswith(f"SHORTLIST_DATA is {root}\n")
    assert f"Found: {root}/ml-100k/u.data" in said
    paragraph = next(part for part in said.split("\n\n") if part.startswith("ml-latest-small"))
    assert "https://files.grouplens.org/datasets/movielens/ml-latest-small.zip" in paragraph
    assert f"into ml-latest-small/ below {root}/" in paragraph
    for facts in data_sets():
        assert re.search(rf"^{facts.name} +{facts.num_events:,} events", said, re.MULTILINE)
        assert facts.licence in said


def test_without_a_folder_of_data(monkeypatch):
    monkeypatch.delenv("SHORTLIST_DATA", raising=False)
    said = succeeds("datasets").out
    assert said.startswith("SHORTLIST_DATA is not set\n")
    assert said.count("Missing: download") == len(data_sets()) - 1
    assert "Comes with the package." in said
