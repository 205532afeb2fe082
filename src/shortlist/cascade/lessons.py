"""What later stages learn from: the requests of a window with what the earlier stages let through, and how well a system does on them.

R requests, total = all candidates of all requests end to end, B requests of a chunk, k places of a page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from shortlist.cascade.acting import score
from shortlist.cascade.candidates import best_first, take
from shortlist.cascade.cascade import Cascade
from shortlist.cascade.config import Surface
from shortlist.cascade.tasks import DELAY, task_quality
from shortlist.data.batches import Batch, Candidates, labels_of, request_batch
from shortlist.data.dataset import Dataset
from shortlist.data.histories import Int, Requests
from shortlist.data.jagged import Jagged
from shortlist.metrics import ranking
from shortlist.models.base import Ranker, Reranker, System, top_k_of_candidates
from shortlist.training.sources import BatchSource, CandidateSource

SCORES_AT_ONCE = 1 << 25
"""Numbers in one [B, n] matrix of scores, so that a chunk's memory does not grow with the catalogue: 128 MiB."""
CHUNK = 256
WORTH = "worth"


@dataclass(frozen=True, kw_only=True, slots=True)
class Lessons:
    """Requests with candidates."""

    requests: Requests
    rows: Jagged
    """Catalogue rows per request, best first by the stages before."""
    pair: Mapping[str, Tensor]
    """float32 [total] by name."""
    label: Tensor
    """float32 [total]: 1 where the request chose the candidate."""
    worth: Tensor
    """float32 [total]: what the choice was worth; 0 where there was none."""
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    """float32 [total] by task, NaN where not known; empty where the choice is the only task."""


