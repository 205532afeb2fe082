"""Clicks as training reads them: the log, batches of samples, and the frozen auxiliary network's word on each sample.

R clicks, S samples of them, n samples of a batch, B = n requests of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shortlist.data.batches import Batch, Candidates, request_batch
from shortlist.data.histories import Histories, Int, Requests, View
from shortlist.data.schema import FieldTable, Numeric, Space
from shortlist.errors import ConfigError, DataError
from shortlist.models.base import Phase, Ranker
from shortlist.training.config import TrainerConfig
from shortlist.training.feedback.base import Delayed, FeedbackRule
from shortlist.training.feedback.streams import Emitted
from shortlist.training.feedback.targets import Auxiliary
from shortlist.training.feedback.windows import HOUR_S, Windows
from shortlist.training.trainer import fit

Make = Callable[[Space], Ranker]
"""Builds a ranker, freshly drawn, for a space; its tasks are the rule's outputs."""
Finish = Callable[[Batch, Int], Batch]
"""Gives a batch of samples [n] of a source what it is trained on."""
ELAPSED = "elapsed"
"""Pair field of auxiliary networks that read how old a click is."""
SAMPLES_AT_ONCE = 4_096


@dataclass(frozen=True, kw_only=True, slots=True)
class ClickLog:
    """R clicks, each a request with one candidate, and when they convert."""

    histories: Histories
    """Events that the requests' `start` and `end` point into."""
    users: FieldTable
    requests: Requests
    """Their `time` is that of the click."""
    candidates: Candidates
    """One per request."""
    converted_at: Int
    """[R] seconds; NEVER where there is no conversion."""

    def __post_init__(self) -> None:
        num_clicks, rows = len(self.requests), self.candidates.rows
        if rows.num_rows != num_clicks or len(rows.values) != num_clicks or bool((rows.lengths != 1).any()):
            raise DataError(
                f"{num_clicks:,} clicks come with {rows.num_rows:,} rows of {len(rows.values):,} candidates; a click is one candidate"
            )
        if len(self.converted_at) != num_clicks:
            raise DataError(f"{len(self.converted_at):,} conversion times for {num_clicks:,} clicks; give one each")

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def clicked_at(self) -> Int:
        """[R] seconds."""
        return self.requests.time

    def outcome(self, windows: Windows) -> Int:
        """[R] 1 where the click converts within the attribution window: what is known at the very end."""
        quick, late = windows.split(self.clicked_at, self.converted_at)
        return (quick | late).astype(np.int64)

    def batch(self, click: Int, max_history: int) -> Batch:
        """Clicks [n] as a batch without labels."""
        asked = torch.from_numpy(click)
        requests = self.requests.select(click).without_targets()
        return request_batch(self.histories, self.users, requests, max_history=max_history).with_candidates(
            self.candidates.rows.select(asked), {name: column[asked] for name, column in self.candidates.pair.items()}
        )


