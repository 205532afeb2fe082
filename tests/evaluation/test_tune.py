"""The tuner: what it tries, that every arm gets the same, that a stopped search ends as one that was not, and that test stays unread."""

import contextlib
import json
import shlex
from dataclasses import replace

import numpy as np
import pytest

from cli_support import COUNTED, PLAIN, refused, succeeds, write_shop
from shortlist.cascade import build
from shortlist.cascade.build import train_cascade
from shortlist.cascade.config import RunConfig
from shortlist.errors import ConfigError
from shortlist.evaluation import tune as tuner
from shortlist.evaluation.evaluate import judge_pages, make_pages, pager_of
from shortlist.evaluation.runs import counted
from shortlist.evaluation.tune import Arm, Budget, arm_config, judge, make_arms, tune
from shortlist.evaluation.tuning_space import Choice, current, parse_ranges, read_ranges, space_of
from shortlist.registry import find
from support import shop_dataset

ALONE = "[surface]\nk = 4\n[stages.retrieval]\nsystems = ['{}']\n"


@pytest.fixture(scope="module")
def dataset():
    return shop_dataset()


def arm_of(name, *ranges, text=None):
    (arm,) = make_arms(RunConfig.from_toml(text or ALONE.format(name)), [name], parse_ranges(ranges), only=True)
    return arm


def test_the_usual_space_comes_from_the_settings_types():
    config = RunConfig.from_toml(ALONE.format("two-tower"))
    space = {choice.path: choice for choice in space_of(config, "two-tower", {})}
    assert space["two-tower.dim"].values == ("16", "32", "64", "128")
    assert space["two-tower.frequency"].values == ('"counts"', '"streaming"')
    assert space["two-tower.correct_target"].values == ("false", "true")
    assert (space["two-tower.temperature"].low, space["two-tower.temperature"].high) == (0.0125, 0.2)
    assert space["two-tower.num_uniform"].whole
    assert space["trainer.two-tower.lr"].log
    assert "two-tower.widths" not in space
    assert not any(
        path.startswith("trainer") for path in {c.path for c in space_of(arm_config(config, "ease"), "ease", {})}
    )


@pytest.mark.parametrize(
    "name", ["popularity", "personal-frequency", "counts", "item-knn", "ease", "two-tower", "sasrec"]
)
def test_every_retriever_has_a_space_whose_defaults_lie_inside(name):
    config = RunConfig.from_toml(ALONE.format(name))
    space = space_of(config, name, {})
    inside = [choice.holds(current(config, choice)) is not None for choice in space]
    assert np.mean(inside) > 0.5
    for choice in space:
        value = current(config, choice)
        if value is not None:
            same = config.override(f"{choice.path}={tuner.as_text(value)}")
            assert (same.systems, same.trainer_of(name)) == (config.systems, config.trainer_of(name))


def test_ranges_in_every_form(tmp_path):
    config = RunConfig.from_toml(PLAIN)
    ranges = parse_ranges(
        ["dim=8:64:log", "lr=0.001:0.1:log", "widths=[8],[16, 8]", "loss=softmax,bce", "ranking.keep=4:8"]
    )
    space = {c.path: c for c in space_of(config, "dnn", ranges, only=True)}
    assert space["dnn.dim"] == Choice(path="dnn.dim", low=8, high=64, log=True, whole=True)
    assert space["trainer.dnn.lr"].text(0.01) == "0.01"
    assert space["dnn.widths"].values == ("[8]", "[16, 8]")
    assert space["dnn.loss"].values == ('"softmax"', '"bce"')
    assert space["ranking.keep"].text(6) == "6"
    (tmp_path / "space.toml").write_text('dropout = "0:0.2"\n[dnn]\ndim = [8, 16]\n[two-tower]\ndecay = "0.5:1"\n')
    space = {c.path: str(c) for c in space_of(config, "dnn", read_ranges(tmp_path / "space.toml"), only=True)}
    assert space == {"dnn.dropout": "0 to 0.2", "dnn.dim": "8, 16"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dim", "is not name=low:high"),
        ("dim=9:3", "low must be below high"),
        ("dim=0:3:log", "above 0"),
        ("dim=a:b", "'a' is not a number"),
        ("dim=0:8", "at least 1"),
        ("dimm=1:2", "did you mean 'dim'"),
        ("surface.k=2:3", "names no setting"),
        ("activation=relu,sine", "'sine'"),
    ],
)
def test_ranges_that_can_not_be(text, said):
    with pytest.raises(ConfigError, match=said):
        arm_of("dnn", text, text=PLAIN)