def chunks(num_requests: int, num_items: int) -> Iterator[Int]:
    """Indices of requests in chunks whose score matrices fit memory."""
    size = max(1, min(CHUNK, SCORES_AT_ONCE // (num_items + 1)))
    for start in range(0, num_requests, size):
        yield np.arange(start, min(start + size, num_requests))


def sample(requests: Requests, most: int, seed: int) -> Requests:
    """At most so many requests, drawn at random, in their old order."""
    return requests if len(requests) <= most else requests.select(drawn(len(requests), most, seed))


def drawn(num_requests: int, most: int, seed: int) -> Int:
    """Indices of at most so many requests, drawn at random, rising."""
    if num_requests <= most:
        return np.arange(num_requests)
    return np.sort(np.random.default_rng([seed, num_requests]).choice(num_requests, most, replace=False))


def sample_shown(
    dataset: Dataset, most: int, seed: int, window: Literal["fit", "valid", "test"] = "fit"
) -> tuple[Requests, Jagged, dict[str, Tensor]]:
    """At most so many logged impressions of a window, the items that each showed, and their labels by column."""
    requests, shown, labels = dataset.impressions(window)
    index = drawn(len(requests), most, seed)
    chosen = torch.from_numpy(index)
    where = shown.value_index(chosen)
    return requests.select(index), shown.select(chosen), {name: column[where] for name, column in labels.items()}


def collect(
    cascade: Cascade,
    dataset: Dataset,
    requests: Requests,
    stage: str,
    *,
    shown: Jagged | None = None,
    labels: Callable[[Int, Jagged], dict[str, Tensor]] | None = None,
    most: int | None = None,
    seed: int = 0,
) -> Lessons:
    """Run the stages before `stage` on the requests.

    Args:
        shown: items per request that stand in place of what the first stage would find.
        labels: gives the tasks' labels [total] of candidates of the requests with the given numbers; None = the choice is the task.
        most: candidates kept per request: all that were chosen and a random part of the others; None = all.
        seed: of the random part.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: list[Lessons] = []
    for index in chunks(len(requests), dataset.num_items):
        asked = requests.select(index)
        given = None if shown is None else shown.select(torch.from_numpy(index))
        batch = cascade.until(make_batch(dataset, asked, cascade.max_history), stage, candidates=given).to("cpu")
        assert batch.candidates is not None
        rows, pair = batch.candidates.rows, batch.candidates.pair
        label, worth = labels_of(rows, asked)
        by_task = {} if labels is None else labels(index, rows)
        if most is not None:
            told = torch.stack([label, *by_task.values()]).gt(0).any(0)
            lot = torch.rand(len(label), generator=generator) + told
            kept, _ = best_first(rows, lot, most).sort()
            rows, pair = take(rows, kept), {name: column[kept] for name, column in pair.items()}
            label, worth = label[kept], worth[kept]
            by_task = {task: column[kept] for task, column in by_task.items()}
        parts.append(Lessons(requests=asked, rows=rows, pair=pair, label=label, worth=worth, labels=by_task))
    return replace(_end_to_end(parts), requests=requests)


def make_batch(dataset: Dataset, requests: Requests, max_history: int) -> Batch:
    """The requests as every stage is asked them: what may not be repeated is excluded."""
    return request_batch(
        dataset.histories, dataset.users, requests, max_history=max_history, exclude_history=not dataset.repeats
    )


def joined(parts: Sequence[Lessons]) -> Lessons:
    """Lessons end to end."""
    if len(parts) == 1:
        return parts[0]
    return _end_to_end(parts)


def _end_to_end(parts: Sequence[Lessons]) -> Lessons:
    return Lessons(
        requests=Requests.joined([part.requests for part in parts]),
        rows=Jagged.from_lengths(
            torch.cat([part.rows.values for part in parts]), torch.cat([part.rows.lengths for part in parts])
        ),
        pair={name: torch.cat([part.pair[name] for part in parts]) for name in parts[0].pair},
        label=torch.cat([part.label for part in parts]),
        worth=torch.cat([part.worth for part in parts]),
        labels={task: torch.cat([part.labels[task] for part in parts]) for task in parts[0].labels},
    )


class WeighedSource:
    """A candidate source whose choices weigh what they were worth, 1 on average; candidates not chosen weigh 1."""

    def __init__(self, source: CandidateSource, mean_worth: float) -> None:
        self.source, self.mean_worth = source, mean_worth

    def steps_per_epoch(self) -> int:
        """See BatchSource."""
        return self.source.steps_per_epoch()

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See BatchSource."""
        for batch in self.source.batches(epoch, start):
            labels = dict(batch.labels)
            worth = labels.pop(WORTH)
            chosen = torch.stack(list(labels.values())).gt(0).any(0)
            yield replace(batch, labels=labels, weight=torch.where(chosen, worth / self.mean_worth, 1.0))


def candidate_source(
    lessons: Lessons,
    dataset: Dataset,
    *,
    task: str,
    by_value: bool,
    batch_size: int,
    max_history: int,
    num_negatives: int | None,
    only_chosen: bool,
    seed: int,
) -> BatchSource:
    """What a ranker trains on; see CandidateSource."""
    labels = {name: label for name, label in lessons.labels.items() if name != DELAY} or {task: lessons.label}
    if by_value:
        labels[WORTH] = lessons.worth.clamp(min=0)
    source = CandidateSource(
        dataset.histories,
        dataset.users,
        lessons.requests,
        Candidates(rows=lessons.rows, pair=lessons.pair),
        labels,
        batch_size=batch_size,
        max_history=max_history,
        num_negatives=num_negatives,
        only_chosen=only_chosen,
        seed=seed,
    )
    if not by_value:
        return source
    chosen = lessons.worth[lessons.label > 0].clamp(min=0)
    mean = float(chosen.mean()) if len(chosen) else 0.0
    return WeighedSource(source, mean if mean > 0 else 1.0)


def full_ranking_score(system: System, dataset: Dataset, requests: Requests, k: int) -> float:
    """Mean NDCG@k of a retriever that searches the whole catalogue for every request."""
    device = device_of(system)
    pages = [
        system.retrieve(make_batch(dataset, requests.select(index), system.max_history).to(device), k).rows.cpu()  # type: ignore[operator]
        for index in chunks(len(requests), dataset.num_items)
    ]
    return _ndcg(pages, requests, k)


def candidate_score(
    system: System, dataset: Dataset, lessons: Lessons, k: int, surface: Surface | None = None
) -> float:
    """Mean NDCG@k of a system that orders what the stages before it let through; what they dropped counts as missed."""
    pages = [_page(system, batch, k, surface).cpu() for batch in _batches(system, dataset, lessons)]
    return _ndcg(pages, lessons.requests, k)


def task_score(system: Ranker, dataset: Dataset, lessons: Lessons) -> dict[str, dict[str, float]]:
    """How well a ranker tells each task's outcomes apart; see `task_quality`."""
    parts = [{task: s.cpu() for task, s in system.score(b).items()} for b in _batches(system, dataset, lessons)]
    scores = {task: torch.cat([part[task] for part in parts]) for task in parts[0]}
    return task_quality(scores, lessons.labels, lessons.requests.user[lessons.rows.row_of_value.numpy()])


def _batches(system: System, dataset: Dataset, lessons: Lessons) -> Iterator[Batch]:
    """The lessons as a system is asked them, on its device."""
    device = device_of(system)
    for index in chunks(len(lessons.requests), 1 << 12):
        chosen = torch.from_numpy(index)
        where = lessons.rows.value_index(chosen)
        batch = make_batch(dataset, lessons.requests.select(index), system.max_history).with_candidates(
            lessons.rows.select(chosen), {name: column[where] for name, column in lessons.pair.items()}
        )
        yield batch.to(device)


def device_of(system: System) -> torch.device:
    """Where its tensors are; the CPU where it has none."""
    tensor = next(chain(system.parameters(), system.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _page(system: System, batch: Batch, k: int, surface: Surface | None) -> Tensor:
    rows = batch.candidate_rows
    if isinstance(system, Reranker):
        return system.rerank(batch, -rows.position_of_value.float(), k).rows
    return top_k_of_candidates(rows, score(system, batch, surface=surface), k).rows


def _ndcg(pages: list[Tensor], requests: Requests, k: int) -> float:
    judged = ranking.judge(torch.cat(pages).numpy(), requests.target, requests.target_offsets)
    return float(ranking.ndcg(judged, k).mean())
