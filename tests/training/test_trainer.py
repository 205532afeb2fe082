"""The trainer on toy systems: what it learns, when it stops, and that it goes on exactly where it was."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_toys
from torch import Tensor, nn
from training_toys import KILLED_RUN, PrepareOnly, Toy, TwoPhases, chain_view, make, score_of, train

from shortlist.errors import ConfigError, DataError, SnapshotError
from shortlist.models.base import Phase
from shortlist.training.context import chosen_device, deterministic
from shortlist.training.sources import NextEventSource
from shortlist.training.trainer import Diverged, TrainerConfig, TrainingInterrupted, fit

CONFIG = TrainerConfig(epochs=4, batch_size=16, lr=0.02, table_lr=0.05, device="cpu", seed=5)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def without_time(report):
    return replace(report, seconds=0.0, curve=tuple(replace(point, seconds=0.0) for point in report.curve))


# --- learning ---


def test_learns_the_planted_successor():
    """Every item has one successor, so a trained system is right about nearly all of them."""
    toy, view = make(dropout=0.0)
    report = train(toy, view, replace(CONFIG, epochs=40, lr=0.05, table_lr=0.2))
    assert not toy.training
    items = torch.arange(1, 12)
    assert torch.equal(toy.out(toy.table(items)).argmax(1), items % 11 + 1)
    assert report.curve[-1].loss < 0.2 < math.log(11) - 0.5 < report.curve[0].loss
    assert (report.epochs, report.steps, report.phases, report.stopped) == (40, 160, ("train",), "epochs")


def test_same_seed_same_bits_another_seed_not():
    results = []
    for seed in (1, 1, 2):
        toy, view = make()
        report = train(toy, view, replace(CONFIG, seed=seed))
        results.append((toy, without_time(report)))
    assert_same_weights(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert results[0][1].curve != results[2][1].curve


def test_validation_does_not_move_training():
    plain, view = make()
    train(plain, view, CONFIG)
    watched, _ = make()
    scores = iter(range(99))
    train(watched, view, CONFIG, validate=lambda s: next(scores) + float(torch.rand(3).sum()) * 0)
    assert_same_weights(plain, watched)


def test_system_without_feed_only_prepares(tmp_path):
    toy, view = make(PrepareOnly)
    report = train(toy, view, CONFIG, folder=tmp_path)
    assert (report.phases, report.epochs, report.steps, toy.prepared) == ((), 0, 0, 1)
    again, _ = make(PrepareOnly)
    train(again, view, CONFIG, folder=tmp_path)
    assert again.prepared == 0, "what is prepared is taken from the checkpoint"
    assert torch.equal(again.counts, toy.counts)
    assert int(toy.counts.sum()) == view.histories.num_events


def test_losses_are_summed_and_combine_replaces_the_sum():
    class Tasks(Toy):
        def losses(self, batch):
            loss = super().losses(batch)["next"]
            return {"a": loss, "b": 3 * loss}

    seen = []

    def only_b(losses: dict[str, Tensor]) -> Tensor:
        seen.append(sorted(losses))
        return losses["b"]

    toy, view = make(Tasks)
    point = train(toy, view, replace(CONFIG, epochs=1)).curve[0]
    assert point.losses["b"] == pytest.approx(3 * point.losses["a"], rel=1e-5)
    assert point.loss == pytest.approx(4 * point.losses["a"], rel=1e-5)
    toy, _ = make(Tasks)
    point = train(toy, view, replace(CONFIG, epochs=1), combine=only_b).curve[0]
    assert point.loss == pytest.approx(point.losses["b"])
    assert seen == [["a", "b"]] * 4


def test_gradients_are_clipped():
    """With SGD, one step moves all weights together by at most lr * clip_norm, the row-wise table left out."""
    toy, view = make(dropout=0.0)
    before = toy.out.weight.detach().clone(), toy.out.bias.detach().clone()
    config = replace(CONFIG, epochs=1, batch_size=1000, optimiser="sgd", lr=1.0, clip_norm=1e-3)
    report = train(toy, view, config)
    moved = torch.cat([(toy.out.weight - before[0]).flatten(), toy.out.bias - before[1]]).detach().norm()
    assert report.curve[0].losses["gradient norm"] > 0.1
    assert 0 < float(moved) < 1.01e-3


def test_bf16_computes_in_bf16_and_keeps_float32_weights():
    kinds = []

    class Watched(Toy):
        def logits(self, batch):
            logits = super().logits(batch)
            kinds.append(logits.dtype)
            return logits

    toy, view = make(Watched)
    train(toy, view, replace(CONFIG, epochs=1, precision="bf16"))
    assert set(kinds) == {torch.bfloat16}
    assert {p.dtype for p in toy.parameters()} == {torch.float32}


# --- phases ---


def test_phases_train_their_own_parameters_in_order():
    toy, view = make(TwoPhases)
    first_map = toy.out.weight.detach().clone()
    moments = []

    class Spy(TwoPhases):
        def freeze(self, view):
            moments.append((self.table.weight.detach().clone(), self.out.weight.detach().clone()))
            super().freeze(view)

    toy, _ = make(Spy)
    report = train(toy, view, CONFIG)
    ((table, out),) = moments
    assert torch.equal(out, first_map), "the map does not move in the first phase"
    assert torch.equal(toy.table.weight, table), "the table does not move in the second"
    assert not torch.equal(toy.out.weight, out)
    assert [(point.phase, point.epoch) for point in report.curve] == [("table", 1), ("table", 2)] + [
        ("map", epoch) for epoch in range(1, 5)
    ]
    assert toy.befores == ("map",)
    assert toy.out.weight.requires_grad, "what a phase sets aside comes back"


def test_validation_belongs_to_the_last_phase():
    toy, view = make(TwoPhases)
    report = train(toy, view, replace(CONFIG, patience=1), validate=lambda s: 1.0)
    assert [point.score for point in report.curve] == [None, None, 1.0, 1.0]
    assert report.stopped == "patience"


def test_a_foreign_parameter_is_refused():
    class Foreign(Toy):
        def phases(self):
            own = nn.Parameter(torch.ones(1))
            return (Phase(name="odd", feed="next_event", losses=self.losses, parameters=lambda: [own]),)

    toy, view = make(Foreign)
    with pytest.raises(ConfigError, match="'odd' trains a parameter that is not the system's"):
        train(toy, view, CONFIG)


# --- stopping ---


def test_stops_without_improvement_and_returns_the_best():
    scores, kept = iter([0.1, 0.5, 0.4, 0.3, 0.9]), []

    def validate(system: Toy) -> float:
        assert not system.training
        assert not torch.is_grad_enabled()
        kept.append(system.out.weight.detach().clone())
        return next(scores)

    toy, view = make()
    report = train(toy, view, replace(CONFIG, epochs=20, patience=2), validate=validate)
    assert (report.epochs, report.best_epoch, report.best_score, report.stopped) == (4, 2, 0.5, "patience")
    assert torch.equal(toy.out.weight, kept[1])
    assert not torch.equal(kept[1], kept[3])


def test_validates_every_few_epochs_and_at_the_end():
    toy, view = make()
    report = train(toy, view, replace(CONFIG, epochs=5, validate_every=2), validate=score_of)
    assert [point.score is not None for point in report.curve] == [False, True, False, True, True]


def test_time_budget_ends_an_epoch_early_and_can_be_raised(tmp_path):
    scores = iter(range(100))

    def rising(system: Toy) -> float:
        return next(scores)

    toy, view = make()
    whole = train(toy, view, CONFIG, validate=rising)
    slow, _ = make()
    slow.pause = 0.1
    cut = train(slow, view, replace(CONFIG, max_seconds=0.8), folder=tmp_path, validate=rising)
    assert cut.stopped == "max_seconds"
    assert 0 < cut.steps < whole.steps
    assert cut.curve[-1].score == cut.best_score, "the epoch that was cut is validated too"
    resumed, _ = make()
    report = train(resumed, view, replace(CONFIG, max_seconds=1000), folder=tmp_path, validate=rising)
    assert_same_weights(resumed, toy)
    assert [p.loss for p in report.curve] == [p.loss for p in whole.curve]


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_nan_is_refused_with_its_place(clip_norm):
    class Breaks(Toy):
        steps = 0

        def losses(self, batch):
            self.steps += 1
            return {"next": super().losses(batch)["next"] * (math.nan if self.steps == 7 else 1)}

    toy, view = make(Breaks)
    with pytest.raises(Diverged) as caught:
        train(toy, view, replace(CONFIG, clip_norm=clip_norm))
    assert "Breaks: loss became nan in phase 'train', epoch 2, step 3; lower lr" in str(caught.value)
    assert ("set clip_norm" in str(caught.value)) == (clip_norm is None)


def test_nan_gradient_of_a_finite_loss_is_refused():
    class Root(Toy):
        def losses(self, batch):
            zero = (self.out.bias * 0).sum()
            return {"next": super().losses(batch)["next"] + zero.sqrt()}

    toy, view = make(Root)
    with pytest.raises(Diverged, match=r"gradient norm became nan.*epoch 1, step 1"):
        train(toy, view, CONFIG)


@pytest.mark.parametrize("look_every", [3, 1000])
def test_rare_looks_name_the_same_step_and_give_the_same_curve(monkeypatch, look_every):
    """On a GPU losses are read every few steps; sums and the step of a NaN must not depend on it."""
    toy, view = make()
    plain = train(toy, view, CONFIG)
    monkeypatch.setattr("shortlist.training.trainer.STEPS_PER_CHECK", {"cpu": look_every})
    toy, _ = make()
    assert without_time(train(toy, view, CONFIG)) == without_time(plain)
    test_nan_is_refused_with_its_place(None)


def test_a_validation_of_nan_is_refused():
    toy, view = make()
    with pytest.raises(Diverged, match="validation gave nan after epoch 1"):
        train(toy, view, CONFIG, validate=lambda s: math.nan)


class Source:
    """Gives as many batches as told, whatever it promised."""

    def __init__(self, view, promised: int, given: int) -> None:
        self.inner, self.promised, self.given = (
            training_toys.NextEventSource(view, batch_size=4, max_history=5),
            promised,
            given,
        )

    def steps_per_epoch(self) -> int:
        return self.promised

    def batches(self, epoch, start=0):
        return (batch for batch, _ in zip(self.inner.batches(epoch, start), range(self.given)))


@pytest.mark.parametrize(
    ("promised", "given", "message"), [(0, 0, "no batch to train on"), (3, 2, "promised 3 steps and gave 2")]
)
def test_a_source_that_gives_too_little_is_refused(promised, given, message):
    toy, view = make()
    with pytest.raises(DataError, match=message):
        fit(toy, view, lambda phase: Source(view, promised, given), config=CONFIG, progress=False)


def test_a_loss_without_parameters_is_refused():
    class Constant(Toy):
        def losses(self, batch):
            return {"next": torch.ones(())}

    toy, view = make(Constant)
    with pytest.raises(ConfigError, match="depends on none of the parameters"):
        train(toy, view, CONFIG)


# --- resuming ---


def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    """Kill -9 in the middle of an epoch, at whatever moment it strikes; then run the same again."""
    view = chain_view()
    whole, _ = make(view=view)
    expected = train(whole, view, KILLED_RUN, validate=score_of)

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen([sys.executable, training_toys.__file__, str(tmp_path)], env=environment)
    deadline = time.monotonic() + 60
    while progress_of(tmp_path) < 11:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = progress_of(tmp_path)
    assert 11 <= done < expected.steps

    resumed, _ = make(view=view)
    report = train(resumed, view, KILLED_RUN, validate=score_of, folder=tmp_path)
    assert resumed.prepared == 0
    assert_same_weights(resumed, whole)
    assert without_time(report) == without_time(expected)
    curve = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [point["loss"] for point in curve] == [point.loss for point in expected.curve]


def progress_of(folder: Path) -> int:
    """Steps in the newest checkpoint, 0 before the first."""
    for state in sorted(folder.glob("checkpoint-*/state.json"), reverse=True):
        try:
            return int(json.loads(state.read_text())["place"]["total_steps"])
        except (OSError, ValueError):  # replaced by a newer one while we looked
            return 0
    return 0


@pytest.mark.parametrize("stop_at", [1, 6, 8, 9, 23])
def test_two_phases_resume_anywhere(tmp_path, stop_at):
    """A crash at any step (first, inside and at the end of a phase, first of the second, last of all) changes nothing."""
    config = replace(CONFIG, checkpoint_seconds=0, patience=None)
    whole, view = make(TwoPhases)
    expected = train(whole, view, config, validate=score_of)

    class Crashes(TwoPhases):
        steps = 0

        def losses(self, batch):
            self.steps += 1
            if self.steps > stop_at:
                raise RuntimeError("power cut")
            return super().losses(batch)

    Crashes.__name__ = "TwoPhases"
    toy, _ = make(Crashes)
    with pytest.raises(RuntimeError, match="power cut"):
        train(toy, view, config, validate=score_of, folder=tmp_path)
    resumed, _ = make(TwoPhases)
    report = train(resumed, view, config, validate=score_of, folder=tmp_path)
    assert_same_weights(resumed, whole)
    assert without_time(report) == without_time(expected)
    assert not resumed.table.weight.requires_grad, "what `before` froze is frozen again"
    assert resumed.befores == (("map",) if stop_at < 8 else ()), "`before` runs once, in the call that enters the phase"


def test_a_source_that_seeds_when_it_is_made_changes_nothing(tmp_path):
    """A later stage's source is made from other systems, which are seeded when they are built: also in the middle of a resumed run."""
    config = replace(CONFIG, checkpoint_seconds=0, patience=None)

    def fit_with_seeding(toy):
        def source_of(phase):
            torch.manual_seed(99)
            return NextEventSource(view, batch_size=config.batch_size, max_history=6, seed=config.seed)

        return fit(toy, view, source_of, config=config, folder=tmp_path / type(toy).__name__, progress=False)

    class Draws(Toy):
        steps, stop_at = 0, None

        def losses(self, batch):
            self.steps += 1
            if self.steps == self.stop_at:
                raise RuntimeError("power cut")
            return {name: loss * torch.rand(()) for name, loss in super().losses(batch).items()}

    class Whole(Draws):
        pass

    whole, view = make(Whole)
    fit_with_seeding(whole)
    toy, _ = make(Draws)
    toy.stop_at = 5
    with pytest.raises(RuntimeError, match="power cut"):
        fit_with_seeding(toy)
    resumed, _ = make(Draws)
    fit_with_seeding(resumed)
    assert_same_weights(resumed, whole)


