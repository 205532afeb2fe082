"""A run as the engine serves it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from shortlist.cascade.attributes import Attributes
from shortlist.cascade.cascade import Cascade
from shortlist.cascade.governor import Governor
from shortlist.cascade.pacing import EVEN, Float, traffic_of
from shortlist.cascade.pasts import Numbers
from shortlist.cascade.rules import Rules
from shortlist.cascade.ruling import Availability
from shortlist.cascade.run import load_run
from shortlist.data.batches import request_batch
from shortlist.data.dataset import Dataset
from shortlist.data.histories import Int
from shortlist.data.schema import FieldTable
from shortlist.data.vocabulary import Id
from shortlist.errors import ConfigError
from shortlist.store.text_index import TextIndex


class Live:
    """A run as the engine serves it: everything that changes together when a new snapshot comes."""

    def __init__(self, dataset: Dataset, cascade: Cascade, version: str, folder: Path | None = None) -> None:
        self.dataset, self.cascade, self.version, self.folder = dataset, cascade, version, folder
        self.problems: tuple[str, ...] = ()
        """What is wrong with files beside the run; every answer says so."""
        self.governor: Governor | None = None
        """Chooses chains; None = every request gets the default one. An engine sets it."""
        self.users, self.items = Numbers(dataset.user_ids), Numbers(dataset.item_ids)
        self.attributes = Attributes(dataset)
        self.availability: Availability | None = None
        """Items that are not to be shown; None = all are. Changes while the run is served, as `attributes` and `titles` do."""
        self.lengths: dict[str, Tensor] = {}
        """Lengths of item vectors float32 [n + 1] by system; see similar.py."""
        self.told = (0, 0)
        """How far changes of items and users are in it; see upkeep.py."""
        self.titles: dict[int, str | None] = {}
        """By catalogue row, in place of the run's."""
        self.rules: Rules = cascade.config.rules
        """The surface's own, beneath those of every request."""
        self.check_rules(self.rules)
        self.user_fields: FieldTable = dataset.users
        self.log_end: int = dataset.plan.now["end"]
        wish = cascade.config.surface.repeats
        self.repeats = dataset.repeats if wish == "auto" else wish == "yes"
        self.texts: TextIndex | None = None
        """Text of the items, for search; opened when the first query comes."""
        self.texts_lock = threading.Lock()
        self.default_action = dataset.space.actions[0] if dataset.space.actions else None

    @cached_property
    def traffic_H(self) -> Float:
        """float64 [24]: shares of the traffic by hour of the day (UTC) in the run's log, which plans of campaigns follow."""
        return traffic_of(np.asarray(self.dataset.histories.time)) if self.dataset.space.has_clock else EVEN

    def ids(self, rows: Int) -> list[Any]:
        """Item ids of catalogue rows [n]."""
        return self.dataset.item_ids.decode(rows)

    def id(self, row: int) -> Any:
        """Item id of a catalogue row above 0; for a handful of rows quicker than `ids`, which wakes a pool of threads."""
        return self.dataset.item_ids.ids[row - 1]

    def title(self, row: int) -> str | None:
        """Text to show an item by."""
        if row in self.titles:
            return self.titles[row]
        titles = self.dataset.titles
        return None if titles is None else titles[row] or None

    def key(self, user: Id | None) -> str:
        """Under which a user is remembered; a forgotten one who comes back has another key than before."""
        return f"{user}\0" if self.users.is_hidden(user) else str(user)

    def check_rules(self, rules: Rules) -> None:
        """ConfigError for rules that the run's items can not follow."""
        self.attributes.check(rules)
        if rules.seen_days is not None and not self.dataset.space.has_clock:
            raise ConfigError("seen_days needs times, and the log of this run only has an order; use seen = 'drop'")

    def action_ids(self, actions: Sequence[str | None]) -> Int:
        """int64 [n]; an action that is not named is the log's first one."""
        return self.dataset.action_ids([self.default_action if action is None else action for action in actions])


def load_live(folder: Path) -> Live:
    """Read a run and answer once; SnapshotError when `folder` is no run or is damaged."""
    run = load_run(folder)
    live = Live(run.dataset, run.cascade, run.version, folder.absolute())
    _warm(live)
    return live


def _warm(live: Live) -> None:
    """Answer once, so that what systems compute on first use is there before the first request."""
    _, requests = live.dataset.requests_for([None], at=live.log_end)
    batch = request_batch(live.dataset.histories, live.user_fields, requests, max_history=live.cascade.max_history)
    live.cascade.run(batch)
