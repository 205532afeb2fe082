"""From a dataset and settings to a trained run: stage by stage, each later stage on what earlier ones let through.

    prepare-only systems      counted on view("fit"), the events before the fit window
    next_event, targets       trained on view("fit"), stopped by NDCG@k of a full ranking of validation requests
    candidates                trained on the fit requests' candidates, as the stages before let them through, stopped on the
                              validation requests' candidates

Systems that learn no weights count again as time goes on, as a shop's nightly job would: before every slice of the fit window, so that
later stages learn from counts as fresh as those they will meet; before the validation window; and, when all is selected, before the test
window. Weights stay as they were trained and selected. Nothing is learned from the test window.

Training leaves its state in `OUT.training`: one folder per system, named by what went into it, so that a run that was stopped goes on
where it was, and a run with other settings of a late stage does not train the early ones again. The folder goes when all is done.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shortlist.cascade.cascade import Cascade
from shortlist.cascade.config import RunConfig, Stage
from shortlist.cascade.delayed import delayed_source
from shortlist.cascade.fitting import check_fits, default_config
from shortlist.cascade.indexing import IndexReport, build_indexes, still_valid
from shortlist.cascade.lessons import (
    Lessons,
    candidate_score,
    candidate_source,
    chunks,
    collect,
    full_ranking_score,
    joined,
    make_batch,
    sample,
    sample_shown,
    task_score,
)
from shortlist.cascade.run import Run, load_run, make_system, most_chosen, save_run
from shortlist.cascade.sharing import Shared, fingerprint
from shortlist.cascade.tasks import ActionLabels, ShownLabels, check_tasks, in_words, mean_auc
from shortlist.cascade.validation import validated
from shortlist.cascade.warm import FirstWeights
from shortlist.data.batches import Batch
from shortlist.data.dataset import Dataset
from shortlist.data.histories import Histories, Int, Requests, View
from shortlist.data.jagged import Jagged
from shortlist.data.splits import Window
from shortlist.embeddings.base import table_sizes
from shortlist.errors import ConfigError, DataError
from shortlist.models.base import Phase, Ranker, System, VectorRetriever
from shortlist.store.snapshot import check_writable
from shortlist.training.context import chosen_device, deterministic
from shortlist.training.session_parallel import SessionParallelSource
from shortlist.training.sources import BatchSource, NextEventSource, TargetSource
from shortlist.training.trainer import FREE_SETTINGS, fit

Labels = Callable[[Int, Jagged], dict[str, Tensor]]
"""Labels [total] by task for candidates of the requests with the given numbers."""
AT_THE_SOURCE = ("num_negatives", "max_targets")
"""Settings of [learning] that say what is taken of the lessons, not what they are."""

__all__ = ["Run", "SystemReport", "load_run", "train_cascade", "train_unsaved"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SystemReport:
    """How one system was made."""

    name: str
    stage: str
    epochs: int
    """0 for systems that are only prepared."""
    best_epoch: int | None
    ndcg: float
    """NDCG@k on validation requests: of a full ranking for retrievers, of what reached the stage for others."""
    seconds: float
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Of a ranker of several tasks: by task candidates, positives, auc and gauc on the validation window; see `task_quality`."""
    tables: Mapping[str, int] = field(default_factory=dict)
    """Bytes that each embedding table stores after training, by its place in the system."""


