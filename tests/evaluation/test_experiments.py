"""Reports of experiments: outcomes against hand-made logs, and what is said of planted truths."""

import json

import numpy as np
import polars as pl
import pytest

from cli_support import refused, succeeds
from shortlist.cascade.experiments import Metric, read_experiments
from shortlist.cascade.exposures import Exposure, write_experiments, write_stop
from shortlist.cascade.request_log import RequestLog
from shortlist.cascade.trials import ALONE
from shortlist.errors import ConfigError, DataError
from shortlist.evaluation.experiment_page import findings_text, render
from shortlist.evaluation.experiments import findings, outcomes, page_table, read_events, report
from shortlist.store.events import Event, EventStore

HOUR = 3_600_000
TEXT = """
[experiments.x]
primary = "clicks"
hours = 1.0
planned = 2000
[experiments.x.variants.old]
[experiments.x.variants.new]
[experiments.x.metrics.clicks]
of = "converted"
actions = ["click"]
[experiments.x.metrics.money]
of = "value"
shown = false
[experiments.x.guardrails.speed]
metric = "spent_ms"
bad = "up"
margin = 1.0
"""
DRAFT = """
[experiments.d]
interleave = true
hours = 1.0
planned = 1000
[experiments.d.variants.old]
[experiments.d.variants.new]
chain = "c"
"""


def seen(unit, at, variant="old", items=("a", "b"), **more):
    base = {"request_id": f"{unit}-{at}", "experiment": "x", "propensity": 0.5, "spent_ms": 2.0, "degraded": False}
    return Exposure(**{**base, "unit": unit, "at_ms": at, "variant": variant, "items": tuple(items), **more})


def happened(*rows):
    names = ["unit", "item", "time", "action", "value"]
    types = [pl.String, pl.String, pl.Int64, pl.String, pl.Float64]
    return pl.DataFrame(list(rows), schema=dict(zip(names, types)), orient="row")


@pytest.fixture(scope="module")
def experiment():
    return read_experiments(TEXT)["x"]


def by_metric(found, variant="new"):
    return {one.metric: one for one in found.differences if one.variant == variant}


def test_outcomes_by_hand(experiment):
    """What counts: after the page that showed it, within the hour, of the kind that is meant."""
    exposures = [
        seen("u", 1_000, items=("a", "b")),
        seen("u", 5_000, items=("c",), spent_ms=4.0, degraded=True),
        seen("v", 2_000, "new", spent_ms=7.0),
        seen("late", 10 * HOUR, "new"),
        seen("both", 1_000, "old"),
        seen("both", 2_000, "new"),
    ]
    events = happened(
        ("u", "a", 1_500, "click", 1.0),
        ("u", "b", 1_600, "click", 1.0),
        ("u", "c", 4_000, "click", 1.0),  # before the page that showed it
        ("u", "z", 3_000, "buy", 20.0),  # never shown
        ("u", "a", 900, "click", 1.0),  # before any page
        ("u", "a", 1_000 + HOUR, "click", 1.0),  # too late
        ("v", "a", 3_000, "view", 5.0),
        ("other", "a", 3_000, "click", 1.0),
    )
    found = findings(experiment, page_table(exposures), events, until_ms=9 * HOUR)
    assert (found.units, found.units_open, found.units_mixed) == (2, 1, 1)
    clicks, money, ms, degraded = (by_metric(found)[m] for m in ("clicks", "money", "spent_ms", "degraded"))
    assert (clicks.control_mean, clicks.variant_mean) == (1.0, 0.0)
    assert (money.control_mean, money.variant_mean) == (23.0, 5.0)
    assert (ms.control_mean, ms.variant_mean) == (3.0, 7.0)
    assert (degraded.control_mean, degraded.variant_mean) == (0.5, 0.0)
    assert clicks.low is None
    assert [(arm.variant, arm.units, arm.pages) for arm in found.arms] == [("old", 2, 3), ("new", 2, 3)]
    assert "too few units differ" in " ".join(found.sentences)
    assert "1 units saw several variants" in " ".join(found.sentences)


def test_events_are_counted_once_and_the_nameless_have_none(experiment):
    units = pl.DataFrame({"unit": ["u", ALONE + "1"], "variant": ["old", "new"]})
    pages = pl.DataFrame(
        {"unit": ["u", "u", ALONE + "1"], "at": [1, 2, 3], "items": [["a"], ["a"], ["a"]], "spent_ms": [1.0, 2.0, 9.0]}
    )
    events = happened(("u", "a", 5, "click", 2.0), ("u", "a", 6, "click", 3.0))
    assert outcomes(Metric(of="events"), units, pages, events)["value"].to_list() == [2.0]
    assert outcomes(Metric(of="value"), units, pages, events)["value"].to_list() == [5.0]
    assert outcomes(Metric(of="converted"), units, pages, events)["value"].to_list() == [1.0]
    assert outcomes(Metric(of="spent_ms"), units, pages, events)["value"].to_list() == [1.5, 9.0]


