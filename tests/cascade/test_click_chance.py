"""Calibration against closed forms: planted logits are found again, isotonic against brute force, and promises come true on new data."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine_support import RUN, shop_dataset
from shortlist.cascade.build import train_cascade
from shortlist.cascade.click_chance import (
    Calibration,
    ClickConfig,
    Judged,
    calibrated,
    clicks_path,
    fit,
    fit_calibration,
    judge,
    judged_systems,
    logistic,
    reliability,
    reliability_lines,
    rising,
    wilson,
)
from shortlist.cascade.config import RunConfig
from shortlist.cascade.run import as_of
from shortlist.errors import ConfigError, DataError, SnapshotError


def clicks(rng, chance):
    return (rng.random(len(chance)) < chance).astype(np.float64)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "shop"
    return train_cascade(shop_dataset(), RunConfig.from_toml(RUN), folder, progress=False)


def test_planted_weights_are_found_again():
    rng = np.random.default_rng(0)
    x_nS = rng.normal(size=(40_000, 2))
    weight, bias = logistic(x_nS, clicks(rng, sigmoid(-2 + x_nS @ [1.5, -0.5])))
    assert weight == pytest.approx([1.5, -0.5], abs=0.06)
    assert bias == pytest.approx(-2, abs=0.06)


def test_two_groups_have_a_closed_form():
    """Of 100 items with score 0 ten were clicked, of 100 with score 1 forty: with Platt's targets the two rates are those below."""
    score = np.repeat([0.0, 1.0], 100)
    clicked = np.concatenate([np.arange(100) < 10, np.arange(100) < 40]).astype(float)
    made = fit(score[:, None], clicked, ("s",), "v", "impressions")
    yes, no = 51 / 52, 1 / 152
    expected = [0.1 * yes + 0.9 * no, 0.4 * yes + 0.6 * no]
    assert made.chances(np.array([[0.0], [1.0]])) == pytest.approx(expected, abs=1e-4)
    assert made.rate == 0.25
    assert (made.num_judged, made.num_clicked) == (200, 50)


def test_isotonic_is_the_best_rising_curve():
    """Against the closed form of the isotonic regression: max over starts of the min over ends of means."""
    rng = np.random.default_rng(1)
    z = np.round(rng.normal(size=60), 1)
    clicked = clicks(rng, sigmoid(2 * z))
    distinct = np.unique(z)
    sums = np.array([clicked[z == value].sum() for value in distinct])
    counts = np.array([(z == value).sum() for value in distinct])

    def mean(first, last):
        return sums[first : last + 1].sum() / counts[first : last + 1].sum()

    num = len(distinct)
    exact = [max(min(mean(s, e) for e in range(i, num)) for s in range(i + 1)) for i in range(num)]
    z_X, chance_X = rising(z, clicked)
    edge = 0.5 / 60
    wanted = np.unique(np.clip(exact, edge, 1 - edge))
    assert chance_X == pytest.approx(wanted)
    assert (np.diff(z_X) > 0).all()


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_what_is_promised_comes_on_new_data(method):
    """A ranker that is five times too sure of itself: after calibration every bin of fresh items keeps its promise."""
    rng = np.random.default_rng(2)
    logit = rng.normal(-2.5, 1.0, 60_000)
    judged = Judged(
        scores_nS=(5 * logit + 3)[:, None],
        clicked_n=clicks(rng, sigmoid(logit)),
        request_n=np.arange(60_000) // 10,
        kind="impressions",
    )
    made, bins = calibrated(judged, ("s",), "v", ClickConfig(method=method))
    assert made.held_out["logloss"] < made.held_out["logloss of the mean rate"]
    assert made.held_out["calibration error"] < 0.006
    fresh = rng.normal(-2.5, 1.0, 40_000)
    table = reliability(made.chances((5 * fresh + 3)[:, None]), clicks(rng, sigmoid(fresh)))
    assert sum(b.num_judged for b in table) == 40_000
    assert sum(b.low <= b.predicted <= b.high for b in table) >= 8  # of ten intervals of 95 %
    assert [b.predicted for b in table] == sorted(b.predicted for b in table)
    uncalibrated = reliability(sigmoid(5 * fresh + 3), clicks(rng, sigmoid(fresh)))
    assert sum(b.low <= b.predicted <= b.high for b in uncalibrated) <= 1
    assert np.abs(made.chances((5 * fresh + 3)[:, None]) - sigmoid(fresh)).mean() < 0.01
    assert len(reliability_lines(bins)) == 11


def test_wilson_by_hand():
    """8 of 20 at 95 %: (0.4 + 1.9208 / 20 +- 1.96 sqrt(0.012 + 0.9604 / 400)) / 1.19208."""
    assert wilson(8, 20) == pytest.approx((0.2188, 0.6134), abs=1e-4)
    assert wilson(0, 50)[0] == 0


def test_nothing_to_learn_from_is_said():
    for clicked in (np.zeros(5), np.ones(5), np.zeros(0)):
        with pytest.raises(DataError, match="some that were and some that were not"):
            fit(np.zeros((len(clicked), 1)), clicked, ("s",), "v", "choices")
    with pytest.raises(ConfigError, match="choose platt or isotonic"):
        ClickConfig(method="magic")


def test_a_score_without_any_spread_gives_the_rate():
    clicked = (np.arange(100) < 20).astype(float)
    made = fit(np.full((100, 1), 7.0), clicked, ("s",), "v", "choices")
    assert made.chances(np.array([[7.0], [1e9]])) == pytest.approx([0.2, 0.2], abs=0.01)


def test_a_runs_scores_are_judged_as_of_its_validation_window(run):
    stage, systems = judged_systems(run.cascade)
    assert (stage, systems) == ("ranking", ("counts",))  # the re-ranker after it looks at the page as a whole
    cascade = as_of(run, "valid")
    found = judge(cascade, run.dataset)
    valid = run.dataset.split.valid
    assert found.kind == "choices"
    assert set(found.request_n) == set(range(len(valid)))
    assert found.clicked_n.sum() <= len(valid.target)
    few = judge(cascade, run.dataset, ClickConfig(max_requests=3))
    assert len(set(few.request_n)) == 3


def test_a_calibration_belongs_to_a_version_of_the_run(run, tmp_path):
    made, _ = fit_calibration(run)
    path = clicks_path(run.folder)
    assert path.name == "shop.clicks.json"
    made.save(path)
    again = Calibration.load(path, version=run.version)
    assert again == replace(made, held_out=again.held_out)
    scores = np.linspace(-3, 3, 9)[:, None]
    assert again.chances(scores).tolist() == made.chances(scores).tolist()
    with pytest.raises(SnapshotError, match=r"is of version .* which now is other"):
        Calibration.load(path, version="other")
    for text in ("", "{}", "[]", json.dumps({"version": run.version})):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(SnapshotError, match="is damaged"):
            Calibration.load(tmp_path / "broken.json", version=run.version)
    with pytest.raises(SnapshotError, match="can not be written"):
        made.save(tmp_path / "no folder" / "x.json")
