"""Pages drawn at random by a variant that explores, as rows for off-policy estimates: what stood where, its chance, and was it taken.

rows = drawn_rows(read_exposures(LOG, NAME), events, hours=24)
snips(logged_rows(rows, target))          target [N]: chance of each row under the policy that is asked about
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import polars as pl

from shortlist.cascade.exposures import Exposure
from shortlist.errors import DataError
from shortlist.evaluation.experiments import page_table, taken
from shortlist.metrics._arrays import Array
from shortlist.metrics.off_policy import Logged, logged

_HOUR_MS = 3_600_000


def drawn_rows(
    exposures: Iterable[Exposure], events: pl.DataFrame, *, hours: float = 24.0, actions: Sequence[str] = ()
) -> pl.DataFrame:
    """A row per place of every page with chances: request_id, unit, place (from 0), item, chance, reward.

    Args:
        exposures: of experiments whose variants explore; pages without chances are left out.
        events: as `evaluation.experiments.read_events` gives them.
        hours: after a page, in which an event with one of its items makes the reward 1.
        actions: kinds of event that count; empty = all.

    Raises DataError where no page has chances.
    """
    drawn = [exposure for exposure in exposures if exposure.chances]
    if not drawn:
        raise DataError("no page of this log was drawn with known chances; give a variant `explore` and wait for pages")
    pages = page_table(drawn)
    if actions:
        events = events.filter(pl.col("action").is_in(list(actions)))
    hits = taken(pages, events, within_ms=round(hours * _HOUR_MS)).select("number", "item", reward=pl.lit(1.0))
    return (
        pages.with_columns(request_id=pl.Series([exposure.request_id for exposure in drawn], dtype=pl.String))
        .with_columns(place=pl.int_ranges(0, pl.col("items").list.len()))
        .select("number", "request_id", "unit", "place", item="items", chance="chances")
        .explode("place", "item", "chance")
        .join(hits, on=["number", "item"], how="left", maintain_order="left")
        .with_columns(pl.col("reward").fill_null(0.0))
        .drop("number")
    )


def logged_rows(rows: pl.DataFrame, target: Array) -> Logged:
    """Rows for the estimators of `metrics.off_policy`, clustered by unit; `target` [N] is each row's chance under the other policy."""
    return logged(
        rows["reward"].to_numpy(),
        rows["chance"].to_numpy(),
        target,
        requests=np.asarray(rows["request_id"].to_list()),
        places=rows["place"].to_numpy().astype(np.int64),
        users=np.asarray(rows["unit"].to_list()),
    )
