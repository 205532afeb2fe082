"""One trainer for every system: prepare, then its phases, with checkpoints, early stopping and an exact resume.

    fit(system, view, source_of, config=TrainerConfig(), validate=ndcg, folder=out)

Everything that decides the next step (weights, optimiser state, generators, place, best weights, curve) is in the checkpoint, and
batches are a function of (seed, epoch, step); so a run that was killed ends with the same bits as one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shortlist.data.batches import Batch
from shortlist.data.histories import View
from shortlist.embeddings.base import finish_tables, prepare_tables
from shortlist.errors import ConfigError, DataError, ShortlistError, SnapshotError
from shortlist.models.base import Losses, Phase, System, load_weights
from shortlist.training.checkpoint import (
    Checkpoint,
    Tensors,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
    write_atomically,
)
from shortlist.training.config import TrainerConfig
from shortlist.training.context import Interrupt, chosen_device, deterministic, only
from shortlist.training.gradients.base import backward, make_rule
from shortlist.training.optimisers import build_optimisers, clip_gradients
from shortlist.training.progress import Progress
from shortlist.training.sources import BatchSource

__all__ = ["CurvePoint", "Diverged", "TrainReport", "TrainerConfig", "TrainingInterrupted", "fit", "summed"]

Combine = Callable[[Losses], Tensor]
Stopped = Literal["epochs", "patience", "max_seconds"]
CURVE_FILE = "curve.jsonl"
FREE_SETTINGS = ("max_seconds", "checkpoint_seconds", "device")
"""Settings that a resumed run may change."""
STEPS_PER_CHECK = {"cpu": 1}
"""Steps between looks at the loss by kind of device. A look waits for the device, so others are looked at more rarely."""
STEPS_PER_CHECK_ELSEWHERE = 20


class Diverged(ShortlistError):
    """A loss or gradient norm became NaN or infinite."""


class TrainingInterrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C, after a checkpoint where a folder was given; the message says how to go on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvePoint:
    """One epoch; a line of curve.jsonl."""

    phase: str
    epoch: int
    """1 for the first of the phase."""
    steps: int
    """Steps of the epoch; fewer than planned where the time budget ended it."""
    loss: float
    """Mean over the steps of the combined loss."""
    losses: dict[str, float]
    """Mean over the steps by task, and of the gradient norm where it is clipped."""
    score: float | None
    """Result of `validate`, higher is better; None where it did not run."""
    seconds: float
    """Training time since the start of the run, validation included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainReport:
    """How a training went."""

    phases: tuple[str, ...]
    """Phases that trained, in order."""
    epochs: int
    """Epochs over all phases."""
    steps: int
    """Steps over all phases."""
    best_epoch: int | None
    """Epoch of the last phase whose weights were kept; None without validation."""
    best_score: float | None
    seconds: float
    """Wall time, interruptions not counted."""
    curve: tuple[CurvePoint, ...]
    stopped: Stopped
    """Why the last phase ended."""


@dataclass(kw_only=True, slots=True)
class _Place:
    """Where training stands; saved as JSON."""

    phase: int = -1
    """-1 before `prepare`."""
    epoch: int = 0
    step: int = 0
    """Steps made in the epoch."""
    total_steps: int = 0
    frozen: list[str] = field(default_factory=list)
    """Parameters that were frozen when the phase began."""
    sums: dict[str, float] = field(default_factory=dict)
    """Sum over the epoch's steps of each task's loss, and of the combined one under the empty name."""
    best_score: float | None = None
    best_epoch: int | None = None
    misses: int = 0
    """Validations since the best."""
    seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)
    rule: dict[str, Any] = field(default_factory=dict)
    """What the gradient rule keeps between steps."""
    stopped: Stopped | None = None
    """Set when all is done and the best weights are back."""


def summed(losses: Losses) -> Tensor:
    """The plain way to combine the losses of several tasks: their sum, a scalar."""
    return torch.stack(list(losses.values())).sum()


