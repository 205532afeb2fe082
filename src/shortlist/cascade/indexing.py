"""Indexes at work in a cascade: built over its vector retrievers, measured against exact search, and asked in its place.

An index knows nothing of who may see what. So it is asked for more than wanted, what is blocked falls out, and a request that then
comes short is searched exactly: exclusions and `allowed` hold as ever, and a page is full whenever the catalogue has enough.

B requests, n items (row 0 = no item), d width of a vector, k items wanted.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shortlist.cascade.candidates import Blocked, contained
from shortlist.data.jagged import Jagged, segment_sum
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
    """Share of the k items of an exact search that are found, mean over requests."""
    num_queries: int
    """Validation requests on which that was measured, with their exclusions."""
    effort: int
    """Items (hnsw) or lists (ivf) that a search looks into."""
    num_scored: float
    """Products that a search computes per request; an exact one computes num_items."""
    build_seconds: float
    """Wall time of building, without measuring."""


def find_nearest(index: VectorIndex, user_Bd: Tensor, item_Nd: Tensor, k: int, blocked: Blocked) -> Nearest:
    """The k best permitted items per request by the index, exactly where it comes short.

    What a request gets does not depend on the others of the batch.

    Args:
        user_Bd: float32 [B, d]; requests whose vector is NaN or infinite are bad.
        item_Nd: float32 [n + 1, d], what the index was built over.
    """
    bad_B = ~torch.isfinite(user_Bd).all(1)
    rows_Bk = torch.zeros(len(user_Bd), k, dtype=torch.int64, device=user_Bd.device)
    scores_Bk = torch.full((len(user_Bd), k), -torch.inf, device=user_Bd.device)
    width_B = _width(blocked, k, len(user_Bd), user_Bd.device)
    for width in width_B.unique().tolist():  # powers of two: a handful
        group = ((width_B == width) & ~bad_B).nonzero()[:, 0]
        if width > blocked.num_items * EXACT_SHARE or not len(group):
            continue
        found = index.search(user_Bd[group], width)
        fine_GW = blocked.permits(group[:, None].expand_as(found.rows), found.rows)
        best = Retrieved(found.rows, found.scores.masked_fill(~fine_GW, -torch.inf))
        column_Gk = (~fine_GW).long().argsort(dim=1, stable=True)[:, :k]
        rows_Bk[group, : column_Gk.shape[1]] = best.rows.masked_fill(~fine_GW, 0).gather(1, column_Gk)
        scores_Bk[group, : column_Gk.shape[1]] = best.scores.gather(1, column_Gk)
    short = ((rows_Bk == 0).any(1) & ~bad_B).nonzero()[:, 0]
    if len(short):
        excluded = None if blocked.excluded is None else blocked.excluded.select(short)
        exact = nearest(user_Bd[short], item_Nd, k, excluded, blocked.allowed)
        rows_Bk[short], scores_Bk[short], bad_B[short] = exact.best.rows, exact.best.scores, exact.bad_B
    return Nearest(Retrieved(rows_Bk, scores_Bk), bad_B)


def _width(blocked: Blocked, k: int, num_requests: int, device: torch.device) -> Tensor:
    """int64 [B]: items to fetch so that k are likely to be left, a power of two."""
    wanted_B = torch.full((num_requests,), float(k), device=device)
    if blocked.excluded is not None:
        wanted_B += blocked.excluded.lengths.clamp(max=MOST_EXTRA)
    if blocked.allowed is not None:
        wanted_B /= blocked.allowed[1:].float().mean().clamp(min=1.0 / max(blocked.num_items, 1))
    return wanted_B.log2().ceil().exp2().long()


def build_indexes(
    cascade: Cascade, queries: Callable[[VectorRetriever, int], Iterator[Batch]], *, deterministic: bool = True
) -> tuple[dict[str, VectorIndex], dict[str, dict[str, Any]]]:
    """An index for every vector retriever of the first stage that its settings give one, and a report of each by name.

    Args:
        queries: real requests in batches, at most so many, for a retriever.
        deterministic: build on one thread, which gives the same graph every time.

    Raises:
        ConfigError: an index finds too little and its settings refuse that, or a setting does not fit.
    """
    config, made, reports = cascade.config, {}, {}
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
        asked = [
            (system.encode_user(batch), Blocked(cascade.space.num_items, batch.excluded))
            for batch in queries(system, settings.queries)
        ]
        recall = _settle(index, item_Nd, asked, min(k, index.num_items), settings)
        in_use = _accept(name, recall, settings)
        reports[name] = asdict(
            IndexReport(
                kind=kind,
                in_use=in_use,
                num_items=index.num_items,
                k=k,
                recall=recall,
                num_queries=sum(len(user_Bd) for user_Bd, _ in asked),
                effort=index.effort,
                num_scored=index.num_scored,
                build_seconds=round(seconds, 3),
            )
        )
        if in_use:
            made[name] = index
    return made, reports


def recall_of(
    index: VectorIndex, item_Nd: Tensor, asked: list[tuple[Tensor, Blocked]], k: int, exact: list[Tensor] | None = None
) -> float:
    """Share of the k items of an exact search that the index finds, mean over requests; 1 where there is nothing to find.

    Args:
        asked: user vectors [B, d] and what is blocked, batch by batch.
        exact: rows [B, k] of the exact search, where they are at hand.
    """
    shares = []
    for number, (user_Bd, blocked) in enumerate(asked):
        truth_Bk = exact[number] if exact else _exact(user_Bd, item_Nd, k, blocked)
        found_Bk = find_nearest(index, user_Bd, item_Nd, k, blocked).best.rows
        truth, found = (Jagged.from_padded(rows_Bk, rows_Bk > 0) for rows_Bk in (truth_Bk, found_Bk))
        hits_B = segment_sum(contained(truth, found).double(), truth.row_of_value, truth.num_rows)
        shares.append(torch.where(truth.lengths > 0, hits_B / truth.lengths.clamp(min=1), 1.0))
    return float(torch.cat(shares).mean()) if shares else 1.0


def _exact(user_Bd: Tensor, item_Nd: Tensor, k: int, blocked: Blocked) -> Tensor:
    return nearest(user_Bd, item_Nd, k, blocked.excluded, blocked.allowed).best.rows


def _settle(
    index: VectorIndex, item_Nd: Tensor, asked: list[tuple[Tensor, Blocked]], k: int, settings: IndexConfig
) -> float:
    """Set the index to the smallest effort (a power of two) that reaches the wanted recall; gives the recall reached."""
    exact = [_exact(user_Bd, item_Nd, k, blocked) for user_Bd, blocked in asked]
    if settings.effort is None:
        index.effort = 1 if index.kind == "ivf" else 16
    recall = recall_of(index, item_Nd, asked, k, exact)
    while settings.effort is None and recall < settings.recall and index.effort < index.most_effort:
        index.effort = min(2 * index.effort, index.most_effort)
        recall = recall_of(index, item_Nd, asked, k, exact)
    if asked:
        index.measure_cost(torch.cat([user_Bd for user_Bd, _ in asked]), k)
    return recall


def _accept(name: str, recall: float, settings: IndexConfig) -> bool:
    """Whether the index is used; says so where it finds less than wanted, or raises where that is refused."""
    if recall >= settings.recall:
        return True
    problem = f"the {settings.kind} index of {name} finds {recall:.3f} of what an exact search finds, wanted {settings.recall}"
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
    try:
        for name, facts in json.loads(path.read_text()).items():
            indexes[name] = VectorIndex.load(
                folder / FOLDER / f"{name}.faiss",
                kind=facts["kind"],
                num_items=facts["num_items"],
                dim=facts["dim"],
                num_scored=facts["num_scored"],
            )
    except ShortlistError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SnapshotError(f"{path} is missing or damaged ({error}); {REMEDY}") from error
    return indexes
