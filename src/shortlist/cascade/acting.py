"""One system at work for one batch: searching the catalogue, scoring candidates, and what that costs.

B requests, n items (row 0 = no item), d width of a vector, total = all candidates of the batch end to end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from shortlist.cascade.candidates import Blocked
from shortlist.cascade.config import Surface
from shortlist.cascade.indexing import find_nearest
from shortlist.cascade.tasks import page_scores
from shortlist.cascade.watch import Problem, Watch
from shortlist.data.batches import Batch
from shortlist.data.jagged import Jagged
from shortlist.errors import ConfigError
from shortlist.models.base import (
    RETRIEVAL_TASK,
    ItemScorer,
    Ranker,
    Remembering,
    RequestShape,
    Retrieved,
    Retriever,
    System,
    VectorRetriever,
    broken,
    nearest,
    top_k,
)
from shortlist.store.memories import Memories
from shortlist.store.vector_index import VectorIndex


class Found(NamedTuple):
    """What a retriever found, and how to score other items without asking it for the user again."""

    best: Retrieved
    score: Callable[[Jagged], Tensor]
    """float32 [total] for candidates of the same requests."""
    bad_B: Tensor
    """bool [B]: requests for which it gave NaN or infinite scores; their `best` is empty."""


@dataclass(slots=True)
class Recall:
    """Where one system's memories of users are, for one batch."""

    name: str
    memories: Memories
    watch: Watch | None = None
    """Told of memories that were too old."""
    share: float = 0.0
    """Of the batch's requests, those that a memory was found for."""

    def __call__(self, system: Remembering, batch: Batch) -> Any:
        """The user side of a batch, from what is remembered; what the system gives is remembered in turn."""
        found = self.memories.get(self.name, batch.key)
        self.share = sum(memory is not None for memory in found) / len(found)
        state, kept = system.recall(batch, found)
        self.memories.put(self.name, batch.key, kept)
        if self.watch is not None and self.memories.problem is not None:
            self.watch.problems.append(Problem(f"{self.name} went without memories: {self.memories.problem}"))
        if self.watch is not None and isinstance(system, Remarking):
            self.watch.problems += [Problem(f"{self.name} {text}", mask_B) for mask_B, text in system.remarks(state)]
        return state


@runtime_checkable
class Remarking(Protocol):
    """A system that remembers and can tell when it went on from something too old."""

    def remarks(self, state: Any) -> list[tuple[Tensor, str]]:
        """Requests bool [B] of a state that `recall` made, and what to say of them after the system's name."""


def search(
    system: System,
    batch: Batch,
    k: int,
    blocked: Blocked,
    index: VectorIndex | None = None,
    recall: Recall | None = None,
) -> Found:
    """The k best permitted items per request by one retriever; a vector retriever's index stands in for a product with every item.

    With `recall`, a vector retriever that remembers goes on from what it kept of the users that the batch names.
    """
    match system:
        case ItemScorer():
            scores_BN = system.score_all(batch)
            bad_B = broken(scores_BN)
            best = top_k(_close(scores_BN, blocked), k, batch.excluded)
            return _without(Found(best, lambda rows: scores_BN[rows.row_of_value, rows.values], bad_B))
        case VectorRetriever():
            item_Nd = system.item_matrix()
            user_Bd = _recalled(system, batch, recall)
            user_Bd = system.encode_user(batch) if user_Bd is None else user_Bd
            if index is None:
                best, bad_B = nearest(user_Bd, item_Nd, k, batch.excluded, blocked.allowed)
            else:
                best, bad_B = find_nearest(index, user_Bd, item_Nd, k, blocked)
            return _without(
                Found(best, lambda rows: (user_Bd[rows.row_of_value] * item_Nd[rows.values]).sum(-1), bad_B)
            )
        case Retriever():
            best = system.retrieve(_closed(batch, blocked), k)
            return _without(
                Found(best, lambda rows: system.score(batch.with_candidates(rows))[RETRIEVAL_TASK], broken(best.scores))
            )
    raise ConfigError(f"{type(system).__name__} is a {system.kind} and can not search the catalogue")