def planted(num_units, rate_old, rate_new, *, seed=0, ms=(2.0, 2.0), share_new=0.5):
    rng = np.random.default_rng(seed)
    is_new = rng.random(num_units) < share_new
    exposures = [
        seen(f"u{n}", n * 10, "new" if new else "old", spent_ms=float(ms[new] + rng.exponential(0.5)))
        for n, new in enumerate(is_new.tolist())
    ]
    clicked = rng.random(num_units) < np.where(is_new, rate_new, rate_old)
    return page_table(exposures), happened(*((f"u{n}", "a", n * 10 + 5, "click", 1.0) for n in np.flatnonzero(clicked)))


def test_a_better_variant_is_found_and_no_guardrail_is_crossed(experiment):
    found = findings(experiment, *planted(4_000, 0.2, 0.3), until_ms=9 * HOUR)
    clicks = by_metric(found)["clicks"]
    assert clicks.is_sure
    assert clicks.low < 0.1 < clicks.high
    assert found.harm is None
    assert found.mismatch.p_value > 0.01
    assert "higher" in found.sentences[0]


def test_a_slow_variant_crosses_the_guardrail_beyond_its_margin_only(experiment):
    slow = findings(experiment, *planted(3_000, 0.2, 0.2, ms=(2.0, 4.0)), until_ms=9 * HOUR)
    assert slow.harm == "guardrail crossed: speed by new (spent_ms up)"
    bearable = findings(experiment, *planted(3_000, 0.2, 0.2, ms=(2.0, 2.5)), until_ms=9 * HOUR)
    assert bearable.harm is None
    assert by_metric(bearable)["spent_ms"].is_sure


def test_lost_units_are_told_before_anything_else(experiment):
    found = findings(experiment, *planted(4_000, 0.2, 0.2, share_new=0.4), until_ms=9 * HOUR, stopped="by hand")
    assert found.sentences[0] == "Stopped: by hand."
    assert "The shares are wrong" in found.sentences[1]
    assert found.mismatch.p_value < 1e-6


def test_credit_goes_to_the_team_of_the_newest_page_before():
    draft = read_experiments(DRAFT)["d"]
    pages = [
        seen("u", 1_000, "interleaved", "abc", teams=(0, 1, 0)),
        seen("u", 2_000, "interleaved", "bad", teams=(0, 1, 1)),
        seen("v", 1_000, "interleaved", "ab", teams=(0, 1)),
    ]
    events = happened(
        ("u", "b", 1_500, "click", 1.0),  # of the first page: new's
        ("u", "b", 2_500, "click", 1.0),  # of the second: old's
        ("u", "b", 2_600, "click", 1.0),  # again: counts once
        ("u", "a", 2_700, "click", 1.0),  # of the second: new's
        ("u", "z", 2_700, "click", 1.0),
    )
    found = findings(draft, page_table(pages), events, until_ms=2 * HOUR)
    told = found.preference
    assert (told.taken_first, told.taken_second, told.units) == (1, 2, 1)
    assert told.preference == pytest.approx(1 / 3)
    assert told.low is None
    assert found.differences == []
    assert found.mismatch is None


def test_a_preferred_team_is_found_and_random_clicks_prefer_none():
    draft = read_experiments(DRAFT)["d"]
    rng = np.random.default_rng(0)
    pages, liked, random = [], [], []
    for n in range(1_500):
        teams = tuple(rng.permutation([0, 0, 1, 1]).tolist())
        pages.append(seen(f"u{n}", n, "interleaved", "abcd", teams=teams))
        place = rng.integers(4)
        random.append((f"u{n}", "abcd"[place], n + 5, "click", 1.0))
        if teams[place] == 1 or rng.random() < 0.6:
            liked.append(random[-1])
    better = findings(draft, page_table(pages), happened(*liked), until_ms=9 * HOUR)
    assert "new is preferred" in better.sentences[0]
    none = findings(draft, page_table(pages), happened(*random), until_ms=9 * HOUR)
    assert none.preference.low < 0 < none.preference.high
    assert "no preference known" in none.sentences[0]


