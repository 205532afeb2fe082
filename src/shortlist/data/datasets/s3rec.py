"""Beauty, Toys and Yelp as sequences, in the form of the S3-Rec release (RUCAIBox/CIKM2020-S3Rec), with item attributes.

The release numbers items by first appearance: user 1 is "1 2 3 4 5", and "the previous id plus one" alone scores. So ids are
permuted on load with a fixed seed; `permuted_ids` gives the same map for other files of the release (attributes, negatives).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from shortlist.data.datasets._files import find, named, only, read_exactly
from shortlist.data.log import EventLog

_SEED = 20200818


def load_beauty(root: Path | None) -> EventLog:
    """198,502 events of 22,363 users on 12,101 items; times are days (release: order only). Events of one day are sorted by product."""
    return _load(root, "s3rec-beauty")


def load_toys(root: Path | None) -> EventLog:
    """167,597 events of 19,412 users on 11,924 items; order only."""
    return _load(root, "s3rec-toys")


def load_yelp(root: Path | None) -> EventLog:
    """316,354 events of 30,431 users on 20,033 places, 2019; repeats occur (release: order only)."""
    return _load(root, "s3rec-yelp")


def permuted_ids(num_items: int) -> NDArray[np.int64]:
    """int64 [num_items + 1]: the id under which item i of the release (1..num_items) is loaded; 0 stays 0."""
    shuffled = np.random.default_rng(_SEED).permutation(num_items) + 1
    return np.concatenate([np.zeros(1, dtype=np.int64), shuffled.astype(np.int64)])


def _load(root: Path | None, name: str) -> EventLog:
    path = find(root, name)
    notes = ["item ids were permuted: those of the release follow first appearance."]
    if path.suffix == ".txt":
        events, items = _read_release(path)
    else:
        events = pl.read_parquet(path, columns=["user_id", "item_id", "pos", "timestamp"]).sort("user_id", "pos")
        items = pl.read_parquet(path.with_name(path.name.replace("_interactions", "_items")))
        items = items.select(column.name for column in items if column.null_count() < items.height)
    num_items = int(max(events["item_id"].max(), items["item_id"].max()))  # type: ignore[type-var, arg-type]
    new = pl.Series(permuted_ids(num_items))
    events = events.with_columns(item_id=new.gather(events["item_id"]))
    items = items.with_columns(item_id=new.gather(items["item_id"])).sort("item_id")
    if "attributes" in items.columns:
        items = items.with_columns(pl.col("attributes").cast(pl.List(pl.String)))
    time = "pos" if events["timestamp"].null_count() == events.height else "timestamp"
    if time == "timestamp" and (num_gaps := events["timestamp"].null_count()):
        events = _fill_times(events)
        notes.append(f"{num_gaps} events have no time; they stand at the first day of the log, one second apart.")
    roles = only(user="user_id", item="item_id", timestamp=time)
    return named(read_exactly(events.select("user_id", "item_id", time), items, None, roles), name, *notes)


def _fill_times(events: pl.DataFrame) -> pl.DataFrame:
    """Users of whom some time is missing get the order of their events from the first second of the log on."""
    gap = pl.col("timestamp").is_null().any().over("user_id")
    return events.with_columns(
        timestamp=pl.when(gap).then(pl.col("timestamp").min() + pl.col("pos")).otherwise("timestamp")
    )


def _read_release(path: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Events and items of NAME.txt ("user item item ..." per line) and NAME_item2attributes.json beside it, if there."""
    lines = pl.DataFrame({"line": path.read_text().split("\n")}).filter(pl.col("line").str.strip_chars() != "")
    ids = lines.select(pl.col("line").str.strip_chars().str.split(" ").cast(pl.List(pl.Int64)))
    events = (
        ids.select(user_id=pl.col("line").list.first(), item_id=pl.col("line").list.slice(1))
        .explode("item_id")
        .drop_nulls()
    )
    events = events.with_columns(pos=pl.int_range(pl.len()).over("user_id"), timestamp=pl.lit(None, dtype=pl.Int64))
    attributes = path.with_name(f"{path.stem}_item2attributes.json")
    items = events.select("item_id").unique().sort("item_id")
    if attributes.exists():
        table = json.loads(attributes.read_text())
        pairs = pl.DataFrame({"item_id": [int(item) for item in table], "attributes": list(table.values())})
        items = items.join(pairs, on="item_id", how="left")
    return events, items