def fit(
    system: System,
    view: View,
    source_of: Callable[[Phase], BatchSource],
    *,
    config: TrainerConfig,
    validate: Callable[[System], float] | None = None,
    folder: Path | None = None,
    progress: bool = True,
    combine: Combine = summed,
) -> TrainReport:
    """Train `system` in place and leave it in evaluation mode with its best weights.

    Tells tables made by counts what they need, runs `system.prepare(view)`, then each phase: its `before`, then epochs over its
    source, or its own `learn` in their place. In the end tables drop what only training needed.
    Validation, early stopping and the return of the best weights belong to the last phase; earlier ones run all their epochs, since
    their goal is another one.

    Args:
        source_of: gives the batches of a phase. It does not move the random state of training.
        validate: called in evaluation mode without gradients; higher is better. It does not move the random state of training.
        folder: keeps checkpoints and curve.jsonl; where it holds a checkpoint, training goes on from there.
        progress: a bar on a terminal, a line per epoch elsewhere, both on standard error.
        combine: makes one scalar of the losses by task.

    Raises:
        Diverged: on a NaN or infinite loss; DataError on a source without batches; ConfigError on unusable settings;
        SnapshotError on a damaged checkpoint, or one of other settings; TrainingInterrupted on Ctrl-C.
    """
    with (
        deterministic(config.deterministic),
        Interrupt() as interrupt,
        Progress(shown=progress, title=type(system).__name__) as shown,
    ):
        run = _Run(system, view, source_of, config, validate, folder, combine, shown, interrupt)
        report = run.finish()
    finish_tables(system)
    return report