@pytest.fixture
def files(tmp_path, experiment):
    """A request log and an event store as a server leaves them."""
    pages, events = planted(300, 0.2, 0.6)
    log = RequestLog(tmp_path / "requests.db")
    log.expose(
        [
            seen(u, at, variant, spent_ms=ms)
            for u, variant, at, ms in pages.select("unit", "variant", "at", "spent_ms").iter_rows()
        ]
    )
    log.close()
    write_experiments(tmp_path / "requests.db", [experiment])
    store = EventStore(tmp_path / "events.db")
    store.append([Event(user=u, item=i, timestamp=t / 1000, action=a, value=v) for u, i, t, a, v in events.iter_rows()])
    store.append([Event(user="u0", item="q", timestamp=2 * HOUR / 1000, action="view")])
    store.close()
    return tmp_path, pages, events


def test_files_of_a_server_give_what_arrays_give(files, experiment):
    folder, pages, events = files
    found = report(folder / "requests.db", folder / "events.db")[0]
    same = findings(experiment, pages, events, until_ms=2 * HOUR)
    assert by_metric(found)["clicks"] == by_metric(same)["clicks"]
    events.select(
        user_id="unit", item_id="item", timestamp=pl.from_epoch("time", "ms"), action="action", value="value"
    ).write_parquet(folder / "events.parquet")
    again = report(folder / "requests.db", folder / "events.parquet", "x", until_ms=2 * HOUR)[0]
    assert by_metric(again)["clicks"] == by_metric(same)["clicks"]
    blind = report(folder / "requests.db", None, until_ms=2 * HOUR)[0]
    assert by_metric(blind)["clicks"].variant_mean == 0
    assert by_metric(blind)["spent_ms"] == by_metric(same)["spent_ms"]


def test_the_command_says_it_in_text_json_and_on_a_page(files):
    folder, *_ = files
    write_stop(folder / "requests.db", "x", "enough <seen>", 1)
    ask = ["experiment", "report", "--log", str(folder / "requests.db"), "--events", str(folder / "events.db")]
    said = succeeds(*ask, "--out", str(folder / "out")).out
    assert "Stopped: enough <seen>." in said
    assert "clicks" in said
    page = (folder / "out" / "experiments.html").read_text()
    assert "Stopped: enough &lt;seen&gt;." in page
    told = json.loads(succeeds(*ask, "--experiment", "x", "--json").out)
    assert told == json.loads((folder / "out" / "experiments.json").read_text())
    assert told["experiments"][0]["stopped"] == "enough <seen>"
    (folder / "x.toml").write_text(TEXT)
    checked = succeeds("experiment", "check", str(folder / "x.toml")).out
    assert "x: old 50.0%, new 50.0% of 100.0% on recommend; decided by clicks" in checked


def test_the_command_refuses_with_a_sentence(files):
    folder, *_ = files
    assert "name the request log" in refused("experiment", "report")
    assert "name the file to check" in refused("experiment", "check")
    assert "no such file" in refused("experiment", "report", "--log", folder / "none.db")
    assert "no experiment 'y'" in refused("experiment", "report", "--log", folder / "requests.db", "--experiment", "y")


def test_pages_that_are_gone_are_told(files):
    folder, *_ = files
    log = RequestLog(folder / "requests.db")
    log.forget("u7")
    log.close()
    found = report(folder / "requests.db", None)[0]
    assert found.exposures_gone == 1
    assert "1 older pages of the log are gone" in " ".join(found.sentences)


def test_pieces_are_one_table(monkeypatch):
    from shortlist.evaluation import experiments

    exposures = [seen(f"u{n}", n, teams=(0, 1)) for n in range(7)]
    whole = page_table(exposures)
    monkeypatch.setattr(experiments, "_PIECE", 3)
    assert page_table(exposures).equals(whole)
    assert whole["number"].to_list() == list(range(7))


def test_what_is_not_there_is_told(files, tmp_path):
    folder, *_ = files
    with pytest.raises(DataError, match="no such file"):
        report(tmp_path / "none.db", None)
    with pytest.raises(ConfigError, match="no experiment 'y'"):
        report(folder / "requests.db", None, "y")
    with pytest.raises(DataError, match="no such file"):
        read_events(folder / "none.db", ["u"])
    RequestLog(tmp_path / "empty.db").close()
    with pytest.raises(DataError, match="has no experiments"):
        report(tmp_path / "empty.db", None)


def test_an_experiment_that_nobody_saw_yet_has_a_report(experiment):
    found = findings(experiment, page_table([]), happened())
    assert found.units == 0
    assert "nothing is known of new" in found.sentences[0]
    assert "x: 0 units" in findings_text([found])
    assert "<h1>Experiments</h1>" in render([found])
