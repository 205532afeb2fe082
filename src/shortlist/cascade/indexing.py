"""Indexes at work in a cascade: built over its vector retrievers, measured against exact search, and asked in its place.

An index knows nothing of who may see what. So it is asked for more than wanted, what is blocked falls out, and a request that then
comes short is searched exactly: exclusions and `allowed` hold as ever, and a page is full whenever the catalogue has enough.

B requests, n items (row 0 = no item), d width of a vector, k items wanted.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from shortlist.cascade.candidates import Blocked, contained
from shortlist.data.jagged import Jagged, segment_sum
from shortlist.data.manifest import read_json
from shortlist.errors import ConfigError, ShortlistError, SnapshotError
from shortlist.extras import installed
from shortlist.models.base import Nearest, Retrieved, System, VectorRetriever, nearest
from shortlist.store.snapshot import REMEDY
from shortlist.store.vector_index import IndexConfig, VectorIndex

if TYPE_CHECKING:
    from shortlist.cascade.cascade import Cascade
    from shortlist.data.batches import Batch

LOG = logging.getLogger("shortlist.cascade")
FOLDER, ABOUT = "indexes", "indexes.json"
MOST_EXTRA = 256
"""Items at most that are fetched beside the k wanted to make up for a request's own exclusions."""
EXACT_SHARE = 1 / 8
"""Share of the catalogue from which fetching costs as much as an exact search."""
Query = tuple[Tensor, Blocked]
"""User vectors float32 [B, d] and what these requests must not see."""
MISSING = "the library 'faiss' is not installed, so every item is searched; pip install 'shortlist[ann]' for an index"


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexReport:
    """What an index is and how well it stands in for an exact search; plain numbers, for metrics.json."""

    kind: str
    """flat, hnsw or ivf."""
    in_use: bool
    """False where it found too little, so that the cascade searches exactly."""
    num_items: int
    """Items in it."""
    k: int
    """Items that the stage asks for."""
    recall: float
    """Share of the k items of an exact search that the index alone finds, mean over the requests that it is asked for."""
    exact_share: float
    """Share of requests that are searched exactly all the same, since so much is blocked that the index would leave them short."""
    num_queries: int
    """Validation requests on which that was measured, with their exclusions."""
    effort: int
    """Items (hnsw) or lists (ivf) that a search looks into."""
    num_scored: float
    """Products per request, with those of exact searches; an exact search computes num_items."""
    build_seconds: float
    """Wall time of building, without measuring."""

    def summary(self) -> str:
        """One line for people."""
        used = "" if self.in_use else "; not used"
        return (
            f"{self.kind} over {self.num_items:,} items, recall@{self.k} {self.recall:.4f} on {self.num_queries:,} requests "
            f"with {self.num_scored:,.0f} products each, built in {self.build_seconds:.1f} s{used}"
        )


class _Answer(NamedTuple):
    """What an index alone says."""

    best: Retrieved
    """Permitted items; row 0 where it found no more."""
    asked_B: Tensor
    """bool [B]: False for vectors that are no numbers, and where so much must be fetched that an exact search is as fast."""


def find_nearest(index: VectorIndex, user_Bd: Tensor, item_Nd: Tensor, k: int, blocked: Blocked) -> Nearest:
    """The k best permitted items per request by the index, exactly where it comes short.

    What a request gets does not depend on the others of the batch.

    Args:
        user_Bd: float32 [B, d]; requests whose vector is NaN or infinite are bad.
        item_Nd: float32 [n + 1, d], what the index was built over.
    """
    (rows_Bk, scores_Bk), _ = _ask(index, user_Bd, k, blocked)
    bad_B = ~torch.isfinite(user_Bd).all(1)
    short = ((rows_Bk == 0).any(1) & ~bad_B).nonzero()[:, 0]
    if len(short):
        excluded = None if blocked.excluded is None else blocked.excluded.select(short)
        exact = nearest(user_Bd[short], item_Nd, k, excluded, blocked.allowed)
        rows_Bk[short], scores_Bk[short], bad_B[short] = exact.best.rows, exact.best.scores, exact.bad_B
    return Nearest(Retrieved(rows_Bk, scores_Bk), bad_B)