def test_a_finished_run_is_only_read(tmp_path):
    toy, view = make()
    first = train(toy, view, CONFIG, validate=score_of, folder=tmp_path)
    again, _ = make()
    second = train(again, view, CONFIG, validate=lambda s: pytest.fail("nothing is left to do"), folder=tmp_path)
    assert without_time(second) == without_time(first)
    assert_same_weights(toy, again)
    (saved,) = tmp_path.glob("checkpoint-*")
    assert not (saved / "best.safetensors").exists()


def test_other_settings_are_refused_by_name(tmp_path):
    toy, view = make()
    train(toy, view, CONFIG, folder=tmp_path)
    toy, _ = make()
    with pytest.raises(SnapshotError, match=r"trainer\.lr = 0\.02, now it is 0\.5"):
        train(toy, view, replace(CONFIG, lr=0.5), folder=tmp_path)
    wider, _ = make(dim=9)
    with pytest.raises(SnapshotError, match=r"system\.dim = 8, now it is 9"):
        train(wider, view, CONFIG, folder=tmp_path)
    other, _ = make(TwoPhases)
    with pytest.raises(SnapshotError, match="phases"):
        train(other, view, CONFIG, folder=tmp_path)


def test_a_catalogue_of_another_size_does_not_fit(tmp_path):
    toy, view = make()
    train(toy, view, CONFIG, folder=tmp_path)
    larger = training_toys.view_of(view.histories, 50)
    toy, _ = make(view=larger)
    with pytest.raises(SnapshotError, match="does not fit Toy"):
        train(toy, larger, CONFIG, folder=tmp_path)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    whole, view = make()
    expected = train(whole, view, CONFIG)
    previous = signal.getsignal(signal.SIGINT)

    class Presses(Toy):
        steps = 0

        def losses(self, batch):
            self.steps += 1
            if self.steps == 6:
                signal.raise_signal(signal.SIGINT)
            return super().losses(batch)

    Presses.__name__ = "Toy"
    toy, _ = make(Presses)
    with pytest.raises(TrainingInterrupted, match=r"stopped after 6 steps and saved in .*run the same again"):
        train(toy, view, CONFIG, folder=tmp_path)
    assert signal.getsignal(signal.SIGINT) is previous
    resumed, _ = make()
    report = train(resumed, view, CONFIG, folder=tmp_path)
    assert_same_weights(resumed, whole)
    assert without_time(report) == without_time(expected)


