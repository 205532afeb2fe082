"""The Complete Journey (84.51): a year of groceries of 2,469 households, with money and real times.

Lines inside a basket are sorted by product, so a basket is one group and nothing may be predicted inside it.
"""

from __future__ import annotations

from pathlib import Path

from shortlist.data.datasets._files import find, named, only, read_exactly
from shortlist.data.log import EventLog
from shortlist.data.tables import load_table


def load_completejourney(root: Path | None) -> EventLog:
    """1,469,307 lines in 155,848 baskets; value is sales_value (dollars); items are the 92,331 products, users the demographics of 801."""
    path = find(root, "completejourney")
    tables = [
        load_table(path.with_name(f"{name}{path.suffix}")).frame
        for name in ("transactions", "products", "demographics")
    ]
    events, items, users = tables
    roles = only(
        user="household_id",
        item="product_id",
        timestamp="transaction_timestamp",
        basket="basket_id",
        value="sales_value",
    )
    items = items.rename({"product_id": "item_id"})
    users = users.rename({"household_id": "user_id"})
    return named(read_exactly(events, items, users, roles), "completejourney")
