"""What the claims about gates share: a DNN as large as a gated one, and how much gates differ from user to user.

t candidates of all requests end to end, U users, L hidden layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from _ctr import num_parameters
from _ranking_lab import Examples, World
from shortlist.models.base import Ranker
from shortlist.registry import find

MOST_WIDTH = 4_096
"""Of the wider layer of a DNN that is made as large as another."""


def built(settings: Mapping[str, Any], world: World) -> Ranker:
    """The DNN of these settings, not trained."""
    entry = find("dnn")
    system = entry.cls(entry.config(dict(settings)), world.space)
    assert isinstance(system, Ranker)
    return system


def as_large(settings: Mapping[str, Any], gated: Mapping[str, Any], world: World) -> dict[str, Any]:
    """The settings with two hidden layers of widths 2 w and w, the least w with at least as many parameters as the gated DNN has."""
    wanted = num_parameters(built(gated, world))
    low, high = 1, MOST_WIDTH // 2
    while low < high:
        middle = (low + high) // 2
        enough = num_parameters(built({**settings, "widths": (2 * middle, middle)}, world)) >= wanted
        low, high = (low, middle) if enough else (middle + 1, high)
    return {**settings, "widths": (2 * low, low)}


@contextmanager
def watched(system: nn.Module, kind: type[nn.Module]) -> Iterator[Callable[[], Tensor]]:
    """Hold on to what the gates of one kind give while inside; the result puts all rows end to end: float32 [rows, sum of widths]."""
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _given, gates: seen.append(torch.cat(gates, dim=1)))
        for module in system.modules()
        if isinstance(module, kind)
    ]
    assert hooks, f"the system has no {kind.__name__}"
    try:
        yield lambda: torch.cat(seen)
    finally:
        for hook in hooks:
            hook.remove()


def spread_over_users(gate_tW: Tensor, examples: Examples) -> float:
    """Standard deviation over users of each unit's mean gate, mean of the units."""
    _, user_t = torch.from_numpy(examples.user_of_row).unique(return_inverse=True)
    sum_UW = torch.zeros(int(user_t.max()) + 1, gate_tW.shape[1]).index_add(0, user_t, gate_tW)
    mean_UW = sum_UW / torch.bincount(user_t)[:, None]
    return float(mean_UW.std(0).mean())


def with_items(world: World, **changed: Any) -> World:
    """The world with other item fields: `items` of its space."""
    return replace(world, view=replace(world.view, space=replace(world.space, **changed)))