def test_ctrl_c_without_a_folder_says_that_nothing_is_kept():
    class Presses(Toy):
        def losses(self, batch):
            signal.raise_signal(signal.SIGINT)
            return super().losses(batch)

    toy, view = make(Presses)
    with pytest.raises(TrainingInterrupted, match="nothing is kept"):
        train(toy, view, CONFIG)


def test_a_second_ctrl_c_stops_at_once():
    class Impatient(Toy):
        def losses(self, batch):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the second one must not wait")

    toy, view = make(Impatient)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(toy, view, CONFIG)
    assert not isinstance(caught.value, TrainingInterrupted)


def test_trains_outside_the_main_thread():
    toy, view = make()
    reports = []
    thread = threading.Thread(target=lambda: reports.append(train(toy, view, CONFIG)))
    thread.start()
    thread.join()
    assert reports[0].epochs == 4


# --- what a person sees, and where it runs ---


def test_without_a_terminal_a_line_per_epoch_on_standard_error(capsys):
    toy, view = make()
    source = training_toys.NextEventSource(view, batch_size=16, max_history=6)
    fit(toy, view, lambda phase: source, config=replace(CONFIG, epochs=2), validate=lambda s: 0.25)
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert first.startswith("Toy train epoch 1  loss 2.")
    assert "score 0.2500  (best)" in first
    assert "(best)" not in second


