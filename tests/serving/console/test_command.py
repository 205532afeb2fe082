"""`shortlist console` refuses in one sentence what it can not do; and what comes from a server stays text."""

import math
import socket

import pytest

from cli_support import refused
from shortlist.errors import ConfigError
from shortlist.serving.console import look
from shortlist.serving.console.client import Api, Target


def test_wrong_addresses_ports_and_files(tmp_path):
    assert "--server must be an address" in refused("console", "--server", "localhost:8000")
    assert "--admin must be an address" in refused("console", "--admin", "8001")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "--port" in refused("console", "--port", taken.getsockname()[1])
    assert "can not be used" in refused("console", "--curve", tmp_path / "none.json")
    (tmp_path / "other.json").write_text("[]")
    assert "no budget.json" in refused("console", "--curve", tmp_path / "other.json")


def test_a_missing_extra_is_named(monkeypatch):
    def missing(name):
        raise ImportError(f"no {name}")

    monkeypatch.setattr("shortlist.extras.import_module", missing)
    with pytest.raises(ConfigError, match=r"pip install 'shortlist\[console\]'"):
        Api(Target(server="http://x"))


def test_what_a_server_says_stays_text():
    evil = "<script>x</script>\"'"
    for made in (
        look.paragraph(evil, evil),
        look.tiles({evil: evil}),
        look.table(evil, [evil, evil], [[evil, evil]], words=[1]),
    ):
        assert "<script" not in made
        assert made.count('"') % 2 == 0
    assert look.table("t", ["a"], []) == look.tables("", "") == ""


@pytest.mark.parametrize(
    ("value", "unit", "told"),
    [
        (0.0, "/s", "0 /s"),
        (0.0012345, "ms", "0.00123 ms"),
        (9.876, "ms", "9.88 ms"),
        (42.2157, "ms", "42.2 ms"),
        (123456.7, "", "123,457"),
        (-0.5, "", "-0.500"),
        (math.nan, "ms", "–"),
        (math.inf, "ms", "any"),
        (None, "ms", "–"),
    ],
)
def test_numbers_have_three_digits_and_a_unit(value, unit, told):
    assert look.number(value, unit) == told


def test_shares_and_sentences():
    assert [look.share(v) for v in (0.0, 0.0004, 0.5, math.nan)] == ["0.0%", "under 0.1%", "50.0%", "–"]
    assert look.sentence("no budget can be kept") == "No budget can be kept."
    assert look.sentence("Done.") == "Done."
    assert (look.time_ms(math.inf), look.time_ms(math.nan), look.time_ms(12.0)) == ("over 5 s", "–", "12.0 ms")