class _Run:
    """One call of `fit`: what it was given and where it stands."""

    def __init__(
        self,
        system: System,
        view: View,
        source_of: Callable[[Phase], BatchSource],
        config: TrainerConfig,
        validate: Callable[[System], float] | None,
        folder: Path | None,
        combine: Combine,
        shown: Progress,
        interrupt: Interrupt,
    ) -> None:
        self.system, self.view, self.source_of, self.config = system, view, source_of, config
        self.validate, self.folder, self.combine = validate, folder, combine
        self.shown, self.interrupt = shown, interrupt
        self.name = type(system).__name__
        self.device = chosen_device(config.device)
        self.system.to(self.device)
        self.phases = system.phases()
        self.settings = run_settings(system, config, self.phases)
        self.place = _Place()
        self.best: Tensors | None = None
        self.rule = make_rule(config.gradients)
        self.shared: list[nn.Parameter] = []
        self.optimisers: list[Optimizer] = []
        self.recent: list[dict[str, Tensor]] = []
        self.saved_optimisers: list[dict[str, Any]] = []
        self.look_every = STEPS_PER_CHECK.get(self.device.type, STEPS_PER_CHECK_ELSEWHERE)
        self.began_at = self.saved_at = time.monotonic()
        self.budget = math.inf if config.max_seconds is None else config.max_seconds

    # --- the whole run ---

    def finish(self) -> TrainReport:
        """Train from wherever the run stands to the end."""
        torch.manual_seed(self.config.seed)
        if not self._restore():
            prepare_tables(self.system, self.view)
            self.system.prepare(self.view)
            self._enter_phase(0)
        reason = self.place.stopped
        while reason is None and self.place.phase < len(self.phases):
            reason = self._run_phase(self.phases[self.place.phase])
            last = self.place.phase == len(self.phases) - 1
            if not last and reason != "max_seconds":
                self._enter_phase(self.place.phase + 1)
                reason = None
        self._settle(reason or "epochs")
        self._stop_if_asked()
        return self._report()

    def _enter_phase(self, phase: int) -> None:
        """Do the work before a phase and note that it is done."""
        self.place.phase, self.place.epoch, self.place.step, self.place.sums = phase, 0, 0, {}
        self.optimisers, self.saved_optimisers = [], []
        self.rule, self.place.rule = make_rule(self.config.gradients), {}
        before = self.phases[phase].before if phase < len(self.phases) else None
        if before is not None:
            before(self.view)
        # Buffers made just now may stand on another device.
        self.system.to(self.device)
        self.place.frozen = [name for name, p in self.system.named_parameters() if not p.requires_grad]
        self._save()
        self._stop_if_asked()

    def _settle(self, reason: Stopped) -> None:
        """Bring the best weights back; a run that was not cut short is marked as done."""
        if self.best is not None:
            load_weights(self.system, self.best)
            self.system.to(self.device)
        self.system.eval()
        if self.place.stopped is None and reason != "max_seconds":
            self.place.stopped = reason
            self.best, self.optimisers = None, []
            self._save()
        elif self.place.stopped is None:
            self.place.stopped = reason

    def _report(self) -> TrainReport:
        place = self.place
        curve = tuple(CurvePoint(**point) for point in place.curve)
        return TrainReport(
            phases=tuple(dict.fromkeys(point.phase for point in curve)),
            epochs=len(curve),
            steps=place.total_steps,
            best_epoch=place.best_epoch,
            best_score=place.best_score,
            seconds=place.seconds + self._lap(),
            curve=curve,
            stopped=place.stopped or "epochs",
        )

    # --- one phase, one epoch, one step ---

    def _run_phase(self, phase: Phase) -> Stopped:
        # Made anew by a resumed run, which is then in the middle of its draws.
        with self._own_draws():
            source = self.source_of(phase)
        steps = source.steps_per_epoch()
        if steps < 1:
            raise DataError(f"{self.name}, phase {phase.name!r}: there is no batch to train on; check the log's cuts")
        if phase.learn is not None:
            if not self.place.epoch:
                self._learn(phase, phase.learn, source)
            return "epochs"
        epochs = self._epochs(phase)
        with only(self.system, phase) as parameters:
            self.optimisers = build_optimisers(self.system, self.config, parameters)
            for optimiser, state in zip(self.optimisers, self.saved_optimisers):
                optimiser.load_state_dict(state)
            trained = {id(p) for p in parameters}
            self.shared = [p for p in unique(self.system.shared_parameters()) if id(p) in trained]
            done = self.place.epoch * steps + self.place.step
            self.shown.begin(phase.name, epochs=epochs, steps=steps, done=done)
            while self.place.epoch < epochs:
                if self._out_of_patience():
                    return "patience"
                if not self._run_epoch(phase, source, steps, parameters):
                    self._end_epoch(phase, save=False)
                    return "max_seconds"
                self._end_epoch(phase, save=True)
        return "epochs"

    def _epochs(self, phase: Phase) -> int:
        """Epochs of a phase at most; a pass that learns in its own way is the only one."""
        return 1 if phase.learn is not None else phase.epochs or self.config.epochs

    def _learn(self, phase: Phase, learn: Callable[[Iterable[Batch]], Losses], source: BatchSource) -> None:
        """The phase's own learning in place of gradient steps; counts as one step, and starts anew when interrupted."""

        def handed() -> Iterator[Batch]:
            for batch in source.batches(0):
                self._stop_if_asked(phase)
                yield batch.to(self.device)

        self.shown.begin(phase.name, epochs=1, steps=1, done=0)
        self.system.train()
        losses = {task: value.detach() for task, value in learn(handed()).items()}
        if not losses:
            raise ConfigError(f"{self.name}, phase {phase.name!r}: learn() gave no loss")
        self.recent.append({"": self.combine(losses), **losses})
        self.system.to(self.device)
        self.place.step += 1
        self.place.total_steps += 1
        self._look(phase)
        self._end_epoch(phase, save=True)

    def _run_epoch(self, phase: Phase, source: BatchSource, steps: int, parameters: list[nn.Parameter]) -> bool:
        """Train to the end of the epoch; False when the time budget ended before."""
        place = self.place
        self.system.train()
        if place.step == steps:
            return True
        began_at, rows = time.monotonic(), 0
        for batch in source.batches(place.epoch, place.step):
            if place.seconds + self._lap() >= self.budget:
                self._look(phase)
                self._save()
                return False
            self._step(phase, batch.to(self.device), parameters)
            rows += batch.size
            if len(self.recent) >= self.look_every:
                self._look(phase)
                self.shown.step(
                    place.epoch * steps + place.step,
                    epoch=place.epoch + 1,
                    loss=place.sums[""] / place.step,
                    rows_per_second=rows / (time.monotonic() - began_at),
                )
            if self.folder is not None and time.monotonic() - self.saved_at >= self.config.checkpoint_seconds:
                self._look(phase)
                self._save()
            self._stop_if_asked(phase)
        self._look(phase)
        if place.step != steps:
            raise DataError(
                f"{self.name}, phase {phase.name!r}: the source promised {steps} steps and gave {place.step}"
            )
        return True

    def _step(self, phase: Phase, batch: Batch, parameters: list[nn.Parameter]) -> None:
        """One update; its losses are kept on the device until the next look."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            losses = phase.losses(batch)
            if not losses:
                raise ConfigError(f"{self.name}, phase {phase.name!r}: losses() gave no loss")
            losses = self._weighed(phase, losses)
            loss = self.combine(losses)
        if not loss.requires_grad:
            raise ConfigError(
                f"{self.name}, phase {phase.name!r}: the loss depends on none of the parameters this phase trains"
            )
        self.system.zero_grad(set_to_none=True)
        seen = {"": loss.detach(), **{task: value.detach() for task, value in losses.items()}}
        if self.rule is None or len(losses) < 2:
            loss.backward()
        else:
            seen |= backward(self.rule, losses, self.shared)
        if self.config.clip_norm is not None:
            seen["gradient norm"] = clip_gradients(parameters, self.config.clip_norm)
        for optimiser in self.optimisers:
            optimiser.step()
        self.recent.append(seen)
        self.place.step += 1
        self.place.total_steps += 1

    def _weighed(self, phase: Phase, losses: Losses) -> Losses:
        """Losses of several tasks, each times its weight in this epoch."""
        config = self.config
        if len(losses) < 2 or not (config.task_weights or config.task_decay):
            return losses
        for name in ("task_weights", "task_decay"):
            if getattr(config, name) and len(getattr(config, name)) != len(losses):
                raise ConfigError(
                    f"{self.name}, phase {phase.name!r}: {name} has {len(getattr(config, name))} numbers for the tasks "
                    f"{', '.join(losses)}; give one each"
                )
        weights = config.task_weights or (1.0,) * len(losses)
        decay = config.task_decay or (1.0,) * len(losses)
        by_task = [weight * factor**self.place.epoch for weight, factor in zip(weights, decay)]
        return {task: loss * weight for (task, loss), weight in zip(losses.items(), by_task)}

    def _look(self, phase: Phase) -> None:
        """Read the losses since the last look, add them up, and refuse to go on from NaN or infinity."""
        if not self.recent:
            return
        names = list(self.recent[0])
        table = torch.stack([torch.stack([seen[name].float() for name in names]) for seen in self.recent]).tolist()
        first_step = self.place.step - len(table) + 1
        self.recent = []
        for step, values in enumerate(table, start=first_step):
            for name, value in zip(names, values):
                if not math.isfinite(value):
                    raise Diverged(self._remedy(phase, step, name or "loss", value))
                self.place.sums[name] = self.place.sums.get(name, 0.0) + value

    def _remedy(self, phase: Phase, step: int, name: str, value: float) -> str:
        advice = ["lower lr"]
        if self.config.clip_norm is None:
            advice.append("set clip_norm")
        if self.config.precision == "bf16":
            advice.append('set precision = "fp32"')
        advice.append("look for extreme values in the numeric fields and labels")
        return (
            f"{self.name}: {name} became {value} in phase {phase.name!r}, epoch {self.place.epoch + 1}, step {step}; "
            f"{', or '.join(advice)}"
        )

    # --- the end of an epoch ---

    def _end_epoch(self, phase: Phase, *, save: bool) -> None:
        """Validate, note the epoch in the curve, and save."""
        place = self.place
        if not save and not place.step and place.curve:
            return  # the budget ended between two epochs: nothing new to judge
        is_last_phase = place.phase == len(self.phases) - 1
        last_epoch = place.epoch + 1 == self._epochs(phase)
        due = (place.epoch + 1) % self.config.validate_every == 0 or last_epoch or not save
        score = self._validate() if self.validate is not None and is_last_phase and due else None
        if score is not None:
            self._compare(score)
        if place.step:
            means = {name: total / place.step for name, total in place.sums.items()}
            point = CurvePoint(
                phase=phase.name,
                epoch=place.epoch + 1,
                steps=place.step,
                loss=means.pop(""),
                losses=means,
                score=score,
                seconds=place.seconds + self._lap(),
            )
            place.curve.append(asdict(point))
            self._show(point)
        self._write_curve()
        if save:
            place.epoch, place.step, place.sums = place.epoch + 1, 0, {}
            self._save()
            self._stop_if_asked(phase)

    def _validate(self) -> float:
        assert self.validate is not None
        self.system.eval()
        with self._own_draws(), torch.no_grad():
            score = float(self.validate(self.system))
        self.system.train()
        if not math.isfinite(score):
            raise Diverged(
                f"{self.name}: validation gave {score} after epoch {self.place.epoch + 1}; lower lr, or check validate"
            )
        return score

    def _own_draws(self) -> AbstractContextManager[None]:
        """What is drawn inside does not move the random state of training."""
        return torch.random.fork_rng(devices=[self.device.index or 0] if self.device.type == "cuda" else [])

    def _compare(self, score: float) -> None:
        if self.place.best_score is None or score > self.place.best_score:
            self.place.best_score, self.place.best_epoch, self.place.misses = score, self.place.epoch + 1, 0
            self.best = _weights(self.system)
        else:
            self.place.misses += 1

    def _out_of_patience(self) -> bool:
        return self.config.patience is not None and self.place.misses >= self.config.patience

    def _show(self, point: CurvePoint) -> None:
        scored = "" if point.score is None else f"  score {point.score:.4f}"
        best = "  (best)" if point.score is not None and self.place.best_epoch == point.epoch else ""
        self.shown.line(
            f"{point.phase} epoch {point.epoch}  loss {point.loss:.4f}{scored}{best}  {point.seconds:.1f} s"
        )

    def _write_curve(self) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(point) for point in self.place.curve]
            write_atomically(self.folder / CURVE_FILE, "\n".join(lines) + "\n")

    # --- checkpoints ---

    def _lap(self) -> float:
        """Seconds of this call that are not yet in `place.seconds`."""
        return time.monotonic() - self.began_at

    def _save(self) -> None:
        if self.folder is None:
            return
        self.place.seconds += self._lap()
        self.began_at = time.monotonic()
        self.place.rule = {} if self.rule is None else self.rule.state()
        checkpoint = Checkpoint(
            settings=self.settings,
            place=asdict(self.place),
            weights=self.system.state_dict(),
            optimisers=[optimiser.state_dict() for optimiser in self.optimisers],
            random=random_state(self.device),
            best=self.best,
        )
        save_checkpoint(self.folder, checkpoint)
        self.saved_at = time.monotonic()

    def _restore(self) -> bool:
        """Take up the checkpoint in the folder; False where there is none."""
        checkpoint = load_checkpoint(self.folder) if self.folder is not None else None
        if checkpoint is None:
            return False
        check_same(self.settings, checkpoint.settings, self.folder)
        try:
            load_weights(self.system, checkpoint.weights)
        except (ValueError, RuntimeError) as error:
            raise SnapshotError(
                f"the checkpoint in {self.folder} does not fit {self.name} ({error}); train into another folder"
            ) from error
        self.system.to(self.device)
        self.place = _Place(**checkpoint.place)
        if self.rule is not None and self.place.rule:
            self.rule.load_state(self.place.rule)
        for name, parameter in self.system.named_parameters():
            parameter.requires_grad_(name not in self.place.frozen)
        self.best, self.saved_optimisers = checkpoint.best, checkpoint.optimisers
        set_random_state(checkpoint.random)
        return True

    def _stop_if_asked(self, phase: Phase | None = None) -> None:
        if not self.interrupt.asked:
            return
        if phase is not None:
            self._look(phase)
        self._save()
        if self.folder is None:
            raise TrainingInterrupted(
                f"training of {self.name} was stopped; nothing is kept, since no folder was given"
            )
        raise TrainingInterrupted(
            f"training of {self.name} was stopped after {self.place.total_steps:,} steps and saved in {self.folder}; "
            "run the same again to go on from there"
        )


def unique(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Each parameter once, in order of first appearance."""
    return list({id(p): p for p in parameters}.values())


