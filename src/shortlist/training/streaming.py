"""Training on a stream of clicks whose conversions come late: first on what is known, then window by window as time goes on.

    1  auxiliary network   on clicks that are old enough at `start`, then frozen (rules that have one)
    2  first training      on the same clicks, once each per epoch, labelled as known at `start`
    3  for every window    tell the chances of its clicks, judged by their final outcomes; then one pass, in time order, over the samples
                           *emitted* in the window: clicks whose observation window closed, conversions that came late, ...

Step 3 is the protocol of ES-DFM (Yang et al., AAAI 2021, section 5) and DEFUSE: nothing is read before its time, and every click is judged
by a network that has not learned from it. The ranker is any of the registry, built on the rule's outputs as its tasks; it is left as it is.

    ranker, report = train_stream(make, view, log, config=StreamConfig(), trainer=TrainerConfig(lr=1e-3), start=day_30)

R clicks, S samples, n of a window.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shortlist.data.batches import Batch
from shortlist.data.histories import Int, View
from shortlist.errors import ConfigError, DataError
from shortlist.metrics.classification import auc, logloss, pr_auc
from shortlist.models.base import Ranker, load_weights
from shortlist.training.checkpoint import (
    Checkpoint,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from shortlist.training.config import FeedbackChoice, TrainerConfig
from shortlist.training.context import Interrupt, chosen_device, deterministic, only
from shortlist.training.feedback.base import FeedbackRule, make_feedback
from shortlist.training.feedback.clicks import (
    ClickLog,
    Make,
    SampleSource,
    auxiliary_chances,
    learned_by,
    source_for,
)
from shortlist.training.feedback.streams import Emitted, as_known, emit
from shortlist.training.feedback.windows import HOUR_S, Windows
from shortlist.training.optimisers import build_optimisers, clip_gradients
from shortlist.training.progress import Progress
from shortlist.training.trainer import Diverged, TrainingInterrupted, check_same, fit, run_settings, summed

CLICKS_AT_ONCE = 4_096


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig:
    """How a stream is made of clicks and learned from."""

    feedback: FeedbackChoice = FeedbackChoice(rule="defuse")  # noqa: RUF009  (frozen)
    """The feedback rule, its observation window, and the epochs of its auxiliary network; `task` is not read."""
    attribution_hours: float = 720.0
    """A conversion counts for a click where it comes before so many hours have passed."""
    window_hours: float = 1.0
    """Between two trainings."""
    first_epochs: int = 5
    """Passes over the clicks before the stream."""

    def __post_init__(self) -> None:
        if not self.window_hours > 0 or self.first_epochs < 1:
            raise ConfigError(
                f"window_hours must be above 0 and first_epochs at least 1, got {self.window_hours:g} and {self.first_epochs}"
            )
        self.windows()

    def windows(self) -> Windows:
        """Observation and attribution window; ConfigError where the first is not the shorter one."""
        return Windows.of_hours(self.feedback.observation_hours, self.attribution_hours)

    def rule(self) -> FeedbackRule:
        """The feedback rule; ConfigError where there is none."""
        rule = make_feedback(self.feedback)
        if rule is None:
            raise ConfigError('a stream needs a feedback rule: set feedback.rule, for example to "vanilla"')
        return rule


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowQuality:
    """How well the clicks of one window were told, before any of them was learned from."""

    start: int
    """Seconds."""
    clicks: int
    conversions: int
    """Of the clicks, whenever they come within the attribution window."""
    samples: int
    """Emitted in the window, and learned from after it was judged."""
    nll: float | None
    """Mean negative log likelihood, in nats; None without a click."""
    auc: float | None
    """None where all clicks end alike; so pr_auc."""
    pr_auc: float | None
    predicted: float | None
    """Mean chance told; None without a click."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamReport:
    """How a stream went."""

    rule: str
    windows: tuple[WindowQuality, ...]
    steps: int
    """Of the stream; first training not counted."""
    seconds: float

    def mean(self, metric: str) -> float:
        """A metric of the windows, weighted by clicks, over those that have it. DataError where none has."""
        told = [(getattr(w, metric), w.clicks) for w in self.windows if getattr(w, metric) is not None]
        if not told:
            raise DataError(f"no window of the stream has {metric}; take longer windows or more clicks")
        values, weights = zip(*told, strict=True)
        return float(np.average(values, weights=weights))