def score(system: System, batch: Batch, recall: Recall | None = None, surface: Surface | None = None) -> Tensor:
    """float32 [total]: what the system orders the batch's candidates by; of a ranker its tasks as the surface combines them, without one
    the first. `recall` as in `search`."""
    if isinstance(system, Ranker):
        state = _recalled(system, batch, recall)
        if state is not None and batch.candidates is not None:
            scores = system.score_candidates(state, batch.candidates)
        else:
            scores = system.score(batch)
        return page_scores(scores, system.space.tasks, surface)
    if isinstance(system, ItemScorer | VectorRetriever | Retriever):
        return system.score(batch)[RETRIEVAL_TASK]
    raise ConfigError(f"{type(system).__name__} is a {system.kind} and does not score candidates")


def _recalled(system: System, batch: Batch, recall: Recall | None) -> Any:
    """The user side made from memories; None where the system, the caller or the batch has none."""
    if recall is None or not batch.key or not isinstance(system, Remembering):
        return None
    return recall(system, batch)


def search_flops(
    system: System, num_history: float, num_candidates: float, num_items: int, index: VectorIndex | None = None
) -> float:
    """FLOPs per request of `search` and of scoring what all retrievers found together."""
    cost = system.cost(_shape(system, num_history, num_candidates, num_items))
    match system:
        case ItemScorer():
            return cost.flops(num_items)
        case VectorRetriever():
            num_searched = num_items if index is None else index.num_scored
            return cost.user_flops + cost.item_flops * (num_searched + num_candidates)
    return 2 * cost.user_flops + cost.item_flops * num_candidates  # asked twice: to find and to score


def score_flops(
    system: System, num_history: float, num_candidates: float, num_items: int, *, remembered: float = 0.0
) -> float:
    """FLOPs per request of `score` or of a re-ranker; an ItemScorer can not score fewer items than all.

    Args:
        remembered: share of requests whose user side went on from a memory.
    """
    shape = _shape(system, num_history, num_candidates, num_items)
    cost = system.cost(shape)
    num_scored = num_items if isinstance(system, ItemScorer) else num_candidates
    user = (1 - remembered) * cost.user_flops
    if remembered:
        user += remembered * system.cost(shape, cached=True).user_flops
    return user + cost.item_flops * num_scored


def _shape(system: System, num_history: float, num_candidates: float, num_items: int) -> RequestShape:
    return RequestShape(
        num_history=min(round(num_history), system.max_history),
        num_candidates=round(num_candidates),
        num_items=num_items,
    )


def _without(found: Found) -> Found:
    """Nothing found where the scores are broken."""
    bad_B1 = found.bad_B[:, None]
    best = Retrieved(found.best.rows.masked_fill(bad_B1, 0), found.best.scores.masked_fill(bad_B1, -torch.inf))
    return found._replace(best=best)


def _close(scores_BN: Tensor, blocked: Blocked) -> Tensor:
    """Scores of items that nobody may see become -inf, in place."""
    return scores_BN if blocked.allowed is None else scores_BN.masked_fill_(~blocked.allowed, -torch.inf)


def _closed(batch: Batch, blocked: Blocked) -> Batch:
    """The batch with what nobody may see among each request's exclusions."""
    if blocked.allowed is None:
        return batch
    denied = (~blocked.allowed).nonzero()[:, 0]
    denied = denied[denied > 0]
    own = batch.excluded or Jagged.from_lengths(denied[:0], torch.zeros_like(batch.user))
    request = torch.arange(batch.size, device=denied.device)
    owner = torch.cat([own.row_of_value, request.repeat_interleave(len(denied))])
    values = torch.cat([own.values, denied.repeat(batch.size)])
    return replace(batch, excluded=Jagged.from_lengths(values[owner.argsort(stable=True)], own.lengths + len(denied)))