class SampleSource:
    """Batches of samples, each a copy of its click.

    Args:
        log: the clicks.
        click: [S] click of each sample.
        finish: adds labels or criteria to a batch of the samples with the given numbers [n].
        batch_size: samples per batch.
        max_history: newest events read per click.
        seed: of the order, drawn anew each epoch; None = as they stand.
    """

    def __init__(
        self, log: ClickLog, click: Int, finish: Finish, *, batch_size: int, max_history: int, seed: int | None
    ) -> None:
        if not len(click):
            raise DataError("there is no sample to learn from: no click is old enough when training begins")
        self.log, self.click, self.finish = log, click, finish
        self.batch_size, self.max_history, self.seed = batch_size, max_history, seed

    def steps_per_epoch(self) -> int:
        """See BatchSource."""
        return -(-len(self.click) // self.batch_size)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See BatchSource."""
        order = np.arange(len(self.click))
        if self.seed is not None:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        for first in range(start * self.batch_size, len(order), self.batch_size):
            index = order[first : first + self.batch_size]
            yield self.finish(self.log.batch(self.click[index], self.max_history), index)


def learned_by(
    rule: FeedbackRule,
    tasks: tuple[str, ...],
    emitted: Emitted,
    auxiliary: Mapping[str, Tensor],
    *,
    first: bool = False,
) -> Finish:
    """What a rule learns from samples; `auxiliary` float32 [S] by name, `first` as in Delayed."""
    seen = emitted.seen(auxiliary)

    def finish(batch: Batch, index: Int) -> Batch:
        where = torch.from_numpy(index)
        criterion = Delayed(rule=rule, tasks=tasks, seen=seen.select(where), first=first)
        kind, at = torch.from_numpy(emitted.kind[index]), torch.from_numpy(emitted.emitted_at[index])
        return replace(batch, criteria=(criterion,), sample_kind=kind, emitted_at=at)

    return finish


def source_for(phase: Phase, name: str, source: Callable[[], SampleSource]) -> SampleSource:
    """The source, for phases that learn from candidates by gradient; ConfigError for others."""
    if phase.feed != "candidates" or phase.learn is not None:
        raise ConfigError(
            f"{name}, phase {phase.name!r} does not learn from labelled candidates by gradient and can not follow a stream of clicks; "
            "choose another ranker, such as dnn"
        )
    return source()


def auxiliary_chances(
    make: Make,
    view: View,
    log: ClickLog,
    auxiliary: Auxiliary | None,
    windows: Windows,
    asked: Emitted,
    *,
    now: int,
    trainer: TrainerConfig,
    folder: Path | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Train a rule's auxiliary network on what is known at `now`, freeze it, and ask it about samples.

    Args:
        make: builds the network: a ranker whose tasks are the auxiliary outputs.
        auxiliary: what it learns; None = the rule has no such network.
        asked: S samples.
        folder: of its checkpoints; where training is complete there, it is not repeated.

    Returns float32 [S] by output; nothing for a rule without such a network.
    """
    if auxiliary is None:
        return {}
    lesson = auxiliary.lesson(log.clicked_at, log.converted_at, windows, now)
    labels = {name: torch.from_numpy(column) for name, column in lesson.labels.items()}
    old = _age(lesson.elapsed)

    def finish(batch: Batch, index: Int) -> Batch:
        where = torch.from_numpy(index)
        told = {name: column[where] for name, column in labels.items()}
        return replace(_aged(batch, auxiliary, old[where]), labels=told)

    network = make(auxiliary_space(view.space, auxiliary))
    fit(
        network,
        view,
        lambda phase: source_for(
            phase,
            type(network).__name__,
            lambda: SampleSource(
                log,
                lesson.click,
                finish,
                batch_size=trainer.batch_size,
                max_history=network.max_history,
                seed=trainer.seed,
            ),
        ),
        config=trainer,
        folder=folder,
        progress=progress,
    )
    return _asked(network, log, auxiliary, asked)


def auxiliary_space(space: Space, auxiliary: Auxiliary) -> Space:
    """The space of an auxiliary network: its outputs as tasks, and the age of a click as a pair field where it reads that."""
    pair = (*space.pair_fields, Numeric(name=ELAPSED)) if auxiliary.reads_elapsed else space.pair_fields
    return replace(space, tasks=auxiliary.heads, pair_fields=pair)


@torch.no_grad()
def _asked(network: Ranker, log: ClickLog, auxiliary: Auxiliary, asked: Emitted) -> dict[str, Tensor]:
    """float32 [S] by output."""
    network.eval()
    device, old = next(network.parameters()).device, _age(asked.elapsed)
    parts: list[Tensor] = []
    for first in range(0, len(asked), SAMPLES_AT_ONCE):
        here = slice(first, first + SAMPLES_AT_ONCE)
        batch = _aged(log.batch(asked.click[here], network.max_history), auxiliary, old[here])
        scores = network.score(batch.to(device))
        parts.append(torch.stack([scores[name] for name in auxiliary.heads]).sigmoid().cpu())
    chances = torch.cat(parts, 1) if parts else torch.zeros(len(auxiliary.heads), 0)
    return dict(zip(auxiliary.heads, chances, strict=True))


def _age(elapsed: Int) -> Tensor:
    """float32 [n]: 0 for a click just made, 1 after 30 days, on a logarithmic scale."""
    return torch.from_numpy(np.log1p(elapsed / HOUR_S) / np.log1p(720.0)).float()


def _aged(batch: Batch, auxiliary: Auxiliary, age_n: Tensor) -> Batch:
    """The batch with the age of its clicks, where the network reads it."""
    if not auxiliary.reads_elapsed or batch.candidates is None:
        return batch
    pair = {**batch.candidates.pair, ELAPSED: age_n}
    return replace(batch, candidates=replace(batch.candidates, pair=pair))
