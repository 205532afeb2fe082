"""What surrounds a training run: a clean stop on Ctrl-C, a defined order of additions, the parameters of a phase, the device."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn

from shortlist.errors import ConfigError
from shortlist.models.base import Phase, System


class Interrupt:
    """Turns the first Ctrl-C into a request to stop at a clean point; the second one stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._previous: Any = None

    def __enter__(self) -> Interrupt:
        # Python allows signal handlers in the main thread only; elsewhere Ctrl-C does not arrive anyway.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Prefer operations with a defined order of additions inside the block; on the CPU, the backward of `x[rows]` needs it."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


@contextmanager
def only(system: System, phase: Phase) -> Iterator[list[nn.Parameter]]:
    """The parameters a phase trains; all others need no gradient inside the block."""
    everything = list(system.parameters())
    chosen = everything if phase.parameters is None else list(phase.parameters())
    known = {id(p) for p in everything}
    if any(id(p) not in known for p in chosen):
        raise ConfigError(
            f"{type(system).__name__}, phase {phase.name!r} trains a parameter that is not the system's: it would not be saved"
        )
    kept = {id(p) for p in chosen}
    set_aside = [p for p in everything if p.requires_grad and id(p) not in kept]
    for parameter in set_aside:
        parameter.requires_grad_(False)
    try:
        yield [p for p in chosen if p.requires_grad]
    finally:
        system.zero_grad(set_to_none=True)
        for parameter in set_aside:
            parameter.requires_grad_(True)


def chosen_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a GPU where there is one. ConfigError when it is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is not known to torch; use cpu, cuda or auto") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r} was asked for, but torch finds no GPU here; use cpu or auto")
    return device