def _ask(index: VectorIndex, user_Bd: Tensor, k: int, blocked: Blocked) -> _Answer:
    """What the index alone finds; requests that fetch alike are searched together."""
    device = user_Bd.device
    rows_Bk = torch.zeros(len(user_Bd), k, dtype=torch.int64, device=device)
    scores_Bk = torch.full((len(user_Bd), k), -torch.inf, device=device)
    width_B = _width(blocked, k, len(user_Bd), device)
    asked_B = torch.isfinite(user_Bd).all(1) & (width_B <= blocked.num_items * EXACT_SHARE)
    for width in width_B[asked_B].unique().tolist():  # powers of two: a handful
        group = ((width_B == width) & asked_B).nonzero()[:, 0]
        rows_GW, scores_GW = index.search(user_Bd[group], width)
        fine_GW = blocked.permits(group[:, None].expand_as(rows_GW), rows_GW)
        column_Gk = (~fine_GW).long().argsort(dim=1, stable=True)[:, :k]
        rows_Bk[group, : column_Gk.shape[1]] = rows_GW.masked_fill(~fine_GW, 0).gather(1, column_Gk)
        scores_Bk[group, : column_Gk.shape[1]] = scores_GW.masked_fill(~fine_GW, -torch.inf).gather(1, column_Gk)
    return _Answer(Retrieved(rows_Bk, scores_Bk), asked_B)


def _width(blocked: Blocked, k: int, num_requests: int, device: torch.device) -> Tensor:
    """int64 [B]: items to fetch so that k are likely to be left, a power of two."""
    wanted_B = torch.full((num_requests,), float(k), device=device)
    if blocked.excluded is not None:
        wanted_B += blocked.excluded.lengths.clamp(max=MOST_EXTRA)
    if blocked.allowed is not None:
        wanted_B /= blocked.allowed[1:].float().mean().clamp(min=1.0 / max(blocked.num_items, 1))
    return wanted_B.log2().ceil().exp2().long()


@torch.no_grad()
def build_indexes(
    cascade: Cascade, queries: Callable[[VectorRetriever, int], Iterator[Batch]], *, deterministic: bool = True
) -> tuple[dict[str, VectorIndex], dict[str, IndexReport]]:
    """An index for every vector retriever of the first stage that its settings give one, and a report of each by name.

    Args:
        queries: real requests in batches, at most so many, for a retriever.
        deterministic: build on one thread, which gives the same graph every time.

    Raises:
        ConfigError: an index finds too little and its settings refuse that, or a setting does not fit.
    """
    config = cascade.config
    made: dict[str, VectorIndex] = {}
    reports: dict[str, IndexReport] = {}
    for name in config.stages[0].systems:
        system, settings = cascade.systems[name], config.index_of(name)
        kind = settings.kind_for(cascade.space.num_items)
        if not isinstance(system, VectorRetriever) or kind is None:
            continue
        if not installed("faiss"):
            LOG.warning("%s: %s", name, MISSING)
            continue
        item_Nd = system.item_matrix()
        began = time.perf_counter()
        index = VectorIndex.build(kind, item_Nd, settings, num_threads=1 if deterministic else None)
        seconds = time.perf_counter() - began
        k = max(a.keep or config.surface.k for a in config.stages[0].actions if name in a.systems)
        asked: list[Query] = [
            (system.encode_user(batch), Blocked(cascade.space.num_items, batch.excluded))
            for batch in queries(system, settings.queries)
        ]
        recall = _settle(index, item_Nd, asked, min(k, index.num_items), settings)
        in_use = _accept(name, kind, recall.found, settings)
        reports[name] = IndexReport(
            kind=kind,
            in_use=in_use,
            num_items=index.num_items,
            k=k,
            recall=recall.found,
            exact_share=recall.exact_share,
            num_queries=sum(len(user_Bd) for user_Bd, _ in asked),
            effort=index.effort,
            num_scored=index.num_scored,
            build_seconds=round(seconds, 3),
        )
        if in_use:
            made[name] = index
    return made, reports


class Recall(NamedTuple):
    """How well an index stands in for an exact search."""

    found: float
    """Share of the k items of an exact search that the index alone finds, mean over the requests that it is asked for; 1 where none."""
    exact_share: float
    """Share of requests that are searched exactly: not asked of the index, or left short by it."""


