"""Pages of many people as one Parquet file, as the engine answers them now: with newer events, rules, and what was told of items.

user_id, rank (1 = on top), item_id, title (where the run has titles), score of the last stage (missing where an item only fills the page).
Made part by part, so that memory does not grow with the number of people; the file appears when it is whole.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from shortlist.cascade.answers import Answer
from shortlist.cascade.engine import Engine
from shortlist.cascade.rules import Rules
from shortlist.errors import ConfigError

PART = 8_192
"""People of a part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What was written."""

    out: str
    num_users: int
    num_unknown_users: int
    """People without a past: not in the run, or forgotten."""
    num_rows: int
    num_short: int
    """Pages with fewer items than asked for."""
    degraded: tuple[str, ...]
    """What went wrong, each once."""


def write_pages(
    engine: Engine,
    users: pl.Series,
    out: Path,
    *,
    k: int | None = None,
    rules: Rules | None = None,
    say: Callable[[str], None] = lambda line: None,
    part_size: int = PART,
) -> Written:
    """Answer everybody and write the pages.

    Args:
        users: ids, known or not; whole numbers or text.
        out: the Parquet file; an earlier one is replaced when the new one is whole.
        k: items of a page; None = as the surface says.
        rules: over the surface's.
        say: progress.
        part_size: people of a part.

    Raises ConfigError where `out` can not be written, k is out of range or the run's items can not follow the rules.
    """
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ConfigError(f"{out} can not be written; name a Parquet file in a folder that is there")
    k = engine.live.cascade.config.surface.k if k is None else k
    num_rows = num_short = 0
    degraded: dict[str, None] = {}
    parts = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    try:
        for number, start in enumerate(range(0, max(len(users), 1), part_size)):
            ids = users[start : start + part_size]
            answers = engine.recommend_many(ids.to_list(), k, rules=rules)
            table = _table(engine, ids, answers)
            table.write_parquet(parts / f"{number:06}.parquet")
            num_rows += table.height
            num_short += sum(len(answer.items) < k for answer in answers)
            degraded.update(dict.fromkeys(answer.degraded for answer in answers if answer.degraded))
            say(f"{start + len(ids):,} of {len(users):,} users")
        pl.scan_parquet(parts / "*.parquet").sink_parquet(parts / "whole")
        (parts / "whole").replace(out)
    finally:
        shutil.rmtree(parts, ignore_errors=True)
    return Written(
        out=str(out),
        num_users=len(users),
        num_unknown_users=int((engine.live.users(users.to_list()) == 0).sum()),
        num_rows=num_rows,
        num_short=num_short,
        degraded=tuple(degraded),
    )


def _table(engine: Engine, users: pl.Series, answers: Sequence[Answer]) -> pl.DataFrame:
    """A row per place of a page."""
    items = [item for answer in answers for item in answer.items]
    lengths = [len(answer.items) for answer in answers]
    owner = pl.Series([i for i, length in enumerate(lengths) for _ in range(length)], dtype=pl.UInt32)
    columns = {
        "user_id": users.gather(owner),
        "rank": pl.Series([rank for length in lengths for rank in range(1, length + 1)], dtype=pl.Int32),
        "item_id": pl.Series([item.item_id for item in items], dtype=engine.live.dataset.item_ids.ids.dtype),
    }
    if engine.live.dataset.titles is not None:
        columns["title"] = pl.Series([item.title for item in items], dtype=pl.String)
    columns["score"] = pl.Series([item.score for item in items], dtype=pl.Float32)
    return pl.DataFrame(columns)