def train_stream(
    make: Make,
    view: View,
    log: ClickLog,
    *,
    config: StreamConfig,
    trainer: TrainerConfig,
    start: int,
    end: int | None = None,
    folder: Path | None = None,
    progress: bool = True,
) -> tuple[Ranker, StreamReport]:
    """Train a ranker on a stream and judge it on the way; it is given back in evaluation mode.

    Args:
        make: builds the ranker, and the auxiliary network, for a space whose tasks are their outputs.
        view: what `prepare` sees; it must end before `start`.
        log: R clicks, in any order.
        trainer: rates, batch size, seed, device; its epochs, patience and max_seconds are not read.
        start: seconds: where the first training ends and the stream begins.
        end: seconds: where it ends; None = behind the last click.
        folder: keeps checkpoints, one at the end of a window at most every `checkpoint_seconds`; a run that was stopped goes on there and
            ends with the same bits.

    Raises:
        DataError: the view reaches behind `start`, or there is nothing to learn from before it; ConfigError: unusable settings, or a
        ranker that can not follow a stream; Diverged; SnapshotError: a checkpoint of other settings; TrainingInterrupted on Ctrl-C.
    """
    if view.now > start:
        raise DataError(
            f"the view holds events up to {view.now}, the stream begins at {start}: what systems prepare on would leak into it; "
            "give a view that ends there"
        )
    if end is None:
        end = int(log.clicked_at.max(initial=start - 1)) + 1
    if not start < end:
        raise DataError(f"no click comes at or after the start of the stream, {start}; choose an earlier start")
    devices = [chosen_device(trainer.device)] if chosen_device(trainer.device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        run = _Run(make, view, log, config, trainer, (start, end), folder, progress)
        with (
            deterministic(trainer.deterministic),
            Interrupt() as interrupt,
            Progress(shown=progress, title=f"{type(run.system).__name__} {config.feedback.rule}") as shown,
        ):
            report = run.finish(interrupt, shown)
    return run.system, report


def chances(ranker: Ranker, rule: FeedbackRule, batch: Batch) -> Tensor:
    """float32 [total] of a conversion, for the batch's candidates, by a ranker whose tasks are the rule's outputs."""
    scores = ranker.score(batch)
    return rule.chance(torch.stack([scores[task] for task in rule.heads], 1))


class _Run:
    """One call of `train_stream`."""

    def __init__(
        self,
        make: Make,
        view: View,
        log: ClickLog,
        config: StreamConfig,
        trainer: TrainerConfig,
        span: tuple[int, int],
        folder: Path | None,
        progress: bool,
    ) -> None:
        self.log, self.config, self.trainer, self.folder = log, config, trainer, folder
        self.start, self.end = span
        self.windows, self.rule = config.windows(), config.rule()
        self.device = chosen_device(trainer.device)
        self.outcome = log.outcome(self.windows)
        self.by_time: Int = np.argsort(log.clicked_at, kind="stable")
        self.samples = emit(log.clicked_at, log.converted_at, self.windows, self.rule.stream).between(*span)
        known = as_known(log.clicked_at, log.converted_at, self.windows, self.start - 1)
        torch.manual_seed(trainer.seed)
        self.auxiliary = auxiliary_chances(
            make,
            view,
            log,
            self.rule.auxiliary,
            self.windows,
            self.samples,
            now=self.start - 1,
            trainer=self._for(config.feedback.auxiliary_epochs),
            folder=self._folder("auxiliary"),
            progress=progress,
        )
        torch.manual_seed(trainer.seed)
        self.system = make(replace(view.space, tasks=self.rule.heads))
        name = type(self.system).__name__
        fit(
            self.system,
            view,
            lambda phase: source_for(phase, name, lambda: self._source(known, {}, first=True)),
            config=self._for(config.first_epochs),
            folder=self._folder("first"),
            progress=progress,
        )
        self.told: list[dict[str, Any]] = []
        self.steps, self.seconds = 0, 0.0
        self.began_at = self.saved_at = time.monotonic()

    def _for(self, epochs: int) -> TrainerConfig:
        """The trainer's settings for a training before the stream."""
        return replace(self.trainer, epochs=epochs, patience=None, max_seconds=None)

    def _folder(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name

    def _source(self, samples: Emitted, auxiliary: Mapping[str, Tensor], *, first: bool = False) -> SampleSource:
        """Batches of samples: shuffled for the first training, as they stand in the stream."""
        return SampleSource(
            self.log,
            samples.click,
            learned_by(self.rule, self.rule.heads, samples, auxiliary, first=first),
            batch_size=self.trainer.batch_size,
            max_history=self.system.max_history,
            seed=self.trainer.seed if first else None,
        )

    # --- the stream ---

    def finish(self, interrupt: Interrupt, shown: Progress) -> StreamReport:
        """From wherever the run stands to the end."""
        phase = self.system.phases()[-1]
        settings = self._settings()
        with only(self.system, phase) as parameters:
            self.optimisers = build_optimisers(self.system, self.trainer, parameters)
            torch.manual_seed(self.trainer.seed)
            self._restore(settings)
            step = round(self.config.window_hours * HOUR_S)
            edges = [*range(self.start, self.end, step), self.end]
            for first, last in list(itertools.pairwise(edges))[len(self.told) :]:
                quality = self._judge(first, last)
                self._learn(first, last)
                self.told.append(asdict(quality))
                self._show(shown, quality)
                done = last == self.end
                if done or interrupt.asked or time.monotonic() - self.saved_at >= self.trainer.checkpoint_seconds:
                    self._save(settings)
                if interrupt.asked and not done:
                    raise TrainingInterrupted(
                        f"the stream was stopped after {len(self.told):,} windows; "
                        + (
                            "nothing is kept, since no folder was given"
                            if self.folder is None
                            else "run it again to go on"
                        )
                    )
        self.system.eval()
        return StreamReport(
            rule=self.config.feedback.rule,
            windows=tuple(WindowQuality(**told) for told in self.told),
            steps=self.steps,
            seconds=self.seconds + time.monotonic() - self.began_at,
        )

    @torch.no_grad()
    def _judge(self, first: int, last: int) -> WindowQuality:
        """The clicks of a window by their final outcomes, with the network as it stands."""
        bounds = np.searchsorted(self.log.clicked_at[self.by_time], [first, last])
        click = self.by_time[slice(*bounds)]
        told: dict[str, float | None] = dict.fromkeys(("nll", "auc", "pr_auc", "predicted"))
        if len(click):
            told |= self._measured(click)
        return WindowQuality(
            start=first,
            clicks=len(click),
            conversions=int(self.outcome[click].sum()),
            samples=len(self.samples.between(first, last)),
            **told,
        )

    def _measured(self, click: Int) -> dict[str, float | None]:
        """Metrics of clicks by name."""
        self.system.eval()
        parts = [
            chances(self.system, self.rule, self.log.batch(part, self.system.max_history).to(self.device)).cpu()
            for part in np.array_split(click, -(-len(click) // CLICKS_AT_ONCE))
        ]
        chance = torch.cat(parts).double().numpy()
        if not np.isfinite(chance).all():
            raise Diverged(f"{type(self.system).__name__} tells chances that are not finite; lower lr")
        label, mean = self.outcome[click], float(chance.mean())
        if not 0 < label.sum() < len(label):
            return {"nll": logloss(label, chance), "predicted": mean}
        return {
            "nll": logloss(label, chance),
            "auc": auc(label, chance),
            "pr_auc": pr_auc(label, chance),
            "predicted": mean,
        }

    def _learn(self, first: int, last: int) -> None:
        """One pass over the samples emitted in a window, in their order."""
        bounds = np.searchsorted(self.samples.emitted_at, [first, last])
        index = np.arange(*bounds)
        if not len(index):
            return
        samples, where = self.samples.select(index), torch.from_numpy(index)
        told = {name: chance[where] for name, chance in self.auxiliary.items()}
        self.system.train()
        for batch in self._source(samples, told).batches(0):
            self._step(batch.to(self.device))

    def _step(self, batch: Batch) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.trainer.precision == "bf16"):
            loss = summed(self.system.phases()[-1].losses(batch))
        if not math.isfinite(float(loss.detach())):
            raise Diverged(f"{type(self.system).__name__}: the loss became {float(loss):g} in the stream; lower lr")
        self.system.zero_grad(set_to_none=True)
        loss.backward()
        if self.trainer.clip_norm is not None:
            clip_gradients(self.system.parameters(), self.trainer.clip_norm)
        for optimiser in self.optimisers:
            optimiser.step()
        self.steps += 1

    def _show(self, shown: Progress, quality: WindowQuality) -> None:
        if quality.nll is not None:
            day = (quality.start - self.start) / (24 * HOUR_S)
            shown.line(f"day {day:.2f}  {quality.clicks:,} clicks  nll {quality.nll:.4f}")

    # --- checkpoints ---

    def _settings(self) -> dict[str, Any]:
        """What must be the same when a run is resumed."""
        stream = {f"stream.{name}": value for name, value in asdict(self.config).items()}
        of_run = run_settings(self.system, self.trainer, self.system.phases())
        return {**of_run, **stream, "start": self.start, "end": self.end, "clicks": len(self.log)}

    def _save(self, settings: dict[str, Any]) -> None:
        if self.folder is None:
            return
        self.seconds += time.monotonic() - self.began_at
        self.began_at = self.saved_at = time.monotonic()
        save_checkpoint(
            self.folder,
            Checkpoint(
                settings=settings,
                place={"told": self.told, "steps": self.steps, "seconds": self.seconds},
                weights=self.system.state_dict(),
                optimisers=[optimiser.state_dict() for optimiser in self.optimisers],
                random=random_state(self.device),
            ),
        )

    def _restore(self, settings: dict[str, Any]) -> None:
        checkpoint = None if self.folder is None else load_checkpoint(self.folder)
        if checkpoint is None:
            return
        check_same(settings, checkpoint.settings, self.folder)
        load_weights(self.system, checkpoint.weights)
        self.system.to(self.device)
        for optimiser, state in zip(self.optimisers, checkpoint.optimisers, strict=True):
            optimiser.load_state_dict(state)
        self.told, self.steps = checkpoint.place["told"], checkpoint.place["steps"]
        self.seconds = checkpoint.place["seconds"]
        set_random_state(checkpoint.random)
