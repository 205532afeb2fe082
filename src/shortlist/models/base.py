"""The kinds of system and what each must offer. A system inherits one kind and is final.

B requests, n items (scores have n + 1 columns, row 0 is the unknown item), k results, d width of a vector, total = all candidates of
the batch end to end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, final, runtime_checkable

import torch
from torch import Tensor, nn

from shortlist.data.batches import Batch, Candidates
from shortlist.data.histories import View
from shortlist.data.jagged import Jagged
from shortlist.data.schema import Space
from shortlist.layers.counting import SparseRows

Losses = dict[str, Tensor]
Scores = dict[str, Tensor]
Feed = Literal["next_event", "sessions", "targets", "candidates"]
Memory = Mapping[str, Tensor]
"""What a system keeps of one user between two requests: tensors by name, of that user alone."""
RETRIEVAL_TASK = "score"
PRODUCTS_AT_ONCE = 1 << 25
"""Inner products held at once by a search over all items (128 MiB), so that memory grows neither with the catalogue nor the batch."""


class Retrieved(NamedTuple):
    """Best items per request, best first."""

    rows: Tensor
    """int64 [B, k] catalogue rows; 0 where fewer than k could be had."""
    scores: Tensor
    """float32 [B, k]; -inf beside row 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestShape:
    """Size of one request, for costs."""

    num_history: int = 50
    num_candidates: int = 100
    num_items: int = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What one request costs; one multiply-add is 2 FLOPs."""

    user_flops: float = 0.0
    """Once per request, whatever the number of candidates."""
    item_flops: float = 0.0
    """Per candidate; for a retriever that scores the whole catalogue, per item of it."""
    bytes: float = 0.0
    """Parameters and state read, once per request."""

    def flops(self, num_scored: int) -> float:
        """FLOPs of a request that scores so many items."""
        return self.user_flops + self.item_flops * num_scored


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One step of training; most systems have one."""

    name: str
    feed: Feed
    """next_event: one sequence per user, all positions; sessions: one group of events per lane, sessions one after another
    (training/session_parallel.py); targets: a past request with what was chosen as candidates; candidates: a past request with what the
    earlier stages let through, labelled."""
    losses: Callable[[Batch], Losses]
    gap_hours: float | None = None
    """Of `sessions`: a longer gap between two groups ends one; None = a user is one session."""
    parameters: Callable[[], Iterable[nn.Parameter]] | None = None
    """What this phase trains; None = everything that requires a gradient."""
    before: Callable[[View], None] | None = None
    """Work between phases on training-time data: frozen auxiliaries, clusterings, ids."""
    epochs: int | None = None
    """Epochs at most; None = as the trainer's settings say."""
    learn: Callable[[Iterable[Batch]], Losses] | None = None
    """Learning that is not gradient steps, such as growing trees: called once with one epoch's batches in place of all steps; sets
    buffers and returns what `losses` would, for the curve. It is done whole: neither max_seconds nor a checkpoint cuts it."""


class System(nn.Module, ABC):
    """What all systems share. `Config` is the class's settings dataclass, `feed` what it trains on (None = no gradient training)."""

    kind: ClassVar[str]
    Config: ClassVar[type]
    feed: ClassVar[Feed | None] = None
    max_history: int = 200
    """Newest events it reads; set from the config in `__init__`. A batch may hold more: a system cuts by `history.last`."""

    def __init__(self, config: Any, space: Space) -> None:
        super().__init__()
        self.config = config
        self.space = space

    def prepare(self, view: View) -> None:
        """Compute from training-time data what must stand before training: counts, graphs, closed forms. Results are buffers."""

    def losses(self, batch: Batch) -> Losses:
        """Training losses by task, scalars. Only called where `feed` is set."""
        raise TypeError(f"{type(self).__name__} is not trained by gradient; it is complete after prepare()")

    def phases(self) -> tuple[Phase, ...]:
        """Steps of training, in order."""
        return (Phase(name="train", feed=self.feed, losses=self.losses),) if self.feed else ()

    def shared_parameters(self) -> list[nn.Parameter]:
        """Parameters that several tasks share, for gradient rules; all of them unless a multi-task model says otherwise."""
        return list(self.parameters())

    @abstractmethod
    def cost(self, shape: RequestShape, cached: bool = False) -> Cost:
        """FLOPs and bytes of one request; `cached` = the user side is already at hand."""

    def take_shape(self, tensors: Mapping[str, Tensor]) -> None:
        """Called before weights are loaded: a system that training narrows takes the shape it had when these were saved.

        Raises ValueError where they are of other fields.
        """

    def buffer(self, name: str, value: Tensor) -> None:
        """Set a buffer that is saved with the weights, whatever its shape was before."""
        if name in self._buffers:
            self._buffers[name] = value
        else:
            self.register_buffer(name, value)