def test_what_an_arm_is():
    config = RunConfig.from_toml(PLAIN + "[stages.re-ranking]\nsystems = ['mmr']\n")
    alone = arm_config(config, "two-tower")
    assert [s.systems for s in alone.stages] == [("two-tower",)]
    assert alone.systems["two-tower"].settings.dim == 8  # as the run has it
    ranker = arm_config(config, "din")
    assert [s.systems for s in ranker.stages] == [("popularity", "counts", "two-tower"), ("din",)]
    trained = arm_config(config.override("trainer.dnn.batch_size=8"), "din")
    assert trained.trainer_of("din").batch_size == 8  # as the ranker whose place it takes
    assert arm_config(config, None) == config
    assert [s.systems for s in arm_config(config, "mmr").stages][-1] == ("mmr",)
    with pytest.raises(ConfigError, match="no stage of the run has one"):
        arm_config(RunConfig.from_toml(COUNTED), "din")


def test_a_counting_system_is_judged_as_its_run_would_be(dataset, tmp_path):
    """Quickly, by itself; the same through a whole training; and by hand, on the validation window."""
    config = RunConfig.from_toml(ALONE.format("counts")).override("counts.max_gap=2")
    quick = judge(dataset, config, tmp_path)
    assert not list(tmp_path.iterdir())
    slow = train_cascade(dataset, config, tmp_path / "run", progress=False).metrics["validation"]["ndcg@4"]
    valid = dataset.split.valid
    system = counted(find("counts"), dataset, "valid", {"max_gap": 2})
    rows = make_pages(pager_of(system, 4), dataset, valid, repeats=dataset.repeats)
    top, bottom = judge_pages(rows, valid, 4)["ndcg@4"]
    assert quick == pytest.approx(top.sum() / bottom.sum(), abs=1e-9)
    assert slow == pytest.approx(quick, abs=1e-9)


def test_finds_the_better_setting_and_never_reads_test(dataset, tmp_path):
    arm = arm_of("counts", "directed=false,true", "max_gap=1:6")
    split = dataset.split
    nobody = split.test.select(np.arange(0))
    blind = replace(dataset, split=replace(split, test=nobody))
    tuning = tune(blind, [arm], tmp_path / "t", budget=Budget(trials=8), seed=1)
    scores = {}
    for directed in ("false", "true"):
        for gap in range(1, 7):
            scores[directed, str(gap)] = judge(
                dataset, arm.config.override(f"counts.directed={directed}", f"counts.max_gap={gap}"), tmp_path
            )
    for trial in tuning.trials:
        assert trial.score == pytest.approx(scores[trial.settings["counts.directed"], trial.settings["counts.max_gap"]])
    best = tuning.ranked["counts"][0]
    assert best.score == max(t.score for t in tuning.trials)
    assert tuning.trials[0].settings == {"counts.directed": "true", "counts.max_gap": "3"}
    again = RunConfig.from_toml(tmp_path / "t" / "best.toml")
    assert judge(dataset, again, tmp_path) == best.score
    assert (tmp_path / "t" / "trials.png").stat().st_size > 5_000


