import json

import pytest

from shortlist.cascade.build import train_cascade
from shortlist.cascade.config import RunConfig
from shortlist.errors import ConfigError
from shortlist.evaluation.evaluate import compare
from shortlist.evaluation.runs import baselines, cost_rows, evaluate_counted, evaluate_run, reports_for, verdict
from shortlist.extras import installed
from shortlist.metrics import Interval
from support import shop_dataset

SETTINGS = """
[surface]
k = 5
[trainer]
epochs = 2
batch_size = 32
[learning]
slices = 2
[stages.retrieval]
systems = ["personal-frequency", "item-knn", "popularity"]
keep = 15
[stages.ranking]
systems = ["dnn"]
keep = 8
[stages.re-ranking]
systems = ["mmr"]
[systems.dnn]
dim = 4
widths = [8]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = RunConfig.from_toml(SETTINGS)
    return train_cascade(shop_dataset(), config, tmp_path_factory.mktemp("runs") / "shop", progress=False)


def test_an_earlier_window_is_judged_by_what_was_known_before_it(run):
    """The served run has counted the validation window; judged on it, it must give what training measured without it."""
    measured = run.metrics["validation"]["ndcg@5"]
    assert evaluate_run(run, window="valid").report.metrics["ndcg@5"].mean == pytest.approx(measured, abs=1e-6)


def test_a_run_that_counts_the_answers_would_have_been_noticed(run):
    """The same window through the served counts: what the test above guards against does make a difference here."""
    from shortlist.evaluation.evaluate import evaluate

    leaky = evaluate(
        lambda batch, _: run.cascade.run(batch, k=5).rows,
        run.dataset,
        name="leaky",
        window="valid",
        k=5,
        max_history=500,
    )
    assert leaky.metrics["ndcg@5"].mean != pytest.approx(run.metrics["validation"]["ndcg@5"], abs=1e-6)


def test_losses_add_up_and_every_stage_has_a_cost(run):
    result = evaluate_run(run)
    assert sum(result.lost_at.values()) == pytest.approx(1.0)
    assert list(result.lost_at) == ["retrieval", "ranking", "re-ranking", "shown"]
    assert list(result.cost) == ["retrieval", "ranking", "re-ranking"]
    for stage in result.cost.values():
        assert stage["ms"] > 0
        assert stage["mflop"] > 0
        assert stage["kept"] <= stage["received"]
    assert result.lost_at["shown"] > 0
    assert len(cost_rows(result.cost)) == 5
    json.dumps(result.as_dict(), allow_nan=False)


def test_runs_and_counting_systems_stand_on_the_same_requests(run):
    reports = reports_for(["mine", "popularity", "ease"], dataset=run.dataset, runs={"mine": run}, k=5)
    comparison = compare(reports, reference="mine")
    assert set(comparison.tests) == {"popularity", "ease"}
    json.dumps(comparison.as_dict(), allow_nan=False)


def test_a_counting_system_has_counted_everything_before_the_window(run):
    """Popularity on test must be the most chosen items before test, not before fit."""
    report = evaluate_counted("popularity", run.dataset, settings={"window_days": None}, k=3, repeats=True)
    counts = run.dataset.view("test").histories.item
    best = sorted(set(counts.tolist()), key=lambda row: -(counts == row).sum())
    assert (counts == report.rows[0][0]).sum() == (counts == best[0]).sum()


def test_a_trained_system_is_no_baseline_by_name(run):
    with pytest.raises(ConfigError, match="trained by gradient"):
        evaluate_counted("sasrec", run.dataset)


def test_baselines_are_those_the_log_can_serve(run):
    extra = ["als"] if installed("implicit") else []
    assert baselines(run.dataset) == ["popularity", "personal-frequency", "counts", "item-knn", "ease", *extra]


def test_the_verdict_names_what_is_not_beaten(run):
    reports = reports_for(["mine", "popularity"], dataset=run.dataset, runs={"mine": run}, k=5)
    sentence = verdict(compare(reports, reference="mine"), "Shop")
    test = compare(reports, reference="mine").tests["popularity"]["ndcg@5"]
    assert ("does not beat popularity" in sentence) == (test["low"] <= 0)
    assert f"{test['difference']:+.4f}" in sentence
    assert isinstance(reports[0].metrics["ndcg@5"], Interval)