def train_cascade(
    dataset: Dataset,
    config: RunConfig | None,
    out: Path,
    *,
    progress: bool = True,
    resume: bool = True,
    keep_training: bool = False,
    shared: Shared | None = None,
) -> Run:
    """Train every system of every stage and write the run to `out`.

    Args:
        dataset: built with `config.data_settings`.
        config: None or one without stages = stages chosen from what the log offers.
        out: folder of the run; an earlier run there is replaced when the new one is complete.
        progress: lines and bars on standard error.
        resume: go on from a training that was stopped; False starts anew.
        keep_training: leave the training state for a later run with other settings.
        shared: what other trainings on this dataset made and need not be made again; None = nothing.

    Raises:
        ConfigError: settings that the log can not serve; SnapshotError: `out` is something else than a run; DataError: nothing to
        learn from; TrainingInterrupted: Ctrl-C, and how to go on.
    """
    config = _settled(dataset, config)
    out = Path(out)
    check_writable(out)
    state = out.with_name(f"{out.name}.training")
    if not resume:
        shutil.rmtree(state, ignore_errors=True)
    run = _trained(dataset, config, state, progress, shared)
    manifest = save_run(out, dataset, config, run.cascade, run.metrics)
    if not keep_training:
        shutil.rmtree(state, ignore_errors=True)
    return replace(run, folder=out, version=manifest.version)


def train_unsaved(
    dataset: Dataset,
    config: RunConfig | None,
    state: Path,
    *,
    progress: bool = True,
    shared: Shared | None = None,
    first: FirstWeights | None = None,
) -> Run:
    """As `train_cascade`, but no run is written: for trials, of which only the measurements are wanted.

    Args:
        state: folder of the training state, which stays: a training that was stopped goes on from there, and a later one with other
            settings takes what has not changed.
        first: weights that systems begin with; None = each begins with its own.
    """
    return _trained(dataset, _settled(dataset, config), state, progress, shared, first)


def _settled(dataset: Dataset, config: RunConfig | None) -> RunConfig:
    """All settings, stages included; ConfigError or DataError where the log can not serve them."""
    config = default_config(dataset, config)
    check_fits(config, dataset)
    check_tasks(config, dataset)
    if config.surface.repeats != "auto" and (config.surface.repeats == "yes") != dataset.repeats:
        raise ConfigError(
            f"surface.repeats is {config.surface.repeats!r}, but the dataset was built the other way; "
            "build it with the run's data_settings"
        )
    if config.learning.candidates == "logged":
        dataset.impressions("fit")  # a log without them is refused before anything is trained
    return config


def _trained(
    dataset: Dataset,
    config: RunConfig,
    state: Path,
    progress: bool,
    shared: Shared | None,
    first: FirstWeights | None = None,
) -> Run:
    with torch.random.fork_rng(devices=[]):
        builder = _Builder(dataset, config, state, progress, shared, first)
        builder.train()
        at_validation = builder.cascade(dataset.view("valid"))
        cascade = builder.cascade(dataset.view("test"))
        indexes = builder.index(cascade)
        at_validation.indexes = still_valid(cascade, at_validation.systems)
        metrics = builder.validate(at_validation)
    metrics |= {
        "systems": [asdict(report) for report in builder.reports],
        "curves": builder.curves,
        "indexes": {name: asdict(report) for name, report in indexes.items()},
    }
    return Run(
        folder=state, dataset=dataset, config=config, cascade=cascade, metrics=metrics, at_validation=at_validation
    )