def recall_of(
    index: VectorIndex, item_Nd: Tensor, queries: Sequence[Query], k: int, exact: Sequence[Tensor] | None = None
) -> Recall:
    """Compare the index with an exact search.

    Args:
        queries: user vectors [B, d] and what is blocked, batch by batch.
        exact: rows [B, k] of the exact search, where they are at hand.
    """
    shares, exactly = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0)]
    for number, (user_Bd, blocked) in enumerate(queries):
        truth_Bk = exact[number] if exact else _exact(user_Bd, item_Nd, k, blocked)
        (rows_Bk, _), asked_B = _ask(index, user_Bd, k, blocked)
        truth, found = (Jagged.from_padded(rows, rows > 0) for rows in (truth_Bk, rows_Bk))
        hits_B = segment_sum(contained(truth, found).double(), truth.row_of_value, truth.num_rows)
        counts_B = asked_B & (truth.lengths > 0)
        shares.append((hits_B / truth.lengths.clamp(min=1))[counts_B].cpu())
        exactly.append((~asked_B | (rows_Bk == 0).any(1)).float().cpu())
    share, is_exact = torch.cat(shares), torch.cat(exactly)
    return Recall(float(share.mean()) if len(share) else 1.0, float(is_exact.mean()) if len(is_exact) else 0.0)


def _exact(user_Bd: Tensor, item_Nd: Tensor, k: int, blocked: Blocked) -> Tensor:
    return nearest(user_Bd, item_Nd, k, blocked.excluded, blocked.allowed).best.rows


def _settle(index: VectorIndex, item_Nd: Tensor, queries: Sequence[Query], k: int, settings: IndexConfig) -> Recall:
    """Set the index to the smallest effort (a power of two) that reaches the wanted recall; gives the recall reached."""
    exact = [_exact(user_Bd, item_Nd, k, blocked) for user_Bd, blocked in queries]
    if settings.effort is None:
        index.effort = 1 if index.kind == "ivf" else 16
    recall = recall_of(index, item_Nd, queries, k, exact)
    while settings.effort is None and recall.found < settings.recall and index.effort < index.most_effort:
        index.effort = min(2 * index.effort, index.most_effort)
        recall = recall_of(index, item_Nd, queries, k, exact)
    if queries:
        index.measure_cost(torch.cat([user_Bd for user_Bd, _ in queries]), k)
        index.num_scored += recall.exact_share * index.num_items
    return recall


def _accept(name: str, kind: str, recall: float, settings: IndexConfig) -> bool:
    """Whether the index is used; says so where it finds less than wanted, or raises where that is refused."""
    if recall >= settings.recall:
        return True
    problem = f"the {kind} index of {name} finds {recall:.3f} of what an exact search finds, wanted {settings.recall}"
    if settings.when_short == "refuse":
        raise ConfigError(
            f"{problem}; raise index.build_effort or index.effort, lower index.recall, or set index.kind=exact"
        )
    in_use = settings.when_short == "warn"
    LOG.warning("%s; %s", problem, "it is used all the same" if in_use else "every item is searched")
    return in_use


def still_valid(cascade: Cascade, systems: Mapping[str, System]) -> dict[str, VectorIndex]:
    """The indexes of a cascade that also serve other systems: those of the same object, not counted again."""
    return {name: index for name, index in cascade.indexes.items() if systems[name] is cascade.systems[name]}


def save_indexes(folder: Path, indexes: Mapping[str, VectorIndex]) -> None:
    """Write FOLDER/indexes/NAME.faiss and indexes.json; nothing where there is none."""
    if not indexes:
        return
    about = {}
    for name, index in indexes.items():
        index.save(folder / FOLDER / f"{name}.faiss")
        about[name] = {
            "kind": index.kind,
            "num_items": index.num_items,
            "dim": index.dim,
            "num_scored": index.num_scored,
        }
    (folder / FOLDER / ABOUT).write_text(json.dumps(about, indent=1) + "\n")


def load_indexes(folder: Path) -> dict[str, VectorIndex]:
    """What `save_indexes` wrote; none, and a line that says so, where FAISS is missing. SnapshotError names a damaged file."""
    path = folder / FOLDER / ABOUT
    if not path.exists():
        return {}
    if not installed("faiss"):
        LOG.warning("%s: %s", folder, MISSING)
        return {}
    indexes = {}
    about = read_json(path, remedy=REMEDY)
    try:
        for name, facts in about.items():
            indexes[name] = VectorIndex.load(
                folder / FOLDER / f"{name}.faiss",
                kind=facts["kind"],
                num_items=facts["num_items"],
                dim=facts["dim"],
                num_scored=facts["num_scored"],
            )
    except ShortlistError:
        raise
    except (KeyError, TypeError, AttributeError) as error:
        raise SnapshotError(f"{path} is damaged ({error}); {REMEDY}") from error
    return indexes
