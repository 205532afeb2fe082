"""Search among item vectors by FAISS, for catalogues where a product with every item takes too long.

    hnsw   a graph of near items that a search walks (Malkov and Yashunin, TPAMI 2020)
    ivf    items in lists around k-means centres, of which a search reads the nearest (Jégou, Douze and Schmid, TPAMI 2011)
    flat   every item, as the plain product; to compare with

All three compare by inner product. The library is imported when an index is built or read, and runs on as many threads as torch does.
B requests, n items (row 0 = no item, not in the index), d width of a vector, K items asked for.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from shortlist.errors import ConfigError, SnapshotError
from shortlist.extras import library
from shortlist.models.base import Retrieved
from shortlist.store.snapshot import REMEDY

Kind = Literal["flat", "hnsw", "ivf"]
POINTS_PER_CENTRE = 64
"""Items that k-means learns each centre from; more take longer and move the centres little."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexConfig:
    """How vector retrievers search the catalogue."""

    kind: Literal["auto", "exact", "flat", "hnsw", "ivf"] = "auto"
    """exact = a product with every item; flat, hnsw, ivf = a FAISS index; auto = exact below `min_items`, from there on ivf."""
    min_items: int = 200_000
    """Size of the catalogue from which auto makes an index."""
    recall: float = 0.95
    """Share of what an exact search finds that the index must find, on validation requests: its effort is raised until it does."""
    when_short: Literal["exact", "warn", "refuse"] = "exact"
    """What happens where no effort is enough: search exactly, use the index and say so, or stop with an error."""
    effort: int | None = None
    """Items (hnsw) or lists (ivf) that a search looks into; none = the smallest power of two that reaches `recall`."""
    links: int = 32
    """hnsw: links per item and layer."""
    build_effort: int = 40
    """hnsw: items looked into to place one."""
    lists: int | None = None
    """ivf: number of lists; none = four times the square root of the number of items."""
    queries: int = 500
    """Validation requests at most on which recall is measured."""

    def __post_init__(self) -> None:
        for name in ("min_items", "effort", "links", "build_effort", "lists", "queries"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.links < 2:
            raise ConfigError(f"links must be at least 2, got {self.links}")
        if not 0 < self.recall <= 1:
            raise ConfigError(f"recall must be above 0 and at most 1, got {self.recall}")

    def kind_for(self, num_items: int) -> Kind | None:
        """The index that a catalogue of this size gets; None = it is searched exactly."""
        if self.kind == "auto":
            return "ivf" if num_items >= self.min_items else None
        return None if self.kind == "exact" else self.kind


class VectorIndex:
    """An index over item vectors, ready to be searched. Make one by `build` or `load`.

    Attributes:
        kind: what it is.
        num_scored: products that one search computes, on average; measured where recall is.
    """

    def __init__(self, index: Any, kind: Kind, num_scored: float) -> None:
        self._index, self.kind, self.num_scored = index, kind, num_scored

    @classmethod
    def build(cls, kind: Kind, item_Nd: Tensor, config: IndexConfig, *, num_threads: int | None = None) -> VectorIndex:
        """An index over float32 [n + 1, d], row 0 left out.

        Args:
            num_threads: None = as many as torch uses. On more than one thread a hnsw graph is not the same twice.

        Raises ConfigError where FAISS is missing or a vector holds NaN or infinity.
        """
        if not bool(torch.isfinite(item_Nd).all()):
            raise ConfigError(f"no {kind} index can be built: an item vector is NaN or infinite; search exactly")
        faiss = _faiss(num_threads)
        item_nd = _numpy(item_Nd[1:])
        num_items, dim = item_nd.shape
        match kind:
            case "flat":
                index = faiss.IndexFlatIP(dim)
            case "hnsw":
                index = faiss.IndexHNSWFlat(dim, config.links, faiss.METRIC_INNER_PRODUCT)
                index.hnsw.efConstruction = config.build_effort
            case "ivf":
                lists = min(config.lists or round(4 * math.sqrt(num_items)), num_items)
                index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
                index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, POINTS_PER_CENTRE
                index.train(item_nd)
        index.add(item_nd)
        built = cls(index, kind, float(num_items))
        if config.effort is not None:
            built.effort = config.effort
        return built

    @property
    def num_items(self) -> int:
        """Items in it."""
        return int(self._index.ntotal)

    @property
    def dim(self) -> int:
        """Width of a vector."""
        return int(self._index.d)

    @property
    def most_effort(self) -> int:
        """Effort beyond which it is no faster than an exact search: a walk jumps through memory, a product reads it in order."""
        match self.kind:
            case "hnsw":
                return max(64, self.num_items // 64)
            case "ivf":
                return int(self._index.nlist)
        return 1

    @property
    def effort(self) -> int:
        """Items (hnsw) or lists (ivf) that a search looks into."""
        match self.kind:
            case "hnsw":
                return int(self._index.hnsw.efSearch)
            case "ivf":
                return int(self._index.nprobe)
        return 1

    @effort.setter
    def effort(self, value: int) -> None:
        if self.kind == "hnsw":
            self._index.hnsw.efSearch = value
        elif self.kind == "ivf":
            self._index.nprobe = min(value, int(self._index.nlist))

    def search(self, user_Bd: Tensor, count: int) -> Retrieved:
        """The K = min(count, n) items with the highest products that it finds, best first; row 0 and -inf where it finds fewer.

        Args:
            user_Bd: finite float32 [B, d], on any device.
        """
        _faiss(None)
        score_BK, place_BK = self._index.search(_numpy(user_Bd), min(count, self.num_items))
        rows_BK = torch.from_numpy(place_BK + 1)
        scores_BK = torch.from_numpy(score_BK).masked_fill_(rows_BK == 0, -torch.inf)
        return Retrieved(rows_BK.to(user_Bd.device), scores_BK.to(user_Bd.device))

    def measure_cost(self, user_Bd: Tensor, count: int) -> float:
        """Products per request of such a search; kept as `num_scored`. Nothing else may search meanwhile."""
        faiss = _faiss(None)
        match self.kind:
            case "hnsw":
                stats, fixed = faiss.cvar.hnsw_stats, 0
            case "ivf":
                stats, fixed = faiss.cvar.indexIVF_stats, int(self._index.nlist)
            case _:
                self.num_scored = float(self.num_items)
                return self.num_scored
        stats.reset()
        self.search(user_Bd, count)
        self.num_scored = stats.ndis / max(len(user_Bd), 1) + fixed
        return self.num_scored

    def save(self, path: Path) -> None:
        """Write as one file of FAISS's own format."""
        path.parent.mkdir(parents=True, exist_ok=True)
        _faiss(None).write_index(self._index, os.fspath(path))

    @classmethod
    def load(cls, path: Path, *, kind: str, num_items: int, dim: int, num_scored: float) -> VectorIndex:
        """Read what `save` wrote; vectors stay in the file and are mapped into memory.

        Args:
            kind, num_items, dim, num_scored: what it must be.

        Raises:
            SnapshotError: missing, damaged or another index; names the file. ConfigError: FAISS is missing.
        """
        faiss = _faiss(None)
        types = {"flat": faiss.IndexFlat, "hnsw": faiss.IndexHNSWFlat, "ivf": faiss.IndexIVFFlat}
        try:
            index = faiss.read_index(os.fspath(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        except (RuntimeError, MemoryError) as error:
            raise SnapshotError(
                f"{path} is missing or no index that can be read ({_short(error)}); {REMEDY}"
            ) from error
        found = next((name for name, of in types.items() if isinstance(index, of)), type(index).__name__)
        if kind not in get_args(Kind) or (found, index.ntotal, index.d) != (kind, num_items, dim):
            raise SnapshotError(
                f"{path} holds a {found} index of {index.ntotal:,} vectors of width {index.d} where a {kind} index of "
                f"{num_items:,} of width {dim} belongs; {REMEDY}"
            )
        return cls(index, kind, num_scored)  # type: ignore[arg-type]  # one of Kind, as just checked


def _faiss(num_threads: int | None) -> Any:
    """The library, set to as many threads as torch uses in this thread."""
    faiss = library("faiss", extra="ann", user="an index of item vectors")
    faiss.omp_set_num_threads(torch.get_num_threads() if num_threads is None else num_threads)
    return faiss


def _numpy(vectors: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.ascontiguousarray(vectors.detach().cpu().numpy(), dtype=np.float32)


def _short(error: BaseException) -> str:
    """The reason at the end of FAISS's message, which begins with its source file."""
    return str(error).strip().rpartition("Error: ")[2] or type(error).__name__