class _Builder:
    """One call of `train_cascade`: what is trained so far."""

    def __init__(
        self,
        dataset: Dataset,
        config: RunConfig,
        state: Path,
        progress: bool,
        shared: Shared | None,
        first: FirstWeights | None = None,
    ) -> None:
        self.dataset, self.config, self.state, self.progress, self.first = dataset, config, state, progress, first
        self.shared = shared or Shared()
        self.shares_lessons = shared is not None
        """One training alone lets go of a stage's lessons when the stage is done."""
        self.device = chosen_device(config.trainer.device)
        self.systems: dict[str, System] = {}
        self.reports: list[SystemReport] = []
        self.curves: dict[str, list[dict[str, Any]]] = {}
        """Loss and validation score of every epoch, by system that was trained."""
        self.prints: dict[str, str] = {}
        """Fingerprint of what went into each system."""

    @cached_property
    def view(self) -> View:
        """What is trained on."""
        return self.dataset.view("fit")

    @cached_property
    def past(self) -> Requests:
        """Every group of the training events as a request."""
        return self.dataset.past_requests("fit")

    @cached_property
    def valid(self) -> Requests:
        """Requests on which training is stopped and systems are judged."""
        learning = self.config.learning
        return sample(self.dataset.split.valid, learning.valid_requests, self.config.trainer.seed)

    @cached_property
    def data_print(self) -> str:
        """Fingerprint of the dataset."""
        return fingerprint(
            self.dataset.schema.to_toml(),
            [self.dataset.plan.now, self.dataset.repeats, asdict(self.dataset.config)],
            *(getattr(self.dataset.histories, f.name) for f in fields(Histories)),
            self.dataset.plan.window_of_event,
            *(() if self.dataset.logged is None else (self.dataset.logged.rows.values.numpy(),)),
            *(column.numpy() for column in self.dataset.space.items.columns.values() if isinstance(column, Tensor)),
        )

    # -- training ------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """All stages in order."""
        for stage in self.config.stages:
            lessons = _StageLessons(self, stage)
            for name in stage.systems:
                if name not in self.systems:
                    self._train_system(name, stage, lessons)

    def _train_system(self, name: str, stage: Stage, lessons: _StageLessons) -> None:
        trainer = self.config.trainer_of(name)
        system = make_system(self.config, name, self.view.space)
        feeds = {phase.feed for phase in system.phases()}
        upstream = [self.prints[other] for other in lessons.upstream] if "candidates" in feeds else []
        upstream += [f.name for f in system.space.pair_fields]
        choice = self.config.systems[name]
        settings = {key: value for key, value in trainer.deciding().items() if key not in FREE_SETTINGS}
        learned: list[Any] = (
            [settings, asdict(self.config.learning), self.config.surface.k] if feeds else [trainer.seed]
        )
        if feeds and self.first is not None:
            learned.append(self.first.give(name, system))
        self.prints[name] = fingerprint(self.data_print, [choice.system, asdict(choice.settings)], learned, upstream)
        validate = self._validation(system, stage, lessons)
        if not feeds:
            self._count(name, stage, validate)
            return
        stops_by = self._stopping(system, lessons, validate)
        report = fit(
            system,
            self.view,
            lambda phase: self._source(phase, system, name, lessons),
            config=trainer,
            validate=stops_by,
            folder=self._folder(name),
            progress=self.progress,
        )
        self.systems[name] = system.to(self.device).eval()
        self.curves[name] = [
            {"phase": p.phase, "epoch": p.epoch, "loss": p.loss, "score": p.score} for p in report.curve
        ]
        ndcg = report.best_score if stops_by is validate else None
        if ndcg is None:  # its epochs ended between two validations, or something else decided
            with torch.no_grad():
                ndcg = validate(system)
        tasks = self._task_quality(system, lessons)
        self._report(name, stage, report.epochs, report.best_epoch, ndcg, report.seconds, tasks)

    @torch.no_grad()
    def _task_quality(self, system: System, lessons: _StageLessons) -> dict[str, dict[str, float]]:
        if not self.config.learning.tasks or not isinstance(system, Ranker) or lessons.judged is None:
            return {}
        return task_score(system, self.dataset, lessons.judged)

    def _count(self, name: str, stage: Stage, validate: Callable[[System], float]) -> None:
        """A system without phases: it only counts. It is judged with counts as fresh as the validation requests will find them."""
        began = time.perf_counter()
        self.systems[name] = self.counted(name, self.view)
        learning, seed, k = self.config.learning, self.config.trainer.seed, self.config.surface.k
        known, key = self.shared.scores, (self.prints[name], learning.valid_requests, learning.refresh, seed, k)
        if stage is not self.config.stages[0] or key not in known:  # later ones are judged on what reaches them
            fresh = self.dataset.view("valid") if learning.refresh else self.view
            with torch.no_grad():
                known[key] = validate(self.counted(name, fresh))
        self._report(name, stage, 0, None, known[key], time.perf_counter() - began)

    def counted(self, name: str, view: View) -> System:
        """A system that learns no weights, made on a view; kept while there is room, since every later stage asks again."""

        def make() -> System:
            system = make_system(self.config, name, view.space)
            with deterministic(self.config.trainer.deterministic):
                system.prepare(view)
            return system.to(self.device).eval()

        return self.shared.counted.get((self.prints[name], view.now, view.histories.num_events, str(self.device)), make)

    def fresh(self, view: View) -> dict[str, System]:
        """All systems so far: those that only count made on `view`, the others as they were trained."""
        if not self.config.learning.refresh:
            return dict(self.systems)
        return {name: system if system.phases() else self.counted(name, view) for name, system in self.systems.items()}

    def _source(self, phase: Phase, system: System, name: str, lessons: _StageLessons) -> BatchSource:
        trainer, learning = self.config.trainer_of(name), self.config.learning
        if phase.feed == "next_event":
            return NextEventSource(
                self.view, batch_size=trainer.batch_size, max_history=system.max_history, seed=trainer.seed
            )
        if phase.feed == "sessions":
            return SessionParallelSource(self.view, batch_size=trainer.batch_size, gap_hours=phase.gap_hours)
        if phase.feed == "targets":
            return TargetSource(
                self.view,
                self.past,
                batch_size=trainer.batch_size,
                max_history=system.max_history,
                max_targets=learning.max_targets,
                seed=trainer.seed,
            )
        if learning.late_task and isinstance(system, Ranker):
            return delayed_source(
                lessons.fit,
                self.dataset,
                system,
                self.view,
                learning,
                trainer,
                folder=self._folder(name) / "auxiliary",
                progress=self.progress,
                since=None if self.first is None else self.first.since(name),
            )
        return candidate_source(
            lessons.fit,
            self.dataset,
            task=system.space.tasks[0],
            by_value=self.config.surface.objective == "value",
            batch_size=trainer.batch_size,
            max_history=system.max_history,
            num_negatives=learning.num_negatives,
            only_chosen=learning.candidates == "cascade",
            seed=trainer.seed,
        )

    def _validation(self, system: System, stage: Stage, lessons: _StageLessons) -> Callable[[System], float]:
        k = self.config.surface.k
        if system.kind == "retriever" and stage is self.config.stages[0]:
            return lambda trained: full_ranking_score(trained, self.dataset, self.valid, k)
        return lambda trained: candidate_score(trained, self.dataset, lessons.valid, k, self.config.surface)

    def _stopping(
        self, system: System, lessons: _StageLessons, ndcg: Callable[[System], float]
    ) -> Callable[[System], float]:
        """What decides a training's best epoch: of a ranker of several tasks their mean AUC on the validation window, else NDCG."""
        if len(self.config.learning.tasks) < 2 or not isinstance(system, Ranker) or lessons.judged is None:
            return ndcg
        judged = lessons.judged

        def score(trained: System) -> float:
            assert isinstance(trained, Ranker)
            found = mean_auc(task_score(trained, self.dataset, judged))
            return ndcg(trained) if found is None else found

        return score

    def _report(
        self,
        name: str,
        stage: Stage,
        epochs: int,
        best_epoch: int | None,
        ndcg: float,
        seconds: float,
        tasks: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        made = SystemReport(
            name=name,
            stage=stage.name,
            epochs=epochs,
            best_epoch=best_epoch,
            ndcg=ndcg,
            seconds=round(seconds, 3),
            tasks=tasks or {},
            tables={size.place: size.bytes for size in table_sizes(self.systems[name])},
        )
        self.reports.append(made)
        total = len(self.config.systems)
        how = f"best of {made.epochs} epochs: {made.best_epoch}" if made.epochs else "counted"
        self.say(
            f"[{len(self.reports)}/{total}] {stage.name}: {name}, {how}, "
            f"validation ndcg@{self.config.surface.k} {ndcg:.4f}, {made.seconds:.1f} s"
        )
        if tasks:
            self.say(f"  by task: {in_words(tasks)}")

    def _folder(self, name: str) -> Path:
        return self.state / f"{name}-{self.prints[name]}"

    def say(self, line: str) -> None:
        """One line of progress."""
        if self.progress:
            print(line, file=sys.stderr, flush=True)

    # -- the whole -----------------------------------------------------------------------------------------------

    def cascade(self, view: View, *, partial: bool = False) -> Cascade:
        """The stages so far, with everything that only counts made on `view`."""
        popular = most_chosen(view if self.config.learning.refresh else self.view)
        return Cascade(
            self.config, self.dataset.space, self.fresh(view), popular=popular, device=self.device, partial=partial
        )

    def index(self, cascade: Cascade) -> dict[str, IndexReport]:
        """Give the cascade's vector retrievers their indexes; what each is, by name."""

        def queries(system: VectorRetriever, most: int) -> Iterator[Batch]:
            asked = sample(self.valid, most, self.config.trainer.seed)
            for index in chunks(len(asked), self.dataset.num_items):
                yield make_batch(self.dataset, asked.select(index), system.max_history).to(self.device)

        cascade.indexes, reports = build_indexes(cascade, queries, deterministic=self.config.trainer.deterministic)
        for name, report in reports.items():
            self.say(f"index of {name}: {report.summary()}")
        return reports

    def validate(self, cascade: Cascade) -> dict[str, Any]:
        """The whole cascade on validation requests: quality at the page, what each stage lost, what each stage cost."""
        k = self.config.surface.k
        began = time.perf_counter()
        found = validated(cascade, self.dataset, self.valid)
        ndcg = found[f"ndcg@{k}"]
        self.say(
            f"cascade: validation ndcg@{k} {ndcg:.4f}, {time.perf_counter() - began:.1f} s for {len(self.valid):,} requests"
        )
        first = [report for report in self.reports if report.stage == self.config.stages[0].name]
        alone = max(first, key=lambda report: report.ndcg)
        if alone.ndcg > ndcg:
            self.say(
                f"note: {alone.name} alone makes better pages here ({alone.ndcg:.4f}) than the whole cascade; give the later stages more "
                "to learn from (data.fit_share, learning.fit_requests, trainer.epochs), or leave them out"
            )
        return {
            "validation": {**found, "best_alone": {"name": alone.name, f"ndcg@{k}": alone.ndcg}},
            "split": {"protocol": self.dataset.split.protocol, "note": self.dataset.split.note},
            "repeats": self.dataset.repeats,
        }


class _StageLessons:
    """What a stage's systems learn from, made when first asked for and then kept for all of them."""

    def __init__(self, builder: _Builder, stage: Stage) -> None:
        self.builder, self.stage = builder, stage
        names = [s.name for s in builder.config.stages]
        self.before = builder.config.default_chain.actions[: names.index(stage.name)]
        self.upstream = list(dict.fromkeys(name for action in self.before for name in action.systems))

    @cached_property
    def fit(self) -> Lessons:
        """Fit requests, thinned out."""
        return self._told("fit", self._made("fit", self._of_fit))

    @cached_property
    def valid(self) -> Lessons:
        """Validation requests with all their candidates."""
        return self._told(
            "validation",
            self._made("valid", self._of_valid),
        )

    @cached_property
    def judged(self) -> Lessons | None:
        """Validation candidates whose outcome is known by task: those that the stages let through, or what the log's pages showed."""
        builder = self.builder
        if builder.config.learning.candidates == "cascade":
            return self.valid
        learning, seed = builder.config.learning, builder.config.trainer.seed
        try:
            requests, shown, columns = sample_shown(builder.dataset, learning.valid_requests, seed, "valid")
        except DataError:  # the window shows nothing
            return None
        labels = ShownLabels(learning, shown, columns)
        return self._collect(requests, builder.dataset.view("valid"), None, shown, labels)

    def _of_valid(self) -> Lessons:
        builder = self.builder
        labels = self._by_action(builder.valid, "valid")
        return self._collect(builder.valid, builder.dataset.view("valid"), None, labels=labels)

    def _by_action(self, requests: Requests, window: Window) -> Labels | None:
        """What tells the tasks' labels of candidates that stages let through; None where the choice is the only task."""
        learning = self.builder.config.learning
        if not learning.tasks or learning.candidates == "logged":
            return None
        labels = ActionLabels(self.builder.dataset, learning, window, learning.late_task if window == "fit" else "")
        return lambda index, rows: labels(requests.select(index), rows)

    def _made(self, window: str, make: Callable[[], Lessons]) -> Lessons:
        """The window's lessons, those of another training where everything before the stage is the same."""
        builder = self.builder
        if not builder.shares_lessons:
            return make()
        config = builder.config
        learning = {name: value for name, value in asdict(config.learning).items() if name not in AT_THE_SOURCE}
        key = fingerprint(
            [window, [asdict(action) for action in self.before], [builder.prints[name] for name in self.upstream]],
            [learning, asdict(config.surface), config.trainer.seed, builder.data_print],
        )
        return builder.shared.lessons.get(key, make)

    def _of_fit(self) -> Lessons:
        builder, learning = self.builder, self.builder.config.learning
        seed = builder.config.trainer.seed
        requests, shown = sample(builder.dataset.split.fit, learning.fit_requests, seed), None
        labels: Labels | None = None
        if learning.candidates == "logged":
            requests, shown, columns = sample_shown(builder.dataset, learning.fit_requests, seed)
            labels = ShownLabels(learning, shown, columns, learning.late_task) if learning.tasks else None
        else:
            labels = self._by_action(requests, "fit")
        parts = []
        for part, view in self._slices(requests, learning.slices if learning.refresh else 1):
            given = None if shown is None else shown.select(torch.from_numpy(part))
            mine = None if labels is None else partial(_of_part, labels, part)
            parts.append(self._collect(requests.select(part), view, learning.max_candidates, given, mine))
        return joined(parts)

    def _slices(self, requests: Requests, count: int) -> Iterator[tuple[Int, View]]:
        """The requests (indices) cut by time, each part with what was known when it began. One part where nothing is cut by time."""
        dataset = self.builder.dataset
        if dataset.split.protocol != "time" or not dataset.space.has_clock:
            yield np.arange(len(requests)), self.builder.view
            return
        for part in np.array_split(np.argsort(requests.time, kind="stable"), count):
            if len(part):
                yield part, dataset.view_before(int(requests.time[part].min()))

    def _collect(
        self,
        requests: Requests,
        view: View,
        most: int | None,
        shown: Jagged | None = None,
        labels: Labels | None = None,
    ) -> Lessons:
        builder = self.builder
        cascade = builder.cascade(view, partial=True)
        seed = builder.config.trainer.seed
        return collect(
            cascade, builder.dataset, requests, self.stage.name, shown=shown, labels=labels, most=most, seed=seed
        )

    def _told(self, window: str, lessons: Lessons) -> Lessons:
        found = float(lessons.label.sum()) / max(len(lessons.requests.target), 1)
        self.builder.say(
            f"{self.stage.name}: {len(lessons.requests):,} {window} requests with {len(lessons.rows.values):,} candidates, "
            f"{found:.1%} of what was chosen is among them"
        )
        return lessons


def _of_part(labels: Labels, part: Int, index: Int, rows: Jagged) -> dict[str, Tensor]:
    """Labels of the requests `index` of a part of all requests."""
    return labels(part[index], rows)
