"""The shop that the pages talk of, small: clicks.csv and products.csv, and the same events as other tools keep them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl

START, DAY = 1_700_000_000, 86_400
CATEGORIES = ("mugs", "lamps", "games", "plants")


def frames(num_users: int = 80, num_items: int = 48, num_days: int = 60) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Clicks and products. A user likes one category and opens some of its products on some days; the last four products are new."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(1, num_users + 1):
        likes = user % len(CATEGORIES)
        for day in np.sort(rng.choice(num_days, 14, replace=False)):
            at = rng.integers((num_items - 4) // len(CATEGORIES)) * len(CATEGORIES) + likes
            rows.append((f"u{user}", f"p{at + 1}", START + int(day) * DAY + int(rng.integers(DAY)), "click"))
    clicks = pl.DataFrame(rows, schema=["user_id", "product_id", "timestamp", "action"], orient="row").sort("timestamp")
    number = np.arange(1, num_items + 1)
    products = pl.DataFrame(
        {
            "product_id": [f"p{i}" for i in number],
            "title": [f"{CATEGORIES[(i - 1) % 4][:-1]} number {i}" for i in number],
            "category": [CATEGORIES[(i - 1) % 4] for i in number],
            "price": (5 + number % 7).astype(float),
        }
    )
    return clicks, products


def write(folder: Path) -> None:
    """All files that a page reads before it writes any itself."""
    clicks, products = frames()
    for name in ("dataset/shop", "gorse", "ctr"):
        (folder / name).mkdir(parents=True)
    clicks.write_csv(folder / "clicks.csv")
    products.write_csv(folder / "products.csv")
    _recbole(folder, clicks, products)
    _gorse(folder, clicks, products)
    _fuxictr(folder, clicks, products)


def _recbole(folder: Path, clicks: pl.DataFrame, products: pl.DataFrame) -> None:
    kinds = {
        "user_id": "token",
        "item_id": "token",
        "timestamp": "float",
        "title": "token_seq",
        "category": "token",
        "price": "float",
    }
    for name, table in (("inter", clicks.drop("action")), ("item", products)):
        table = table.rename({"product_id": "item_id"})
        table.rename({c: f"{c}:{kinds[c]}" for c in table.columns}).write_csv(
            folder / "dataset" / "shop" / f"shop.{name}", separator="\t"
        )


def _gorse(folder: Path, clicks: pl.DataFrame, products: pl.DataFrame) -> None:
    feedback = (
        {
            "FeedbackType": a,
            "UserId": u,
            "ItemId": i,
            "Timestamp": datetime.fromtimestamp(t, UTC).isoformat(),
            "Comment": "",
        }
        for u, i, t, a in clicks.iter_rows()
    )
    items = (
        {
            "ItemId": i,
            "IsHidden": False,
            "Categories": [c],
            "Timestamp": "2023-11-01T00:00:00Z",
            "Labels": {"price": p},
            "Comment": t,
        }
        for i, t, c, p in products.iter_rows()
    )
    for name, lines in (("feedback", feedback), ("items", items)):
        (folder / "gorse" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _fuxictr(folder: Path, clicks: pl.DataFrame, products: pl.DataFrame) -> None:
    """Shown products with a 0/1 label, cut into three files by time."""
    rng = np.random.default_rng(1)
    shown = clicks.drop("action").with_columns(pl.Series("label", rng.integers(0, 2, clicks.height)))
    shown = shown.join(products.select("product_id", "category"), on="product_id", how="left").sort("timestamp")
    cuts = {"train": (0, 800), "valid": (800, 160), "test": (960, shown.height)}
    for name, (start, length) in cuts.items():
        shown.slice(start, length).write_csv(folder / "ctr" / f"{name}.csv")
