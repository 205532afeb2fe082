"""What next-item systems share beside their objective: settings of the items, which events are read, users without a past.

B users, total = all their events end to end, D width of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from shortlist.data.jagged import Jagged
from shortlist.data.schema import Space
from shortlist.embeddings.base import TableChoice
from shortlist.errors import ConfigError
from shortlist.layers.factors import beside_popularity
from shortlist.layers.fields import ItemEncoder
from shortlist.layers.next_item import NextItemConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceConfig(NextItemConfig):
    """Settings of the objective and of the items; the settings of every next-item system begin with them."""

    use_fields: bool = True
    """Add item fields to the item's vector; False is the published model."""
    id_dropout: float = 0.1
    """Share of item ids hidden in training where there are fields, so that the fields can stand for an item without events."""
    window_days: float | None = 14.0
    """Users without history get the popular items of the last so many days of training; None = of all times."""
    table: TableChoice = field(default_factory=TableChoice)
    """Table of the item ids; sparse = true gives row-wise updates, and excludes full_softmax, which touches every row."""

    def check(
        self, system: str, *, positive: Sequence[str], shares: Sequence[str] = (), in_batch: bool = False
    ) -> None:
        """Raises ConfigError, in the name of `system`, where a setting is out of range.

        Args:
            positive: names of whole numbers that are at least 1.
            shares: names of shares beside `id_dropout`, from 0 to below 1; None counts as 0.
            in_batch: the system counts items, which in-batch negatives need.
        """
        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigError(f"{system}: {name} must be at least 1, got {getattr(self, name)}")
        for name in (*shares, "id_dropout"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise ConfigError(f"{system}: {name} must be from 0 to below 1, got {getattr(self, name)}")
        if self.window_days is not None and self.window_days <= 0:
            raise ConfigError(f"{system}: window_days must be above 0 or absent, got {self.window_days}")
        self.check_objective(system, sparse=self.table.sparse, counts=in_batch)


def item_encoder(space: Space, dim: int, config: SequenceConfig) -> ItemEncoder:
    """Vectors [*, D] of items as the settings say; ids are hidden in training only where fields are left to learn from."""
    items = ItemEncoder(space, dim, id_dropout=config.id_dropout, use_fields=config.use_fields, table=config.table)
    if not items.num_fields:
        items.id_dropout = 0.0
    return items


def readable_rows(items: ItemEncoder, rows: Jagged) -> Tensor:
    """bool [total]: events that say something: of known items, or of items that a field describes."""
    return rows.values > 0 if items.num_fields else items.known_items[rows.values]


def readable(items: ItemEncoder, rows: Jagged, max_history: int) -> Jagged:
    """The newest `max_history` events of each user among those that say something."""
    return rows.keep(readable_rows(items, rows)).last(max_history)


def last_of_rows(vectors: Tensor, rows: Jagged) -> Tensor:
    """Of vectors [total, D] the one at each row's last position, [B, D]; zeros for empty rows."""
    has_any_B = rows.lengths > 0
    last_BD = vectors.new_zeros(rows.num_rows, vectors.shape[1])
    last_BD[has_any_B] = vectors[rows.offsets[1:][has_any_B] - 1]
    return last_BD


def user_vectors(query_BD: Tensor, rows: Jagged) -> Tensor:
    """float32 [B, D + 1]: what users ask for, and 0; for those without an event in `rows` zeros and 1, which asks for popular items."""
    has_none_B = rows.lengths == 0
    return beside_popularity(query_BD.masked_fill(has_none_B[:, None], 0.0), has_none_B.to(query_BD.dtype)).float()
