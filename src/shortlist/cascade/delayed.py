"""What a ranker learns of a task whose outcome comes late: the lessons of the fit window as the feedback rule's samples at its end.

Each candidate of a request is a click at the request's time (with `learning.chained` only where the tasks before came true). All samples
that the rule's stream has emitted of it by the end of the window are candidates of the request: the first in its place, further ones (a
conversion that came late) as copies behind the others, which teach the other tasks nothing. Outcomes after the window are not read.

This is a training at one moment, not a stream: clicks near the window's end have not sent all that they will. For rules with ES-DFM's
auxiliary network copies stand in for what may still come, weighed by its chance for a click of that age; the network learns from clicks
whose attribution window has closed. fsiw knows the age of a click by itself. vanilla and fnw (and defuse on fnw's samples) have no such
network: what has not come by the end of the window is lost to them.

A ranker that goes on from the weights it has, in an update, follows the stream from where it stopped: it learns the samples emitted
*since*, late positives of earlier clicks among them, each once. What was sent before is not sent again, and nothing stands in: what comes
later is the next update's. Labels of the other tasks are final and learned as ever.

R requests, total = all candidates end to end, S samples, t candidates of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shortlist.cascade.config import Learning
from shortlist.cascade.lessons import Lessons
from shortlist.cascade.tasks import DELAY, HOUR_S
from shortlist.data.batches import Batch, Candidates
from shortlist.data.dataset import Dataset
from shortlist.data.histories import Int, View
from shortlist.data.jagged import Jagged
from shortlist.errors import ConfigError, DataError
from shortlist.models.base import Ranker
from shortlist.training.config import TrainerConfig
from shortlist.training.feedback.base import LATE, SETTLED_NEGATIVE, Delayed, FeedbackRule, make_feedback
from shortlist.training.feedback.clicks import ClickLog, auxiliary_chances
from shortlist.training.feedback.streams import Emitted, as_known, emit, stand_ins
from shortlist.training.feedback.targets import LateConversions, SettledConversions
from shortlist.training.feedback.windows import NEVER, Windows
from shortlist.training.sources import CandidateSource

SAMPLE = "sample"
EVER = int(np.iinfo(np.int64).min)


@dataclass(frozen=True, kw_only=True, slots=True)
class DelayedLessons:
    """The rule's samples as candidates."""

    lessons: Lessons
    """With the copies; labels of the late task are the samples', NaN where a candidate is none, and those of the others NaN at copies."""
    sample: Tensor
    """int64 [total]: number of the sample that a candidate stands for, -1 where it is none."""
    emitted: Emitted
    """S samples, those that stand in for others last; their clicks are candidates of `clicks`."""
    num_known: int
    """Of the samples, those that were emitted."""
    clicks: ClickLog
    """The candidates in question, one request each."""
    windows: Windows
    now: int
    """Seconds: the last moment of the fit window."""


def delayed_lessons(
    lessons: Lessons, dataset: Dataset, learning: Learning, rule: FeedbackRule, since: int | None = None
) -> DelayedLessons:
    """Lessons that hold `DELAY`, as the rule learns them.

    Args:
        since: seconds: what was emitted up to then was learned before; None = nothing was.
    """
    windows = Windows(
        observation_s=round(learning.feedback.observation_hours * HOUR_S),
        attribution_s=round(learning.task_hours * HOUR_S) + 1,  # an action exactly so late counts, as without a rule
    )
    now = dataset.plan.now["valid"] - 1
    owner = lessons.rows.row_of_value.numpy()
    asked: Int = np.flatnonzero(~lessons.labels[learning.late_task].isnan().numpy())
    clicks = _clicks(lessons, dataset, owner, asked)
    if rule.as_known and since is None:
        known = as_known(clicks.clicked_at, clicks.converted_at, windows, now)
    else:
        whole = emit(clicks.clicked_at, clicks.converted_at, windows, rule.stream)
        known = whole.between(EVER if since is None else since + 1, now + 1)
    emitted = known
    if isinstance(rule.auxiliary, LateConversions) and since is None:
        emitted = known + stand_ins(known, clicks.clicked_at, windows, rule.stream, now)
    expanded, sample = _expanded(lessons, learning.late_task, owner, asked[emitted.click], emitted.label)
    return DelayedLessons(
        lessons=expanded, sample=sample, emitted=emitted, num_known=len(known), clicks=clicks, windows=windows, now=now
    )


def _clicks(lessons: Lessons, dataset: Dataset, owner: Int, asked: Int) -> ClickLog:
    """The candidates `asked` as clicks at the time of their requests."""
    where = torch.from_numpy(asked)
    requests = lessons.requests.without_targets().select(owner[asked])
    waited = lessons.labels[DELAY][where].double().numpy()
    came = requests.time + np.nan_to_num(waited).round().astype(np.int64)
    return ClickLog(
        histories=dataset.histories,
        users=dataset.users,
        requests=requests,
        candidates=Candidates(
            rows=Jagged(lessons.rows.values[where], torch.arange(len(asked) + 1)),
            pair={name: column[where] for name, column in lessons.pair.items()},
        ),
        converted_at=np.where(np.isnan(waited), NEVER, came),
    )