def test_a_stopped_search_ends_as_one_that_was_not(dataset, tmp_path, monkeypatch):
    arms = [arm_of("counts", "decay=0.1:1", "max_gap=1:6"), arm_of("popularity", "window_days=1:60:log")]
    whole = tune(dataset, arms, tmp_path / "whole", budget=Budget(trials=5), seed=3)
    calls = []

    def stops(dataset, config, work, progress=False, **rest):
        calls.append(config)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return judge(dataset, config, work, progress, **rest)

    monkeypatch.setattr(tuner, "judge", stops)
    with pytest.raises(KeyboardInterrupt):
        tune(dataset, arms, tmp_path / "cut", budget=Budget(trials=5), seed=3)
    done = tune(dataset, arms, tmp_path / "cut", budget=Budget(trials=5), seed=3)
    assert len(calls) == 11
    assert [(t.arm, t.settings, t.score) for t in done.trials] == [(t.arm, t.settings, t.score) for t in whole.trials]
    assert [t.arm for t in whole.trials] == ["counts", "popularity"] * 5  # in turn, the same effort
    more = tune(dataset, arms, tmp_path / "cut", budget=Budget(trials=6), seed=3)
    assert more.trials[:10] == done.trials
    with pytest.raises(ConfigError, match="another folder"):
        tune(dataset, arms[:1], tmp_path / "cut", budget=Budget(trials=6), seed=3)
    assert len(tune(dataset, arms[:1], tmp_path / "cut", budget=Budget(trials=1), fresh=True).trials) == 1


