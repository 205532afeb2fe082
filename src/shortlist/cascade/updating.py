"""Near-line: a run learns from what came in since, is judged against itself as it was, and is published where it is no worse.

    events since ──> dataset extended ──> systems, most from the weights they have ──> newest events: old against new ──> publish

Counts are made again on everything before the newest events; what can not go on from its weights is trained anew, and that is said.
A task whose outcomes come late goes on as a stream: of it only what was emitted since is learned (cascade/delayed.py).
The old snapshot stays where it is until the new one is complete: a stop at any moment leaves it, and the next update goes on.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from shortlist.cascade.attributes import encoded, replaced
from shortlist.cascade.build import train_unsaved
from shortlist.cascade.cascade import Cascade
from shortlist.cascade.config import RunConfig
from shortlist.cascade.lessons import chunks, make_batch, sample
from shortlist.cascade.run import Run, load_run, make_system, save_run
from shortlist.cascade.schedule import UpdateConfig
from shortlist.cascade.tasks import HOUR_S
from shortlist.cascade.warm import FirstWeights
from shortlist.data.dataset import Dataset
from shortlist.data.extending import Extended, NewEvents, extended, unseen
from shortlist.data.histories import Int, Requests
from shortlist.errors import ConfigError, SnapshotError
from shortlist.metrics import ranking
from shortlist.store.catalogue import CatalogueStore, ItemNow, digest
from shortlist.store.events import EventStore
from shortlist.store.published import KEEP, Place, is_place, served_run
from shortlist.store.snapshot import restore_interrupted

TAKEN = "taken.json"
"""In the training state: which events an update takes, so that one that was stopped goes on with the same."""
Outcome = Literal["updated", "worse", "too few"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """Old and new snapshot on the same newest requests."""

    requests: int
    k: int
    old_ndcg: float
    new_ndcg: float
    difference: tuple[float, float]
    """95 % interval of the mean paired difference, new less old (normal approximation)."""

    def is_worse(self, margin: float) -> bool:
        """Whether the new one falls short of the old one by more than a share of it."""
        return self.new_ndcg < self.old_ndcg * (1 - margin)


@dataclass(frozen=True, kw_only=True, slots=True)
class Updated:
    """What came of an update."""

    outcome: Outcome
    version: str
    """That is in place afterwards."""
    num_new: int
    """Events that were learned from."""
    num_new_users: int = 0
    num_new_items: int = 0
    judged: Judged | None = None
    retrained: dict[str, str] | None = None
    """Systems that could not go on from their weights, and why."""
    lost: tuple[str, ...] = ()
    """What stood beside the old run and has to be made again for the new one."""

    def told(self) -> list[str]:
        """In sentences."""
        if self.outcome == "too few":
            return [f"{self.num_new:,} new events: too few to learn from (update.min_events); {self.version} stays"]
        assert self.judged is not None
        judged, retrained = self.judged, self.retrained or {}
        low, high = judged.difference
        lines = [
            f"{self.num_new:,} new events, {self.num_new_users:,} new users, {self.num_new_items:,} new items",
            *(f"{name} was trained anew: {reason}" for name, reason in retrained.items()),
            f"on the newest {judged.requests:,} requests: ndcg@{judged.k} {judged.old_ndcg:.4f} before, {judged.new_ndcg:.4f} now "
            f"(difference {low:+.4f} to {high:+.4f})",
        ]
        if self.outcome == "worse":
            return [*lines, f"not published, since it is worse by more than update.margin; {self.version} stays"]
        lines.append(f"{self.version} is in place")
        return [*lines, *(f"make again what stood beside the run: shortlist {command}" for command in self.lost)]


def update(
    source: Path,
    events: EventStore,
    *,
    publish: Path | None = None,
    config: UpdateConfig | None = None,
    catalogue: CatalogueStore | None = None,
    keep: int = KEEP,
    progress: bool = True,
    tell: Callable[[str], None] = lambda line: None,
) -> Updated:
    """Learn from the events that a run has not seen, and put the new run in place where it is no worse.

    Args:
        source: a run, or a place of published runs, whose current one is updated.
        events: where events come in.
        publish: place to publish to; None = `source` where it is a place, else the run is replaced.
        config: None = the run's own [update].
        catalogue: what was told of items and users since: fields of new items, and users who asked to be forgotten.
        keep: versions that stay in the place.
        progress: lines and bars of training.
        tell: gets lines of progress of the update itself.

    Raises:
        SnapshotError: `source` is damaged, or another update of it is at work. ConfigError: a run that can not be updated.
        DataError: nothing to judge by.
        StoreUnavailable: events can not be read. TrainingInterrupted: Ctrl-C; the next update goes on.
    """
    source = Path(source).absolute()
    place = publish or (source if is_place(source) else None)
    state = source.with_name(f"{source.name}.updating")
    with _alone(state):
        if place is None:
            restore_interrupted(source)
        return _updated(source, state, events, place, config, catalogue, keep, progress, tell)


def _updated(
    source: Path,
    state: Path,
    events: EventStore,
    place: Path | None,
    config: UpdateConfig | None,
    catalogue: CatalogueStore | None,
    keep: int,
    progress: bool,
    tell: Callable[[str], None],
) -> Updated:
    """`update`, while no other one is at work."""
    run = load_run(served_run(source))
    config = config or run.config.update
    if run.config.learning.candidates == "logged":
        raise ConfigError(
            "this run learns from what the log's own pages showed, and events that come in do not say that: train it again from its log"
        )
    taken = _taken(state, run, events)
    new = _read(events, taken["after"], taken["upto"])
    num_new = int(unseen(run.dataset, new).sum())
    if num_new < config.min_events:
        shutil.rmtree(state, ignore_errors=True)
        return Updated(outcome="too few", version=run.version, num_new=num_new)
    grown = _extended(run, new, config, catalogue)
    tell(f"{grown.num_new:,} new events since {run.version}; {grown.num_repeated:,} were known already")
    made, cold = _trained(run, grown, config, state, progress)
    judged = _judged(run, made, grown, config)
    told = {
        "from": run.version, "events_after": taken["after"], "events_upto": taken["upto"], "store": taken["store"],
        "num_new": grown.num_new, "judged": asdict(judged), "retrained": cold,
    }  # fmt: skip
    outcome = Updated(
        outcome="worse",
        version=run.version,
        num_new=grown.num_new,
        num_new_users=grown.num_new_users,
        num_new_items=grown.num_new_items,
        judged=judged,
        retrained=cold,
    )
    if judged.is_worse(config.margin):
        shutil.rmtree(state, ignore_errors=True)
        return outcome
    made = replace(made, metrics={**made.metrics, "update": told}, config=run.config)
    version = _put(made, source if place is None else state / "run", place, keep)
    lost = _beside(run.folder)
    shutil.rmtree(state, ignore_errors=True)
    return replace(outcome, outcome="updated", version=version, lost=lost)


@contextmanager
def _alone(state: Path) -> Iterator[None]:
    """Inside the block no other process updates the same run; the lock of one that was killed is free at once."""
    with state.with_name(f"{state.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SnapshotError(
                f"{state} is in use: another update of this run is at work; wait for its end"
            ) from error
        yield


# -- events -----------------------------------------------------------------------------------------------------------


def _taken(state: Path, run: Run, events: EventStore) -> dict[str, Any]:
    """Which events this update takes: those of an update of the same run that was stopped, else all that are newer than the run's."""
    path = state / TAKEN
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        if found["version"] == run.version and found["store"] == events.name:
            return found
    except (OSError, ValueError, KeyError):
        pass
    shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True)
    last = run.metrics.get("update", {})
    after = int(last["events_upto"]) if last.get("store") == events.name else 0
    fresh = {"version": run.version, "store": events.name, "after": after, "upto": events.last_number()}
    path.write_text(json.dumps(fresh))
    return fresh


