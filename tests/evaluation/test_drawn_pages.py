"""From drawn pages and events to off-policy estimates: rows by hand, and a known truth through the whole way."""

import numpy as np
import polars as pl
import pytest

from shortlist.cascade.experiments import random_page
from shortlist.cascade.exposures import Exposure
from shortlist.errors import DataError
from shortlist.evaluation.drawn_pages import drawn_rows, logged_rows
from shortlist.metrics.off_policy import ips, snips

HOUR = 3_600_000
COLUMNS = {"unit": pl.String, "item": pl.String, "time": pl.Int64, "action": pl.String, "value": pl.Float64}


def page(unit, at, items, chances, number=0):
    return Exposure(
        request_id=f"r{number}-{unit}", at_ms=at, experiment="x", variant="a", unit=unit, propensity=1.0, spent_ms=1.0, degraded=False,
        items=tuple(items), chances=tuple(chances),
    )  # fmt: skip


def events(*rows):
    return pl.DataFrame(list(rows), schema=COLUMNS, orient="row")


def test_rows_by_hand():
    pages = [page("u", 0, "ab", [0.5, 0.1], 1), page("u", 5_000, "bc", [0.5, 0.2], 2), page("v", 0, "ab", [], 3)]
    happened = events(
        ("u", "b", 1_000, "click", 1.0),
        ("u", "b", 6_000, "click", 1.0),
        ("u", "b", 6_000, "click", 1.0),
        ("u", "c", 6_000, "view", 1.0),
        ("u", "a", HOUR + 1_000, "click", 1.0),  # of the first page, and too late for it
        ("v", "a", 10, "click", 1.0),
    )
    rows = drawn_rows(pages, happened, hours=1, actions=["click"])
    assert rows.rows() == [
        ("r1-u", "u", 0, "a", 0.5, 0.0),
        ("r1-u", "u", 1, "b", 0.1, 1.0),
        ("r2-u", "u", 0, "b", 0.5, 1.0),
        ("r2-u", "u", 1, "c", 0.2, 0.0),
    ]
    assert drawn_rows(pages, happened, hours=1)["reward"].to_list() == [0.0, 1.0, 1.0, 1.0]
    log = logged_rows(rows, np.array([1.0, 0.0, 1.0, 0.0]))
    assert log.num_requests == 2
    assert log.weight.tolist() == [2.0, 0.0, 2.0, 0.0]


def test_pages_without_chances_are_no_log():
    with pytest.raises(DataError, match="drawn with known chances"):
        drawn_rows([page("u", 0, "ab", [])], events())


def test_a_known_truth_is_found():
    """4,000 pages, half of them drawn from 6 items; what the list as it is would bring is known."""
    rng, own, rate = np.random.default_rng(0), list("abcdef"), dict(zip("abcdef", [0.5, 0.4, 0.1, 0.3, 0.2, 0.1]))
    pages, happened = [], []
    for n in range(4_000):
        items, chances = random_page(own, 3, 0.5, rng)
        pages.append(page(f"u{n}", n, items, chances))
        happened += [
            (f"u{n}", item, n + 5, "click", 1.0)
            for place, item in enumerate(items)
            if rng.random() < rate[item] / (place + 1)
        ]
    rows = drawn_rows(pages, events(*happened))
    target = (rows["chance"] > 0.5).cast(pl.Float64).to_numpy()
    truth = 0.5 + 0.4 / 2 + 0.1 / 3
    for found in (ips(logged_rows(rows, target)), snips(logged_rows(rows, target))):
        assert abs(found.value - truth) < 3.5 * found.error
        assert found.error < 0.03
