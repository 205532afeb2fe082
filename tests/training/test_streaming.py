"""The streaming trainer: what it learns on a planted stream, when it reads what, and that a killed run ends with the same bits."""

import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from delayed_toys import DAY, HOUR, TRAINER, make, planted, stream_of, train

from shortlist.data.batches import Candidates, split_batch
from shortlist.data.jagged import Jagged
from shortlist.errors import ConfigError, DataError, SnapshotError
from shortlist.layers.scoring import task_losses
from shortlist.metrics.classification import auc, logloss
from shortlist.models.base import Ranker
from shortlist.models.ranking.dnn import DNN
from shortlist.registry import find
from shortlist.training import streaming
from shortlist.training.config import FeedbackChoice, TrainerConfig
from shortlist.training.feedback.clicks import ClickLog, learned_by
from shortlist.training.feedback.streams import emit
from shortlist.training.feedback.windows import NEVER
from shortlist.training.streaming import StreamConfig, StreamReport, WindowQuality, chances, train_stream
from shortlist.training.trainer import TrainingInterrupted


@pytest.fixture(scope="module")
def world():
    return planted()


@pytest.fixture(scope="module")
def small():
    return planted(1_200)


def weights_of(system):
    return {name: tensor.clone() for name, tensor in system.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_corrected_rules_end_between_vanilla_and_oracle(world):
    nll = {}
    for rule in ("vanilla", "label-oracle", "es-dfm", "defuse", "bi-defuse"):
        _, report = train(world, rule)
        nll[rule] = report.mean("nll")
    for rule in ("es-dfm", "defuse", "bi-defuse"):
        assert nll["label-oracle"] < nll[rule] < nll["vanilla"], nll
        assert (nll[rule] - nll["vanilla"]) / (nll["label-oracle"] - nll["vanilla"]) > 0.5, nll


def test_vanilla_tells_too_little_and_defuse_does_not(world):
    """Averages over the stream: about p (1 - h) of an hour against p."""
    told = {rule: train(world, rule)[1].mean("predicted") for rule in ("vanilla", "defuse", "fnw")}
    stream = world.log.clicked_at >= 10 * DAY
    chance = float((world.chance * stream).sum() / stream.sum())
    early = float((world.chance * (1 - world.late) * stream).sum() / stream.sum())
    assert told["vanilla"] < (chance + early) / 2
    assert abs(told["defuse"] - chance) < 0.1 * chance
    assert abs(told["fnw"] - chance) < 0.15 * chance


@pytest.mark.parametrize("rule", ["fnc", "fsiw", "dfm", "defer", "defuse"])
def test_every_rule_runs_and_tells_chances(small, rule):
    settings = {"deadline_hours": 72.0} if rule == "fsiw" else {}
    ranker, report = train(small, rule, **settings)
    assert not ranker.training
    assert len(report.windows) == 20
    assert sum(w.clicks for w in report.windows) == (small.log.clicked_at >= 10 * DAY).sum()
    assert all(np.isfinite(w.nll) and 0 < w.predicted < 1 for w in report.windows)


def test_the_first_window_is_judged_by_the_first_training(small):
    """Prequential: before any sample of the stream is learned from, clicks are told by what was known at the start."""
    from shortlist.training.feedback.streams import as_known
    from shortlist.training.sources import CandidateSource
    from shortlist.training.trainer import fit

    config = stream_of("vanilla")
    _, report = train_stream(
        make,
        small.view,
        small.log,
        config=config,
        trainer=TRAINER,
        start=10 * DAY,
        end=10 * DAY + HOUR * 12,
        progress=False,
    )
    known = as_known(small.log.clicked_at, small.log.converted_at, config.windows(), 10 * DAY - 1)
    by_click = np.argsort(known.click)
    click = known.click[by_click]
    torch.manual_seed(TRAINER.seed)
    system = make(replace(small.view.space, tasks=("chance",)))
    # Only the order of the samples differs, so the same network is not expected, but one as good.
    source = CandidateSource(
        small.log.histories,
        small.log.users,
        small.log.requests.select(click),
        Candidates(rows=small.log.candidates.rows.select(torch.from_numpy(click))),
        {"chance": torch.from_numpy(known.label[by_click])},
        batch_size=TRAINER.batch_size,
        max_history=1,
        only_chosen=False,
        seed=TRAINER.seed,
    )
    fit(system, small.view, lambda phase: source, config=replace(TRAINER, epochs=4, patience=None), progress=False)
    inside = np.flatnonzero((small.log.clicked_at >= 10 * DAY) & (small.log.clicked_at < 10 * DAY + 12 * HOUR))
    with torch.no_grad():
        told = system.score(small.log.batch(inside, 1))["chance"].sigmoid()
    (window,) = report.windows
    outcome = small.log.outcome(config.windows())[inside]
    assert window.clicks == len(inside)
    assert window.nll == pytest.approx(logloss(outcome, told), abs=0.05)
    assert window.auc == pytest.approx(auc(outcome, told), abs=0.12)


@pytest.mark.parametrize("rule", ["es-dfm", "defer", "fnw", "fsiw", "dfm"])
def test_conversions_that_have_not_come_change_nothing(small, rule):
    """Moving or removing every conversion after the end of the stream leaves the same bits."""
    end = 13 * DAY
    log = small.log
    blind = replace(log, converted_at=np.where(log.converted_at < end, log.converted_at, NEVER))
    settings = {"deadline_hours": 72.0} if rule == "fsiw" else {}
    found = []
    for one in (log, blind):
        ranker, report = train_stream(
            make,
            small.view,
            one,
            config=stream_of(rule, **settings),
            trainer=TRAINER,
            start=10 * DAY,
            end=end,
            progress=False,
        )
        found.append((weights_of(ranker), report))
    assert same(found[0][0], found[1][0])
    assert found[0][1].steps == found[1][1].steps


def test_the_oracle_does_read_them(small):
    """So the test above is not empty."""
    end = 13 * DAY
    log = small.log
    blind = replace(log, converted_at=np.where(log.converted_at < end, log.converted_at, NEVER))
    one, other = (
        train_stream(
            make,
            small.view,
            x,
            config=stream_of("label-oracle"),
            trainer=TRAINER,
            start=10 * DAY,
            end=end,
            progress=False,
        )[0]
        for x in (log, blind)
    )
    assert not same(weights_of(one), weights_of(other))


def test_samples_are_those_emitted_in_the_window(small):
    config = stream_of("es-dfm")
    _, report = train(small, "es-dfm")
    emitted = emit(small.log.clicked_at, small.log.converted_at, config.windows(), "late")
    for window in report.windows:
        last = min(window.start + 12 * HOUR, int(small.log.clicked_at.max()) + 1)
        assert window.samples == len(emitted.between(window.start, last))
    steps = sum(-(-w.samples // TRAINER.batch_size) for w in report.windows)
    assert report.steps == steps


def test_the_order_of_the_log_does_not_matter(small):
    """Clicks in any order: the same windows, up to ties of one second."""
    clicked = small.log.clicked_at
    assert len(np.unique(clicked)) > 0.99 * len(clicked)
    turned = np.arange(len(clicked))[::-1].copy()
    log = replace(
        small.log,
        requests=small.log.requests.select(turned),
        candidates=Candidates(rows=small.log.candidates.rows.select(torch.from_numpy(turned))),
        converted_at=small.log.converted_at[turned],
    )
    a, b = (
        train_stream(make, small.view, x, config=stream_of("fnw"), trainer=TRAINER, start=10 * DAY, progress=False)[1]
        for x in (small.log, log)
    )
    assert [w.clicks for w in a.windows] == [w.clicks for w in b.windows]
    assert a.mean("nll") == pytest.approx(b.mean("nll"), abs=0.02)  # the first training's shuffle differs


def test_the_mean_is_weighted_by_clicks():
    rows = [(10, 0.5, None), (30, 0.7, 0.8)]
    windows = tuple(
        WindowQuality(start=0, clicks=n, conversions=1, samples=0, nll=nll, auc=a, pr_auc=None, predicted=0.1)
        for n, nll, a in rows
    )
    report = StreamReport(rule="fnw", windows=windows, steps=0, seconds=0.0)
    assert report.mean("nll") == pytest.approx(0.65)
    assert report.mean("auc") == 0.8
    with pytest.raises(DataError, match="pr_auc"):
        report.mean("pr_auc")


# --- resuming ---


class Killed(RuntimeError):
    """Stands for a process that ends without warning."""


def test_same_seed_same_bits_and_a_killed_run_too(small, tmp_path, monkeypatch):
    """Ended in the auxiliary network's training, in the first one and twice in the stream; dropout and all, the bits are the same."""
    ranker, report = train(small, "defuse")
    again, _ = train(small, "defuse")
    assert same(weights_of(ranker), weights_of(again))
    whole, left = DNN.losses, [0]

    def losses(self, batch):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return whole(self, batch)

    monkeypatch.setattr(DNN, "losses", losses)
    stages = []
    for steps in (7, 22, 23, 5):
        left[0] = steps
        with pytest.raises(Killed):
            train(small, "defuse", tmp_path / "run")
        stages.append(sorted(p.name for p in (tmp_path / "run").iterdir()))
    assert stages[0] == ["auxiliary"]
    assert stages[1] == ["auxiliary", "first"]
    assert stages[2][-1] == stages[3][-1] == "first"
    assert stages[2][1].startswith("checkpoint-")
    assert stages[2][1] < stages[3][1]
    left[0] = 10_000
    resumed, told = train(small, "defuse", tmp_path / "run")
    assert left[0] > 10_000 - report.steps
    assert same(weights_of(ranker), weights_of(resumed))
    assert (told.windows, told.steps) == (report.windows, report.steps)
    with pytest.raises(SnapshotError, match="posterior"):
        train(small, "defuse", tmp_path / "run", posterior="current")


def test_interrupted_by_a_key(small, tmp_path, monkeypatch):
    """Ctrl-C ends the window, saves, and says how to go on."""
    whole, left = streaming._Run._learn, [3]

    def learn(self, first, last):
        left[0] -= 1
        if not left[0]:
            signal.raise_signal(signal.SIGINT)
        whole(self, first, last)

    monkeypatch.setattr(streaming._Run, "_learn", learn)
    with pytest.raises(TrainingInterrupted, match="after 3 windows; run it again"):
        train(small, "fnw", tmp_path / "run", trainer=replace(TRAINER, checkpoint_seconds=1e9))
    resumed, told = train(small, "fnw", tmp_path / "run", trainer=replace(TRAINER, checkpoint_seconds=1e9))
    assert left[0] == 3 - len(told.windows)
    assert same(weights_of(resumed), weights_of(train(small, "fnw")[0]))


# --- other rankers, settings, refusals ---


@pytest.mark.parametrize("name", ["ple", "deepfm"])
def test_any_ranker_of_the_registry(small, name):
    """PLE has Bi-DEFUSE's form: a shared and an own expert for each output."""
    entry = find(name)

    def build(space):
        system = entry.cls(entry.config(dict(entry.tiny)), space)
        assert isinstance(system, Ranker)
        return system

    config = stream_of("bi-defuse" if name == "ple" else "es-dfm")
    _, report = train_stream(
        build, small.view, small.log, config=config, trainer=TRAINER, start=10 * DAY, end=12 * DAY, progress=False
    )
    assert np.isfinite(report.mean("nll"))


def test_a_ranker_that_grows_trees_is_refused(small):
    entry = find("lambdamart")
    with pytest.raises(ConfigError, match="can not follow a stream"):
        train_stream(
            lambda space: entry.cls(entry.config(dict(entry.tiny)), space),
            small.view,
            small.log,
            config=stream_of("vanilla"),
            trainer=TRAINER,
            start=10 * DAY,
            progress=False,
        )


def test_a_view_that_reaches_into_the_stream_is_refused(small):
    with pytest.raises(DataError, match="leak"):
        train_stream(
            make,
            replace(small.view, now=11 * DAY),
            small.log,
            config=stream_of("vanilla"),
            trainer=TRAINER,
            start=10 * DAY,
            progress=False,
        )
    with pytest.raises(DataError, match="earlier start"):
        train_stream(
            make, small.view, small.log, config=stream_of("vanilla"), trainer=TRAINER, start=90 * DAY, progress=False
        )
    with pytest.raises(DataError, match="old enough"):
        train_stream(make, small.view, small.log, config=stream_of("vanilla"), trainer=TRAINER, start=1, progress=False)


def test_a_click_is_one_candidate(small):
    log = small.log
    two = Candidates(rows=Jagged.from_rows([[1, 2]] * len(log)))
    with pytest.raises(DataError, match="one candidate"):
        replace(log, candidates=two)
    with pytest.raises(DataError, match="one each"):
        replace(log, converted_at=log.converted_at[:3])


def test_wrong_settings_are_refused():
    for wrong in ({"window_hours": 0.0}, {"first_epochs": 0}, {"attribution_hours": 0.5}):
        with pytest.raises(ConfigError):
            StreamConfig(**wrong)
    with pytest.raises(ConfigError, match="needs a feedback rule"):
        StreamConfig(feedback=FeedbackChoice()).rule()


# --- batches ---


def test_a_streamed_batch(small):
    """Kinds and times stand in the batch; a criterion takes the place of the label, moves with the batch, and can not be cut."""
    from shortlist.training.config import FeedbackChoice
    from shortlist.training.feedback.base import make_feedback

    log: ClickLog = small.log
    rule = make_feedback(FeedbackChoice(rule="vanilla"))
    emitted = emit(log.clicked_at, log.converted_at, stream_of("vanilla").windows(), "late")
    index = np.arange(8)
    batch = learned_by(rule, ("buy",), emitted, {})(log.batch(emitted.click[index], 1), index)
    assert batch.sample_kind.tolist() == emitted.kind[:8].tolist()
    assert batch.emitted_at.tolist() == emitted.emitted_at[:8].tolist()
    moved = batch.to("meta")
    assert moved.criteria[0].seen.label.device.type == "meta"
    with pytest.raises(ValueError, match="criteria"):
        list(split_batch(batch, [4, 4]))
    parts = list(split_batch(replace(batch, criteria=()), [3, 5]))
    assert parts[1].sample_kind.tolist() == emitted.kind[3:8].tolist()
    logit = torch.linspace(-1, 1, 8)
    both = replace(batch, labels={"click": torch.ones(8)})
    losses = task_losses({"click": logit, "buy": logit}, both, "bce")
    label = torch.from_numpy(emitted.label[:8])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logit, label)
    assert list(losses) == ["click", "buy"]
    torch.testing.assert_close(losses["buy"], expected)
    with pytest.raises(DataError, match="like"):
        task_losses({"like": logit, "buy": logit}, both, "bce")


def test_chances_are_the_rule_s(small):
    from shortlist.training.feedback.base import make_feedback

    rule = make_feedback(FeedbackChoice(rule="bi-defuse"))
    ranker, _ = train(small, "bi-defuse", trainer=TrainerConfig(batch_size=256, device="cpu"))
    batch = small.log.batch(np.arange(5), 1)
    scores = ranker.score(batch)
    torch.testing.assert_close(
        chances(ranker, rule, batch), (scores["within"].sigmoid() + scores["after"].sigmoid()).clamp(max=1)
    )