def _weights(system: System) -> Tensors:
    """A copy of parameters and persistent buffers."""
    return {name: tensor.detach().clone() for name, tensor in system.state_dict().items()}


def run_settings(system: System, config: TrainerConfig, phases: Iterable[Phase]) -> dict[str, Any]:
    """What must be the same when a run is resumed, as plain JSON."""
    own = asdict(system.config) if is_dataclass(system.config) and not isinstance(system.config, type) else {}
    trainer = {name: value for name, value in config.deciding().items() if name not in FREE_SETTINGS}
    return {
        "system": type(system).__name__,
        "phases": [phase.name for phase in phases],
        **{f"trainer.{name}": json.loads(json.dumps(value)) for name, value in trainer.items()},
        **{f"system.{name}": json.loads(json.dumps(value, default=str)) for name, value in own.items()},
    }


def check_same(now: dict[str, Any], then: dict[str, Any], folder: Path | None) -> None:
    """SnapshotError for the first setting that is not what it was when the checkpoint in `folder` was written."""
    for name in sorted(now.keys() | then.keys()):
        if now.get(name) != then.get(name):
            raise SnapshotError(
                f"{folder} holds a checkpoint with {name} = {then.get(name)!r}, now it is {now.get(name)!r}; "
                "train into another folder, or delete this one"
            )
