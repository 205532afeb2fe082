"""Every user's page as one Parquet file: user_id, rank (1 = on top), item_id, score of the last stage (missing where an item only
fills the page).

Pages are made part by part in `OUT.parts`, so that an export that was stopped goes on; the file appears when all is done.
B users of a chunk, k items of a page.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from shortlist.cascade.exports import people
from shortlist.cascade.lessons import chunks
from shortlist.cascade.run import Run
from shortlist.errors import ConfigError

PART = 8192
"""Users of a part: what a stopped export loses at most."""
ABOUT = "about.json"


def export_pages(
    run: Run,
    out: Path,
    *,
    users: pl.Series | None = None,
    k: int | None = None,
    say: Callable[[str], None] = lambda line: None,
    part_size: int = PART,
) -> dict[str, Any]:
    """Write the pages as of the end of the log, by the run's default chain; gives counts and seconds.

    Args:
        out: the Parquet file; an earlier one is replaced when the new one is complete.
        users: ids; None = all that the run knows. Unknown ones are people without a past.
        k: items of a page; None = as the surface says.
        say: progress.
        part_size: users of a part.

    Raises ConfigError where `out` is a folder or k is out of range.
    """
    began = time.perf_counter()
    k = run.config.surface.k if k is None else k
    if k < 1:
        raise ConfigError(f"k must be at least 1, got {k}")
    if out.is_dir():
        raise ConfigError(f"{out} is a folder; name a Parquet file to write the pages to")
    ids = (run.dataset.user_ids.ids if users is None else users).alias("user_id")
    parts = _parts_folder(out, {"run": run.version, "k": k, "part": part_size, "users": _digest(ids)})
    degraded: list[str] = []
    starts = range(0, len(ids), part_size)
    for number, start in enumerate(starts):
        path = parts / f"{number:06}.parquet"
        if not path.exists():
            table, problems = _pages(run, ids[start : start + part_size], k)
            degraded += problems
            table.write_parquet(path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)
        done = min(start + part_size, len(ids))
        say(f"{done:,} of {len(ids):,} users, {time.perf_counter() - began:.1f} s")
    whole = parts / "whole"
    pl.scan_parquet([parts / f"{number:06}.parquet" for number in range(len(starts))]).sink_parquet(whole)
    num_rows = pl.scan_parquet(whole).select(pl.len()).collect().item()
    whole.replace(out)
    shutil.rmtree(parts, ignore_errors=True)
    return {
        "what": "pages",
        "run": run.version,
        "num_users": len(ids),
        "num_unknown_users": int((run.dataset.user_ids.encode(ids) == 0).sum()),
        "num_rows": num_rows,
        "k": k,
        "degraded": sorted(set(degraded)),
        "seconds": round(time.perf_counter() - began, 2),
    }


def _pages(run: Run, ids: pl.Series, k: int) -> tuple[pl.DataFrame, list[str]]:
    """Pages of some users, and what went wrong on the way."""
    tables, problems = [], []
    wish = run.config.surface.repeats
    repeats = run.dataset.repeats if wish == "auto" else wish == "yes"
    for index in chunks(len(ids), run.dataset.num_items):
        batch, _ = people(run, ids[index], max_history=run.cascade.max_history, exclude_history=not repeats)
        page = run.cascade.run(batch.to(run.cascade.device), k=k)
        problems += [f"{trace.name}: {problem.reason}" for trace in page.traces for problem in trace.problems]
        row_Bk, score_Bk = page.rows.cpu().numpy(), page.scores.cpu().numpy()
        request, place = np.nonzero(row_Bk)
        score = pl.Series("score", score_Bk[request, place], dtype=pl.Float32)
        tables.append(
            pl.DataFrame(
                {
                    "user_id": ids[index].gather(request),
                    "rank": pl.Series(place + 1, dtype=pl.Int32),
                    "item_id": run.dataset.item_ids.ids.gather(row_Bk[request, place] - 1),
                    "score": score.set(~score.is_finite(), None),
                }
            )
        )
    return pl.concat(tables), problems


def _parts_folder(out: Path, about: dict[str, Any]) -> Path:
    """Where the parts go: with those of the same export that was stopped, else empty."""
    parts = out.absolute().with_name(f"{out.name}.parts")
    text = json.dumps(about)
    if not (parts / ABOUT).exists() or (parts / ABOUT).read_text() != text:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        (parts / ABOUT).write_text(text)
    return parts


def _digest(ids: pl.Series) -> str:
    """Changes with any id or their order."""
    import hashlib

    return hashlib.sha256("\n".join(map(str, ids.to_list())).encode()).hexdigest()[:16]