def _read(events: EventStore, after: int, upto: int) -> NewEvents:
    rows = [row for part in events.numbered(after, upto) for row in part]
    user, item, time_ms, action, value = zip(*rows) if rows else ((),) * 5
    return NewEvents(
        user=pl.Series(user, dtype=pl.String),
        item=pl.Series(item, dtype=pl.String),
        time_ms=np.array(time_ms, dtype=np.int64),
        action=action,
        value=np.array([1.0 if one is None else one for one in value], dtype=np.float32),
    )


def _extended(run: Run, new: NewEvents, config: UpdateConfig, catalogue: CatalogueStore | None) -> Extended:
    """The dataset with new events, without those of users who asked to be forgotten, and with what is known of new items."""
    dataset, changes = run.dataset, None if catalogue is None else catalogue.changes()
    grown = extended(
        dataset,
        new,
        valid_share=config.valid_share,
        test_share=config.test_share,
        without=None if changes is None else _forgotten(dataset, set(changes.gone)),
        fit_from=_stream_begins(run),
    )
    if changes is None or not grown.num_new_items:
        return grown
    return replace(grown, dataset=_with_fields(grown.dataset, dataset.num_items, changes.items))


def _stream_begins(run: Run) -> int | None:
    """Seconds: the oldest click that may still send something after the run was trained; None where no outcome comes late.

    Not before the run's own fit window: what lies there its retrievers have learned.
    """
    learning, now = run.config.learning, run.dataset.plan.now
    return max(now["fit"], now["valid"] - 1 - round(learning.task_hours * HOUR_S)) if learning.late_task else None


def _forgotten(dataset: Dataset, gone: set[bytes]) -> Int | None:
    """Rows of users whose digest is among these."""
    if not gone:
        return None
    ids = dataset.user_ids.ids.to_list()
    return np.array([row for row, user in enumerate(ids, start=1) if digest(str(user)) in gone], dtype=np.int64)


