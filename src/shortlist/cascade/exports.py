"""What the exports of a run for other tools share, and the first of them: vectors.

    OUT/export.json        what is in the folder, from which run, and how it was checked
    OUT/items.npy          float32 [n, d], line r - 1 = catalogue row r; items.parquet has row and item_id
    OUT/items.faiss        an exact inner-product index whose ids are catalogue rows
    OUT/users.npy          float32 [U, d] of the users asked for, and users.parquet (row, user_id, num_history)

n items, d width of a vector, U users, B requests, k results.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from shortlist.cascade.lessons import chunks, sample
from shortlist.cascade.run import Run
from shortlist.data.batches import Batch, request_batch
from shortlist.errors import ConfigError, DataError, ShortlistError, SnapshotError
from shortlist.extras import library
from shortlist.models.base import System, VectorRetriever
from shortlist.store.snapshot import write_snapshot

ABOUT = "export.json"
CHECKED_REQUESTS = 256
"""Validation requests at most on which an export is compared with the run."""
CHECKED_PLACES = 50
TOLERANCE = 1e-4
"""Largest difference of a score from the run's own, relative to the score where that is above 1."""


class ExportDiffers(ShortlistError):
    """What was exported does not give what the run gives; nothing was written."""


def write_export(out: Path, run: Run, what: str, write: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    """Let `write` fill a new folder, add export.json of what it returns, and put it in the place of `out`.

    Raises SnapshotError where `out` holds anything but an earlier export; when `write` raises, nothing has changed.
    """
    out = Path(out)
    if out.is_dir() and any(out.iterdir()) and not (out / ABOUT).exists():
        raise SnapshotError(f"{out} exists and is not an export; choose another folder or remove it yourself")
    about: dict[str, Any] = {}

    def fill(beside: Path) -> None:
        about.update({"what": what, "run": run.version, **write(beside)})
        (beside / ABOUT).write_text(json.dumps(about, indent=1) + "\n")

    write_snapshot(out, fill)
    return about


def chosen(run: Run, name: str | None, kind: type, what: str) -> tuple[str, System]:
    """The system of that name, or the only one of the kind; ConfigError says which there are."""
    able = [n for n, system in run.cascade.systems.items() if isinstance(system, kind)]
    if name is None and len(able) == 1:
        name = able[0]
    if name in able:
        return name, run.cascade.systems[name]
    there = f"; this run has {', '.join(able)}" if able else "; this run has none"
    if name is None:
        raise ConfigError(f"{what} are exported from one {kind.__name__}: name it with --system{there}")
    if name not in run.cascade.systems:
        raise ConfigError(f"this run has no system {name!r}{there} that can be exported")
    found = type(run.cascade.systems[name]).__name__
    raise ConfigError(f"{name} ({found}) is no {kind.__name__}, so no {what} can be exported of it{there}")


def differs(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference of two tensors of scores, relative to ours where that is above 1; 0 where there are none."""
    if not ours.numel():
        return 0.0
    return float(((ours - theirs).abs() / ours.abs().clamp(min=1)).nan_to_num(nan=torch.inf).max())


def validation_batch(run: Run, system: System, most: int = CHECKED_REQUESTS) -> Batch:
    """Validation requests without candidates or exclusions, for checks."""
    asked = sample(run.dataset.split.valid, most, seed=0)
    return request_batch(run.dataset.histories, run.dataset.users, asked, max_history=system.max_history)


def item_table(run: Run) -> pl.DataFrame:
    """row, from 1, and item_id of the whole catalogue."""
    ids = run.dataset.item_ids.ids
    return pl.DataFrame({"row": np.arange(1, len(ids) + 1), "item_id": ids})


def read_users(path: Path) -> pl.Series:
    """Ids of users from a table (Parquet or CSV with a column `user_id`, or a single column) or a text file, one id a line.

    Raises DataError: not readable, no such column, or no id.
    """
    try:
        if path.suffix == ".txt":
            ids = pl.Series("user_id", path.read_text().split("\n"), dtype=pl.String).str.strip_chars()
        else:
            table = pl.read_parquet(path) if path.suffix == ".parquet" else pl.read_csv(path)
            if "user_id" not in table.columns and table.width != 1:
                raise DataError(
                    f"{path} has no column user_id, but {', '.join(table.columns)}; rename the one of the users"
                )
            ids = table["user_id" if "user_id" in table.columns else table.columns[0]]
    except (OSError, UnicodeDecodeError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{path} is not readable as a list of users ({error}); give Parquet, CSV or text") from error
    if ids.dtype.is_integer():
        ids = ids.cast(pl.Int64)
    ids = ids.drop_nulls().unique(maintain_order=True)
    ids = ids.filter(ids != "") if ids.dtype == pl.String else ids
    if not len(ids):
        raise DataError(f"{path} names no user")
    return ids.alias("user_id")


@torch.no_grad()
def export_vectors(run: Run, out: Path, *, system: str | None = None, users: pl.Series | None = None) -> dict[str, Any]:
    """Write the vectors of a VectorRetriever, see the top of this file; gives what export.json says.

    Before the folder is put into place, FAISS's search is compared with `retrieve` on validation requests.

    Args:
        system: its name in the run; None = the only VectorRetriever.
        users: ids whose vectors are written too, as of the end of the log; unknown ones are people without a past.

    Raises ConfigError, ExportDiffers, SnapshotError.
    """
    name, model = chosen(run, system, VectorRetriever, "vectors")
    assert isinstance(model, VectorRetriever)
    faiss = library("faiss", extra="ann", user="the export of vectors")
    item_nd = np.ascontiguousarray(model.item_matrix()[1:].cpu().numpy(), dtype=np.float32)

    def write(folder: Path) -> dict[str, Any]:
        np.save(folder / "items.npy", item_nd, allow_pickle=False)
        table = item_table(run)
        table.write_parquet(folder / "items.parquet")
        row = table["row"].to_numpy()
        index = faiss.IndexIDMap2(faiss.IndexFlatIP(item_nd.shape[1]))
        index.add_with_ids(item_nd, row)
        faiss.write_index(index, str(folder / "items.faiss"))
        checked = _check_index(faiss.read_index(str(folder / "items.faiss")), run, model)
        about = {"system": name, "num_items": len(item_nd), "dim": item_nd.shape[1], "score": "inner product"}
        if users is not None:
            about["num_users"] = _write_users(run, model, users, folder)
        return {**about, "check": checked}

    return write_export(out, run, "vectors", write)


def _check_index(index: Any, run: Run, model: VectorRetriever) -> dict[str, float]:
    """FAISS beside `retrieve`: scores must agree at every place; rows may only differ between equals."""
    batch = validation_batch(run, model).to(model.space_device())
    k = min(CHECKED_PLACES, run.dataset.num_items)
    ours = model.retrieve(batch, k)
    scores, rows = index.search(np.ascontiguousarray(model.encode_user(batch).cpu().numpy()), k)
    difference = differs(ours.scores.cpu(), torch.from_numpy(scores))
    if difference > TOLERANCE:
        raise ExportDiffers(
            f"FAISS's scores differ from the run's by up to {difference:.2g}; the vectors were not written"
        )
    same = float((ours.rows.cpu().numpy() == rows).mean())
    return {"requests": batch.size, "places": k, "max_difference": difference, "same_items": same}


def _write_users(run: Run, model: VectorRetriever, users: pl.Series, folder: Path) -> int:
    """users.npy and users.parquet; how many."""
    vectors: list[NDArray[np.float32]] = []
    lengths: list[NDArray[np.int64]] = []
    for index in chunks(len(users), run.dataset.num_items):
        batch, length = people(run, users[index], max_history=model.max_history)
        vectors.append(model.encode_user(batch.to(model.space_device())).cpu().numpy())
        lengths.append(length)
    np.save(folder / "users.npy", np.concatenate(vectors), allow_pickle=False)
    row = run.dataset.user_ids.encode(users)
    table = pl.DataFrame({"row": row, "user_id": users, "num_history": np.concatenate(lengths)})
    table.write_parquet(folder / "users.parquet")
    return len(users)


def people(
    run: Run, users: pl.Series, *, max_history: int, exclude_history: bool = False
) -> tuple[Batch, NDArray[np.int64]]:
    """Users as they are asked about at the end of the log, and the number of their past events [B]."""
    histories, requests = run.dataset.requests_for(
        users.to_list(), rows=run.dataset.user_ids.encode(users), at=run.dataset.plan.now["end"]
    )
    batch = request_batch(
        histories, run.dataset.users, requests, max_history=max_history, exclude_history=exclude_history
    )
    return batch, requests.end - requests.start