def test_seconds_are_a_budget_too(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(tuner.time, "perf_counter", iter(range(0, 100_000, 10)).__next__)  # a trial takes 10 s
    monkeypatch.setattr(tuner, "judge", lambda *_, **__: 0.5)
    arms = [arm_of("counts", "max_gap=1:6"), arm_of("popularity", "window_days=1:60")]
    tuning = tune(dataset, arms, tmp_path / "t", budget=Budget(seconds=25))
    assert {arm.name: len(tuning.ranked[arm.name]) for arm in arms} == {"counts": 3, "popularity": 3}
    assert tuning.as_dict()["effort"].startswith("25 s for each arm")
    for wrong in ({}, {"trials": 0}, {"seconds": 0.0}):
        with pytest.raises(ConfigError):
            Budget(**wrong)


def test_the_time_of_a_stopped_trial_counts(dataset, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tuner.time, "perf_counter", iter(range(0, 100_000, 10)).__next__)
    arm = arm_of("counts", "max_gap=1:6")
    for verdict in (stopped, stopped, lambda *_, **__: 0.5):
        monkeypatch.setattr(tuner, "judge", verdict)
        with contextlib.suppress(KeyboardInterrupt):
            tuning = tune(dataset, [arm], tmp_path / "t", budget=Budget(trials=2))
    assert [trial.seconds for trial in tuning.trials] == [30, 10]


def test_settings_that_do_not_go_together_are_a_failed_trial(dataset, tmp_path, monkeypatch):
    def fussy(dataset, config, work, progress=False, **rest):
        if config.systems["counts"].settings.max_gap > 3:
            raise ConfigError("too far")
        return judge(dataset, config, work)

    monkeypatch.setattr(tuner, "judge", fussy)
    tuning = tune(dataset, [arm_of("counts", "max_gap=1:9")], tmp_path / "t", budget=Budget(trials=6), seed=0)
    failed = [t for t in tuning.trials if t.error]
    assert 0 < len(failed) < 6
    assert {t.error for t in failed} == {"too far"}
    assert tuning.ranked["counts"][-1].score is None
    assert "failed" in tuner.table_text(tuning)


def test_a_ranker_is_tuned_behind_the_run_s_retrieval(dataset, tmp_path):
    text = PLAIN.replace('"popularity", "counts", "two-tower"', '"counts"').replace(
        "[systems.two-tower]\ndim = 8\nwidths = [16]\nnum_uniform = 8\n", ""
    )
    arm = arm_of("dnn", "dim=4,8,16", "lr=0.001:0.03:log", text=text)
    tuning = tune(dataset, [arm], tmp_path / "t", budget=Budget(trials=2))
    assert tuning.trials[0].settings == {"dnn.dim": "8", "trainer.dnn.lr": "0.01"}
    best = RunConfig.from_toml(tmp_path / "t" / "best.toml")
    assert [s.systems for s in best.stages] == [("counts",), ("dnn",)]
    assert not (tmp_path / "t" / "work").exists()
    # As a run of its own would measure it, though the second trial collected no lessons of its own.
    alone = train_cascade(dataset, best, tmp_path / "alone", progress=False)
    assert alone.metrics["validation"]["ndcg@4"] == max(trial.score for trial in tuning.trials)


def test_trials_write_no_run_and_make_nothing_twice(dataset, tmp_path, monkeypatch):
    made = []
    collected, prepare = build.collect, find("counts").cls.prepare
    monkeypatch.setattr(build, "collect", lambda *a, **k: made.append("lessons") or collected(*a, **k))
    monkeypatch.setattr(build, "save_run", lambda *a, **k: pytest.fail("a run was written"))
    monkeypatch.setattr(find("counts").cls, "prepare", lambda self, view: made.append("counted") or prepare(self, view))
    text = (
        ALONE.format("counts") + "keep = 9\n[stages.ranking]\nsystems = ['dnn']\n[systems.dnn]\ndim = 4\nwidths = [4]\n"
    )
    arm = arm_of("dnn", "dim=4,8", text=f"[trainer]\nepochs = 1\n{text}")
    tune(dataset, [arm], tmp_path / "t", budget=Budget(trials=1))
    once = len(made)
    made.clear()
    tune(dataset, [arm], tmp_path / "other", budget=Budget(trials=4))
    assert len(made) == once


def test_command(tmp_path):
    folder = write_shop(tmp_path / "shop")
    log = (folder / "events.csv", "--items", folder / "items.csv", "--config", folder / "counted.toml")
    call = ("tune", *log, "--systems", "counts,popularity", "--trials", 3, "--out", tmp_path / "tuned")
    said = succeeds(*call, "--range", "decay=0.2:0.9")
    assert said.err.count("best 0.") == 6
    assert "0 (defaults)" in said.out
    assert "Each arm had 3 trials" in said.out
    following = shlex.split(said.out.split("Next: ")[1])
    assert following[:5] == ["shortlist", "train", str(log[0]), "--items", str(log[2])]
    succeeds(*following[1:-1], tmp_path / "next", "--quiet", "--no-report")
    found = json.loads((tmp_path / "tuned" / "tune.json").read_text())
    assert [arm["name"] for arm in found["arms"]] == ["counts", "popularity"]
    assert found["arms"][0]["space"]["counts.decay"] == "0.2 to 0.9"
    assert found["effort"].startswith("3 trials for each arm")
    assert {"versions", "hardware", "command", "commit"} <= set(found)
    again = succeeds(*call, "--range", "decay=0.2:0.9", "--json", "--quiet")
    assert again.json["arms"] == found["arms"]
    best = tmp_path / "tuned" / f"best-{found['best']}.toml"
    assert best.read_text() == (tmp_path / "tuned" / "best.toml").read_text()
    succeeds("train", *log[:3], "--config", best, "--out", tmp_path / "run", "--quiet")
    whole = succeeds(
        "tune",
        *log,
        "--trials",
        2,
        "--out",
        tmp_path / "whole",
        "--range",
        "ranking.keep=4:8",
        "--range",
        "counts.decay=0.5,0.9",
        "--json",
        "--quiet",
    )
    assert whole.json["arms"][0]["name"] == "cascade"


def test_refusals(tmp_path):
    folder = write_shop(tmp_path / "shop", 30)
    log = ("tune", folder / "events.csv", "--config", folder / "counted.toml", "--quiet")
    assert "nothing to try for the cascade" in refused(*log, "--out", tmp_path / "a")
    assert "'dinn'" in refused(*log, "--out", tmp_path / "a", "--system", "dinn")
    assert "twice" in refused(*log, "--out", tmp_path / "a", "--systems", "counts,counts")
    assert "trials must be at least 1" in refused(*log, "--out", tmp_path / "a", "--system", "counts", "--trials", 0)
    assert "is of no search" in refused(*log, "--out", folder, "--system", "counts", "--trials", 1)
    assert not (tmp_path / "a").exists()


def test_arms_keep_what_they_were_given():
    arm = Arm(name="counts", config=RunConfig.from_toml(ALONE.format("counts")), space=())
    assert arm.with_settings({}) == arm.config