def _expanded(lessons: Lessons, task: str, owner: Int, candidate: Int, label: np.ndarray) -> tuple[Lessons, Tensor]:
    """The lessons with a copy for every sample of a candidate but its first, and each candidate's sample.

    Args:
        candidate, label: [S] of the samples, in the order of their emission.
    """
    total = len(owner)
    _, first = np.unique(candidate, return_index=True)
    further = np.setdiff1d(np.arange(len(candidate)), first)
    own = np.full(total, -1)
    own[candidate[first]] = first
    place, sample = np.append(np.arange(total), candidate[further]), np.append(own, further)
    order = np.argsort(owner[place], kind="stable")
    is_copy = torch.from_numpy(order >= total)
    place_t, sample_t = torch.from_numpy(place[order]), torch.from_numpy(sample[order])
    told = {name: c[place_t].masked_fill(is_copy, torch.nan) for name, c in lessons.labels.items() if name != DELAY}
    seen = torch.from_numpy(np.append(label, np.nan).astype(np.float32))
    return (
        Lessons(
            requests=lessons.requests,
            rows=Jagged.from_lengths(
                lessons.rows.values[place_t],
                torch.from_numpy(np.bincount(owner[place], minlength=len(lessons.requests))),
            ),
            pair={name: column[place_t] for name, column in lessons.pair.items()},
            label=lessons.label[place_t],
            worth=lessons.worth[place_t],
            labels={**told, task: seen[sample_t]},
        ),
        sample_t,
    )


def _aged(samples: Emitted, age: Int) -> Emitted:
    """Samples whose first ones are taken to be so old."""
    return replace(samples, elapsed=np.append(age, samples.elapsed[len(age) :]))


class DelayedSource:
    """A candidate source whose late task is learned by a feedback rule."""

    def __init__(
        self, source: CandidateSource, rule: FeedbackRule, task: str, made: DelayedLessons, auxiliary: dict[str, Tensor]
    ) -> None:
        self.source, self.rule, self.task = source, rule, task
        self.seen, self.share = made.emitted.seen(auxiliary), shares(made, auxiliary)
        self.emitted_at = torch.from_numpy(made.emitted.emitted_at)

    def steps_per_epoch(self) -> int:
        """See BatchSource."""
        return self.source.steps_per_epoch()

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See BatchSource."""
        for batch in self.source.batches(epoch, start):
            labels = dict(batch.labels)
            sample, label = labels.pop(SAMPLE), labels.pop(self.task)
            is_one, where = sample >= 0, sample.clamp(min=0)
            criterion = Delayed(
                rule=self.rule,
                tasks=(self.task,),
                seen=replace(self.seen.select(where), label=label),
                share=self.share[where],
            )
            yield replace(
                batch,
                labels=labels,
                criteria=(criterion,),
                sample_kind=self.seen.kind[where].where(is_one, torch.tensor(-1)),
                emitted_at=self.emitted_at[where].where(is_one, torch.tensor(-1)),
            )


def shares(made: DelayedLessons, auxiliary: dict[str, Tensor]) -> Tensor:
    """float32 [S]: what each sample counts: 1, or its chance where it stands in for what may still come."""
    share = torch.ones(len(made.emitted))
    if made.num_known < len(share):
        kind, never = torch.from_numpy(made.emitted.kind), auxiliary["f_rn"]
        waits = torch.arange(len(share)) >= made.num_known
        share = torch.where(waits & (kind == LATE), 1 - never, share)
        share = torch.where(waits & (kind == SETTLED_NEGATIVE), never, share)
    return share


def delayed_source(
    lessons: Lessons,
    dataset: Dataset,
    system: Ranker,
    view: View,
    learning: Learning,
    trainer: TrainerConfig,
    *,
    folder: Path,
    progress: bool,
    since: int | None = None,
) -> DelayedSource:
    """What a ranker trains on; its auxiliary network, one of its own kind, is trained here where the rule has one.

    Args:
        lessons: of the fit window, with `DELAY`.
        system: the ranker; not changed.
        folder: of the auxiliary network's training state.
        since: seconds: what was emitted up to then the ranker has learned; None = it begins anew.

    Raises ConfigError where no candidate is old enough, or the ranker can not learn so; DataError where nothing was emitted since.
    """
    rule = make_feedback(learning.feedback)
    assert rule is not None
    made = delayed_lessons(lessons, dataset, learning, rule, since)
    if not len(made.emitted) and since is not None:
        raise DataError(
            f"too few new events for task {learning.late_task!r}: since the run was trained no click has come to the end of its "
            "observation window and no outcome has come; wait for more"
        )
    if not len(made.emitted):
        raise ConfigError(
            f"learning.feedback: no candidate of the fit window is older than observation_hours = "
            f"{learning.feedback.observation_hours:g} at its end; lower it"
        )
    if any(phase.learn is not None for phase in system.phases()):
        raise ConfigError(
            f"learning.feedback: {type(system).__name__} does not learn by gradient steps; choose another ranker, such as dnn"
        )
    # What is emitted at the end of the observation window is weighed by what was known then, the rest by the click's age now.
    first_age = np.full(made.num_known, made.windows.observation_s)
    asked = made.emitted if rule.as_known else _aged(made.emitted, first_age)
    auxiliary = auxiliary_chances(
        lambda space: type(system)(system.config, space),
        replace(view, space=system.space),
        made.clicks,
        SettledConversions() if isinstance(rule.auxiliary, LateConversions) else rule.auxiliary,
        made.windows,
        asked,
        now=made.now,
        trainer=replace(trainer, epochs=learning.feedback.auxiliary_epochs, patience=None, max_seconds=None),
        folder=folder,
        progress=progress,
    )
    source = CandidateSource(
        dataset.histories,
        dataset.users,
        made.lessons.requests,
        Candidates(rows=made.lessons.rows, pair=made.lessons.pair),
        made.lessons.labels,
        batch_size=trainer.batch_size,
        max_history=system.max_history,
        num_negatives=learning.num_negatives,
        only_chosen=learning.candidates == "cascade",
        seed=trainer.seed,
    ).with_columns({SAMPLE: made.sample})
    return DelayedSource(source, rule, learning.late_task, made, auxiliary)