def _with_fields(dataset: Dataset, num_old: int, told: Sequence[ItemNow]) -> Dataset:
    """Fields and titles of items that the old catalogue lacked."""
    rows = dataset.item_ids.encode([item.item for item in told])
    fresh: list[tuple[int, ItemNow]] = [(int(row), item) for row, item in zip(rows, told) if row > num_old]
    if not fresh:
        return dataset
    at = np.array([row for row, _ in fresh], dtype=np.int64)
    columns = dict(dataset.space.items.columns)
    for f in dataset.schema.of("item"):
        columns[f.name] = replaced(
            columns[f.name], at, encoded(f, [item.attributes.get(f.column) for _, item in fresh])
        )
    titles = dataset.titles
    if titles is not None:
        titles = list(titles)
        for row, item in fresh:
            titles[row] = item.title or titles[row]
    items = replace(dataset.space.items, columns=columns)
    return replace(dataset, titles=titles, space=replace(dataset.space, items=items))


# -- training and judging ---------------------------------------------------------------------------------------------


def _trained(
    run: Run, grown: Extended, config: UpdateConfig, state: Path, progress: bool
) -> tuple[Run, dict[str, str]]:
    """The new run, and which of its systems began anew and why."""
    first = FirstWeights(
        version=run.version,
        systems=run.cascade.systems,
        user_before=grown.user_before,
        learned_until=run.dataset.plan.now["valid"] - 1,
    )
    space = grown.dataset.view("fit").space
    shorter, cold = [], {}
    for name in run.config.systems:
        system = make_system(run.config, name, space)
        if not system.phases():
            continue
        reason = first.obstacle(name, system)
        if reason is not None:
            cold[name] = reason
        elif run.config.trainer_of(name).epochs > config.epochs:
            shorter.append(f"trainer.{name}.epochs={config.epochs}")
    settings: RunConfig = run.config.override(*shorter)
    return train_unsaved(grown.dataset, settings, state / "training", progress=progress, first=first), cold


def _judged(old: Run, new: Run, grown: Extended, config: UpdateConfig) -> Judged:
    """Both on the newest requests; what an item or user is to the old run is its own business."""
    k = new.config.surface.k
    asked = sample(grown.dataset.split.test, config.max_judged, new.config.trainer.seed)
    now = _ndcg(new.cascade, grown.dataset, asked, asked, k)
    before = _ndcg(old.cascade, *_as_before(old.dataset, grown, asked), asked, k)
    mean, half = float(np.mean(now - before)), 1.96 * float(np.std(now - before) / np.sqrt(len(now)))
    return Judged(
        requests=len(asked),
        k=k,
        old_ndcg=float(before.mean()),
        new_ndcg=float(now.mean()),
        difference=(mean - half, mean + half),
    )


def _as_before(old: Dataset, grown: Extended, requests: Requests) -> tuple[Dataset, Requests]:
    """The same requests in the numbers of the old dataset: events with items that it lacks are left out, as they are when it serves."""
    histories = grown.dataset.histories
    kept = np.asarray(histories.item) <= old.num_items
    places = np.concatenate([[0], np.cumsum(kept)])
    moved = replace(
        requests, user=grown.user_before[requests.user], start=places[requests.start], end=places[requests.end]
    )
    return replace(old, histories=histories.keep(kept)), moved


def _ndcg(cascade: Cascade, dataset: Dataset, asked: Requests, truth: Requests, k: int) -> NDArray[np.floating[Any]]:
    """[R] NDCG@k of the pages for `asked`, by the targets of `truth`."""
    pages = []
    with torch.no_grad():
        for index in chunks(len(asked), dataset.num_items):
            pages.append(cascade.run(make_batch(dataset, asked.select(index), cascade.max_history)).rows.cpu())
    judged = ranking.judge(torch.cat(pages).numpy(), truth.target, truth.target_offsets)
    found: NDArray[np.floating[Any]] = ranking.ndcg(judged, k)
    return found


# -- putting it in place ----------------------------------------------------------------------------------------------


def _put(run: Run, folder: Path, place: Path | None, keep: int) -> str:
    """Write the run, and publish it where there is a place to; its version."""
    version = save_run(folder, run.dataset, run.config, run.cascade, run.metrics).version
    if place is not None:
        Place(place).publish(folder, keep=keep, note=f"updated from {run.metrics['update']['from']}")
    return version


def _beside(folder: Path) -> tuple[str, ...]:
    """Commands that make again what stood beside the old run and was made for its weights."""
    found = []
    if folder.with_name(f"{folder.name}.allocation").exists():
        found.append("calibrate")
    if any(folder.parent.glob(f"{folder.name}.summaries.*")):
        found.append("refresh")
    return tuple(found)
