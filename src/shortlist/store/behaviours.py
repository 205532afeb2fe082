"""Every user's past by attribute, on disk: serves a hard search in the same time whatever the length of the past.

The tree of user, category and behaviours of SIM (Qi et al., CIKM 2020, section 4.2) as two sorted arrays that are memory-mapped:

    key.npy     user row * number of attributes + attribute, rising
    event.npy   place of the event in the histories, oldest first within a key

A look-up is two binary searches per user and attribute; only what they touch is read. Events since the files were written are kept in
memory in the same form, until `of` is called again on the whole log, as often as the log is cut anew.

t candidates, E events of the log, K newest events wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shortlist.data.histories import Histories
from shortlist.errors import DataError, SnapshotError
from shortlist.layers.search import BehaviourIndex, Chosen
from shortlist.store.snapshot import REMEDY, read_snapshot, write_snapshot


class Behaviours:
    """The index of a log and of what came since.

    Args:
        index: of the log, rows are user rows.
        num_events: E; events that come later have the places from E on.
    """

    def __init__(self, index: BehaviourIndex, num_events: int) -> None:
        self.index = index
        self.num_events = num_events
        self._later: list[tuple[Tensor, Tensor]] = []
        self._tail: BehaviourIndex | None = None

    @classmethod
    def of(cls, histories: Histories, attribute_N: Tensor, num_attributes: int) -> Behaviours:
        """Of all events of a log; attribute_N int64 [n + 1] gives each item's (see `layers.search.item_attribute`), 0 = none."""
        attribute_E = attribute_N[torch.from_numpy(np.asarray(histories.item))]
        return cls(
            BehaviourIndex.of(torch.from_numpy(histories.user_of_event), attribute_E, num_attributes),
            histories.num_events,
        )

    def save(self, folder: Path) -> None:
        """Write the log's index as a snapshot folder; DataError where events came in since, which the log's next index will hold."""
        if self._later:
            raise DataError("behaviours with later events are not written: make them of the whole log again, then save")
        numbers = np.array([self.index.num_attributes, self.num_events], dtype=np.int64)
        arrays = {"key": self.index.key.numpy(), "event": self.index.event.numpy(), "numbers": numbers}

        def fill(place: Path) -> None:
            for name, array in arrays.items():
                np.save(place / f"{name}.npy", array, allow_pickle=False)

        write_snapshot(folder, fill)

    @classmethod
    def load(cls, folder: Path, *, verify: bool = False) -> Behaviours:
        """Memory-mapped from a folder that `save` wrote; SnapshotError names what is missing or damaged. `verify` reads every byte."""
        read_snapshot(folder, verify=verify)
        arrays = {}
        for name in ("key", "event", "numbers"):
            path = folder / f"{name}.npy"
            try:
                # Copy on write: torch wants memory that may be written to, and nothing is.
                arrays[name] = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
            except (OSError, ValueError) as error:
                raise SnapshotError(f"{path} is missing or damaged ({error}); {REMEDY}") from error
        num_attributes, num_events = arrays["numbers"].tolist()
        return cls(BehaviourIndex(arrays["key"], arrays["event"], num_attributes), num_events)

    @property
    def num_bytes(self) -> int:
        """Of the log's index."""
        return self.index.key.nbytes + self.index.event.nbytes

    def append(self, user: Sequence[int] | Tensor, attribute: Sequence[int] | Tensor) -> None:
        """Take in events that came after all others, in order: user rows and attributes, one each.

        The next look-up sorts all later events: its time grows with them, not with the log.
        """
        user_n, attribute_n = torch.as_tensor(user), torch.as_tensor(attribute)
        if user_n.shape != attribute_n.shape:
            raise DataError(f"{len(user_n)} users and {len(attribute_n)} attributes; give one of each per event")
        if len(user_n):
            self._later.append((user_n, attribute_n))
            self._tail = None

    def newest(self, user: int, attributes: Tensor, k: int) -> Chosen:
        """The newest k events of a user for each candidate's attribute [t] int64, newest first: places [t, K] in the log.

        Candidates share few attributes: each distinct one is looked up once.
        """
        distinct, which_t = attributes.unique(return_inverse=True)
        row = torch.full_like(distinct, user)
        found = self.index.newest(row, distinct, k)
        if self._later:
            found = _first(k, self._of_later().newest(row, distinct, k), found)
        return found.select(which_t)

    def _of_later(self) -> BehaviourIndex:
        """The same index over later events, whose places go on from the log's."""
        if self._tail is None:
            user_n, attribute_n = (torch.cat(column) for column in zip(*self._later, strict=True))
            tail = BehaviourIndex.of(user_n, attribute_n, self.index.num_attributes)
            self._tail = tail._replace(event=tail.event + self.num_events)
        return self._tail


def _first(k: int, newer: Chosen, older: Chosen) -> Chosen:
    """The first k real ones of both, the newer before the older."""
    event, is_real = torch.cat([newer.event, older.event], 1), torch.cat([newer.is_real, older.is_real], 1)
    order = (~is_real).int().argsort(dim=1, stable=True)[:, :k]
    return Chosen(event.gather(1, order), is_real.gather(1, order))
