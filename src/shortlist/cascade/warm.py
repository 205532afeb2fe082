"""A system begins with the weights of the same system of an earlier run, where users and items have joined since.

earlier  [unknown, 1 .. n]          rows of an item table
now      [unknown, 1 .. n, new]     the new ones keep the first weights they were made with
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shortlist.data.histories import Int
from shortlist.models.base import System


@dataclass(kw_only=True, slots=True)
class FirstWeights:
    """Weights of an earlier run's systems, handed to those of a run in training."""

    version: str
    """Of the earlier run's snapshot."""
    systems: Mapping[str, System]
    """The earlier run's, by name."""
    user_before: Int
    """[U + 1] row that each user had there; 0 = none."""
    learned_until: int | None = None
    """Seconds: the last moment that its rankers were trained on; None = not known."""
    cold: dict[str, str] = field(default_factory=dict)
    """Why a system begins anew, by name."""

    def give(self, name: str, system: System) -> str:
        """Set the weights of a system that was just made; what it began with, for fingerprints."""
        reason = self.obstacle(name, system)
        if reason is not None:
            self.cold[name] = reason
            return "its own"
        before = self.systems[name].state_dict()
        with torch.no_grad():
            for key, tensor in system.state_dict().items():
                if key in before:
                    self._copy(before[key].to(tensor), tensor, self.systems[name], system)
        system.train(system.training)  # drops item vectors kept from the weights before
        return self.version

    def since(self, name: str) -> int | None:
        """Seconds: what came later is new to a system; None for one that begins anew."""
        return None if name in self.cold else self.learned_until

    def obstacle(self, name: str, system: System) -> str | None:
        """Why a system can not go on from the earlier weights; None where it can."""
        old = self.systems.get(name)
        if old is None or type(old) is not type(system):
            return "the run before has no such system"
        phases = system.phases()
        if len(phases) != 1 or phases[0].learn is not None or phases[0].before is not None:
            return "it is trained in several steps, and the later ones rest on what the earlier ones made"
        before = old.state_dict()
        for key, parameter in system.named_parameters():
            if key not in before:
                return f"the weights before have no {key}"
            if self._rows(before[key], parameter, old, system) is None:
                return f"{key} was {list(before[key].shape)} and is {list(parameter.shape)}"
        missing = set(dict(old.named_parameters())) - set(dict(system.named_parameters()))
        return f"{min(missing)} was made in training" if missing else None

    def _copy(self, before: Tensor, now: Tensor, old: System, system: System) -> None:
        """What fits goes over; a buffer of another shape is left to `prepare`."""
        rows = self._rows(before, now, old, system)
        if rows is None:
            return
        if rows == "all":
            now.copy_(before)
        elif rows == "items":
            now[: len(before)] = before
        else:
            source = torch.from_numpy(self.user_before[: len(now)])
            has = (source > 0) & (source < len(before))
            now[0] = before[0]
            now[has] = before[source[has]]

    def _rows(self, before: Tensor, now: Tensor, old: System, system: System) -> str | None:
        """What the first dimension of a tensor counts: all the same, rows of items, rows of users; None where the two do not fit."""
        if before.ndim != now.ndim or before.shape[1:] != now.shape[1:]:
            return None
        if now.ndim and len(before) == old.space.num_users + 1 and len(now) == system.space.num_users + 1:
            return "users" if len(now) != system.space.num_items + 1 else None
        if before.shape == now.shape:
            return "all"
        if len(before) == old.space.num_items + 1 and len(now) == system.space.num_items + 1:
            return "items"
        return None