class Retriever(System):
    """Finds candidates among all items, and can score given ones."""

    kind = "retriever"

    @abstractmethod
    def retrieve(self, batch: Batch, k: int) -> Retrieved:
        """The k best items per request, without `batch.excluded` and without row 0."""

    @abstractmethod
    def score(self, batch: Batch) -> Scores:
        """{"score": [total] float32}: the scores that `retrieve` sorts by, for the batch's candidates."""


class ItemScorer(System):
    """A retriever that scores the whole catalogue at once: counts and closed forms."""

    kind = "retriever"

    @abstractmethod
    def score_all(self, batch: Batch) -> Tensor:
        """float32 [B, n + 1], freshly made; column 0 is ignored."""

    @final
    def retrieve(self, batch: Batch, k: int) -> Retrieved:
        """See Retriever.retrieve."""
        return top_k(self.score_all(batch), k, batch.excluded)

    @final
    def score(self, batch: Batch) -> Scores:
        """See Retriever.score."""
        rows = batch.candidate_rows
        return {RETRIEVAL_TASK: self.score_all(batch)[rows.row_of_value, rows.values]}


class VectorRetriever(System):
    """A retriever whose score is the inner product of a user's and an item's vector, so that an index can serve it."""

    kind = "retriever"

    def __init__(self, config: Any, space: Space) -> None:
        super().__init__(config, space)
        self._matrix: Tensor | None = None

    @abstractmethod
    def encode_user(self, batch: Batch) -> Tensor:
        """float32 [B, d]."""

    @abstractmethod
    def encode_items(self, rows: Tensor) -> Tensor:
        """float32 [n, d] for catalogue rows [n] int64."""

    @final
    def item_matrix(self) -> Tensor:
        """float32 [n + 1, d]: all items, computed once and kept until training goes on."""
        if self._matrix is None or self._matrix.device != self.space_device():
            with torch.no_grad():
                rows = torch.arange(self.space.num_items + 1, device=self.space_device())
                self._matrix = torch.cat([self.encode_items(chunk) for chunk in rows.split(65_536)])
        return self._matrix

    def space_device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> VectorRetriever:
        """As nn.Module; the kept item matrix is dropped, since it may change."""
        self._matrix = None
        super().train(mode)
        return self

    @final
    def retrieve(self, batch: Batch, k: int) -> Retrieved:
        """See Retriever.retrieve; exact search over all items."""
        return nearest(self.encode_user(batch), self.item_matrix(), k, batch.excluded).best

    @final
    def score(self, batch: Batch) -> Scores:
        """See Retriever.score."""
        rows = batch.candidate_rows
        user_Bd = self.encode_user(batch)
        return {RETRIEVAL_TASK: (user_Bd[rows.row_of_value] * self.item_matrix()[rows.values]).sum(-1)}


class Ranker(System):
    """Scores the candidates of each request, one score per task. The user side is computed once per request."""

    kind = "ranker"
    feed = "candidates"

    @abstractmethod
    def user_state(self, batch: Batch) -> Any:
        """All that depends on user, history and context alone: tensors [B, ...] in a NamedTuple or a plain tensor."""

    @abstractmethod
    def score_candidates(self, state: Any, candidates: Candidates) -> Scores:
        """Logits [total] per task of `space.tasks`."""

    @final
    def score(self, batch: Batch) -> Scores:
        """Logits [total] per task for the batch's candidates."""
        if batch.candidates is None:
            raise ValueError("this batch has no candidates to score; build it with candidates=...")
        return self.score_candidates(self.user_state(batch), batch.candidates)


@runtime_checkable
class Remembering(Protocol):
    """A ranker or vector retriever whose user side can go on from an earlier request of the same user."""

    def recall(self, batch: Batch, memories: Sequence[Memory | None]) -> tuple[Any, list[Memory | None]]:
        """What `user_state(batch)` (of a vector retriever: `encode_user(batch)`) gives, made from memories, and what to keep now.

        The state equals the one without memories to rounding, unless the system's docstring states how stale it may be. A memory that
        does not fit the request's history (its window slid, events are gone) is passed over: the system checks that itself, so a
        caller can hand in whatever it has.

        Args:
            memories: per request of the batch, None where nothing is kept.
        """


class Reranker(System):
    """Turns scored candidates into the page, looking at the items together: diversity, quotas, mixes."""

    kind = "reranker"

    @abstractmethod
    def rerank(self, batch: Batch, scores: Tensor, k: int) -> Retrieved:
        """The page: k rows per request in the order shown, from the batch's candidates with scores [total]."""


