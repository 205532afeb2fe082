"""The built-in shop log: one year of a real gift shop, 18,532 baskets of 4,338 customers, with money in it."""

from __future__ import annotations

import importlib.resources
import io
from pathlib import Path

import polars as pl

from shortlist.data.datasets._files import named, only, read_exactly
from shortlist.data.log import EventLog

ATTRIBUTION = (
    "Online Retail by Daqing Chen, UCI Machine Learning Repository (2015), https://doi.org/10.24432/C5BW33, CC BY 4.0; "
    "cancellations and lines without customer left out, item ids shuffled."
)


def load_builtin(root: Path | None = None) -> EventLog:
    """Events with basket as group and value = price * quantity (pounds); items with stock_code, title and price.

    `root` is not used: the files come with the package. Lines keep the shop's own order inside baskets.
    """
    del root
    money = pl.col("price").cast(pl.Float64).round(2)  # stored as float32
    events = _packaged("demo_events.parquet").with_columns(money)
    items = _packaged("demo_items.parquet").with_columns(money)
    roles = only(user="customer_id", item="item_id", timestamp="timestamp", basket="basket_id", value="price*quantity")
    return named(read_exactly(events, items, None, roles), "builtin", ATTRIBUTION)


def _packaged(name: str) -> pl.DataFrame:
    file = importlib.resources.files("shortlist.data") / "demo" / name
    return pl.read_parquet(io.BytesIO(file.read_bytes()))