def test_on_a_terminal_a_bar_with_loss_and_speed(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "140")
    toy, view = make()
    toy.pause = 0.05
    source = training_toys.NextEventSource(view, batch_size=16, max_history=6)
    fit(toy, view, lambda phase: source, config=replace(CONFIG, epochs=2))
    err = capsys.readouterr().err
    assert "rows/s" in err
    assert "epoch 2  loss" in err


def test_devices_are_checked():
    assert chosen_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="'toaster' is not known"):
        chosen_device("toaster")
    if not torch.cuda.is_available():
        assert chosen_device("auto").type == "cpu"
        with pytest.raises(ConfigError, match="finds no GPU"):
            chosen_device("cuda")


def test_additions_have_one_order_with_two_threads():
    """The backward of x[rows] adds in any order on two threads otherwise; afterwards torch is as it was."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    weight, rows, gradient = (
        torch.randn(50, 16, requires_grad=True),
        torch.randint(0, 50, (40_000,)),
        torch.randn(40_000, 16),
    )

    def backward() -> Tensor:
        weight.grad = None
        weight[rows].backward(gradient)
        assert weight.grad is not None
        return weight.grad.clone()

    with deterministic(True):
        first = backward()
        assert all(torch.equal(first, backward()) for _ in range(10))
    assert not torch.are_deterministic_algorithms_enabled()


# --- phases that learn in their own way ---


class Counted(Toy):
    """Its map is set from counts of the batches it is handed, then the table is trained as usual."""

    handed = 0
    press_at = 0

    def phases(self):
        return (
            Phase(name="counts", feed="next_event", losses=self.losses, learn=self.learn),
            Phase(name="table", feed="next_event", losses=self.losses, parameters=self.table.parameters, epochs=2),
        )

    def learn(self, batches):
        counts = torch.zeros(self.space.num_items + 1)
        for batch in batches:
            self.handed += 1
            if self.handed == self.press_at:
                signal.raise_signal(signal.SIGINT)
            counts += torch.bincount(batch.targets.items.values, minlength=len(counts))
        self.buffer("seen", counts)
        return {"left": torch.tensor(3.0), "other": torch.tensor(0.5)}


class OnlyCounts(Counted):
    def phases(self):
        return super().phases()[:1]


def test_a_phase_that_learns_gets_one_epoch_of_batches_in_place_of_steps():
    toy, view = make(OnlyCounts)
    report = train(toy, view, CONFIG, validate=lambda system: float(system.seen.sum()))
    source = NextEventSource(view, batch_size=16, max_history=6, seed=5, random_window=True)
    batches = list(source.batches(0))
    assert toy.handed == len(batches) == source.steps_per_epoch() > 1
    expected = sum(torch.bincount(batch.targets.items.values, minlength=12) for batch in batches)
    assert torch.equal(toy.seen, expected.float())
    (point,) = report.curve
    assert (point.loss, point.losses, point.steps) == (3.5, {"left": 3.0, "other": 0.5}, 1)
    assert (report.best_epoch, report.best_score, report.stopped) == (1, float(expected.sum()), "epochs")
    assert not toy.training


def test_a_later_phase_goes_on_from_what_was_learned_and_nothing_is_learned_twice(tmp_path):
    whole, view = make(Counted)
    report = train(whole, view, CONFIG)
    assert (report.phases, report.epochs) == (("counts", "table"), 3)
    half, _ = make(Counted)
    presses = iter([signal.raise_signal])

    def pressed_once(system):
        for press in presses:
            press(signal.SIGINT)
        return 0.0

    with pytest.raises(TrainingInterrupted):
        train(half, view, CONFIG, validate=pressed_once, folder=tmp_path)
    resumed, _ = make(Counted)
    train(resumed, view, CONFIG, validate=lambda system: 0.0, folder=tmp_path)
    assert resumed.handed == 0
    assert torch.equal(resumed.seen, whole.seen)


def test_ctrl_c_while_learning_starts_the_pass_anew(tmp_path):
    whole, view = make(OnlyCounts)
    train(whole, view, CONFIG)
    toy, _ = make(OnlyCounts)
    toy.press_at = 2
    with pytest.raises(TrainingInterrupted, match="saved in"):
        train(toy, view, CONFIG, folder=tmp_path)
    assert "seen" not in toy.state_dict()
    again, _ = make(OnlyCounts)
    report = train(again, view, CONFIG, folder=tmp_path)
    assert again.handed == whole.handed
    assert report.steps == 1
    assert_same_weights(again, whole)


def test_a_phase_that_learns_no_number_or_nothing_is_refused():
    class Broken(OnlyCounts):
        def learn(self, batches):
            return {"left": torch.tensor(math.nan)}

    class Silent(OnlyCounts):
        def learn(self, batches):
            return {}

    toy, view = make(Broken)
    with pytest.raises(Diverged, match="loss became nan"):
        train(toy, view, CONFIG)
    toy, view = make(Silent)
    with pytest.raises(ConfigError, match=r"learn\(\) gave no loss"):
        train(toy, view, CONFIG)