def top_k(scores_BN: Tensor, k: int, excluded: Jagged | None = None, *, first: int = 0) -> Retrieved:
    """The k best columns per row, without row 0 of the catalogue and the excluded ones; overwrites the scores of those.

    Args:
        scores_BN: float [B, n + 1]; -inf and NaN are never returned.
        excluded: catalogue rows per request, or None.
        first: catalogue row of the first column, where the columns are a part of the catalogue.
    """
    scores_BN.nan_to_num_(nan=-torch.inf, posinf=torch.finfo(scores_BN.dtype).max, neginf=-torch.inf)
    if first == 0:
        scores_BN[:, 0] = -torch.inf
    if excluded is not None and len(excluded.values):
        request, column = excluded.row_of_value, excluded.values - first
        inside = (column >= 0) & (column < scores_BN.shape[1])
        scores_BN[request[inside], column[inside]] = -torch.inf
    scores, rows = scores_BN.topk(min(k, scores_BN.shape[1]), dim=1)
    rows += first
    if rows.shape[1] < k:
        missing = k - rows.shape[1]
        rows, scores = nn.functional.pad(rows, (0, missing)), nn.functional.pad(scores, (0, missing), value=-torch.inf)
    return Retrieved(rows.masked_fill(scores == -torch.inf, 0), scores)


class Nearest(NamedTuple):
    """The items with the highest inner products."""

    best: Retrieved
    bad_B: Tensor
    """bool [B]: requests with a product that is NaN or +inf."""


def nearest(
    user_Bd: Tensor, item_Nd: Tensor, k: int, excluded: Jagged | None = None, allowed: Tensor | None = None
) -> Nearest:
    """Exact search over all items, block by block; never more than PRODUCTS_AT_ONCE products are held.

    Args:
        user_Bd: float [B, d].
        item_Nd: float [n + 1, d]; row 0 is never returned.
        excluded: catalogue rows per request, or None.
        allowed: bool [n + 1], items that may be found; None = all.
    """
    width = max(1, PRODUCTS_AT_ONCE // max(len(user_Bd), 1))
    best: Retrieved | None = None
    bad_B = torch.zeros(len(user_Bd), dtype=torch.bool, device=user_Bd.device)
    for first in range(0, len(item_Nd), width):
        scores_BW = user_Bd @ item_Nd[first : first + width].T
        bad_B |= broken(scores_BW)
        if allowed is not None:
            scores_BW.masked_fill_(~allowed[first : first + width], -torch.inf)
        found = top_k(scores_BW, k, excluded, first=first)
        best = found if best is None else _better(best, found, k)
    assert best is not None  # a catalogue has row 0 at least
    return Nearest(best, bad_B)


def broken(scores_BN: Tensor) -> Tensor:
    """bool [B]: rows with NaN or +inf."""
    return (torch.isnan(scores_BN) | (scores_BN == torch.inf)).any(1)


def _better(one: Retrieved, other: Retrieved, k: int) -> Retrieved:
    """The k best of two lists of different items."""
    scores, column = torch.cat([one.scores, other.scores], 1).topk(k, dim=1)
    return Retrieved(torch.cat([one.rows, other.rows], 1).gather(1, column), scores)


def top_k_of_candidates(rows: Jagged, scores: Tensor, k: int) -> Retrieved:
    """The k best candidates per request by score [total]; NaN counts as -inf, ties keep the candidates' order."""
    clean = scores.nan_to_num(nan=-torch.inf, posinf=torch.finfo(scores.dtype).max, neginf=-torch.inf)
    scores_BC, _ = rows.with_values(clean).padded(fill=-torch.inf)
    rows_BC, _ = rows.padded()
    order_BC = scores_BC.argsort(dim=1, descending=True, stable=True)[:, :k]
    best = Retrieved(rows_BC.gather(1, order_BC), scores_BC.gather(1, order_BC))
    missing = k - order_BC.shape[1]
    if missing > 0:
        best = Retrieved(
            nn.functional.pad(best.rows, (0, missing)), nn.functional.pad(best.scores, (0, missing), value=-torch.inf)
        )
    return best


def load_weights(system: System, tensors: Mapping[str, Tensor]) -> None:
    """Set parameters and buffers by name; buffers made by `prepare` may have any shape. ValueError names what does not fit."""
    system.take_shape(tensors)
    for name, value in tensors.items():
        path, _, leaf = name.rpartition(".")
        module = system.get_submodule(path)
        if leaf in module._parameters:
            continue
        if leaf in module._buffers:
            module._buffers[leaf] = value
        else:
            module.register_buffer(leaf, value)
    missing, unexpected = system.load_state_dict(dict(tensors), strict=False)
    system.train(system.training)  # drops item vectors kept from the weights before
    for module in system.modules():
        if all(name in module._buffers for name in SparseRows._fields):
            SparseRows(*(module.get_buffer(name) for name in SparseRows._fields)).check()
    if missing or unexpected:
        raise ValueError(f"weights of {type(system).__name__}: missing {missing}, unexpected {unexpected}")
