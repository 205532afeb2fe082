"""Where memories of users outlast the process: what such a place must do, and how a memory becomes bytes and back.

    open_shelf("state/memories.bin", ...)        one server: a memory-mapped file (mapped_memories.py)
    open_shelf("redis://host:6379/0", ...)       several servers: shared through Redis (redis_memories.py)

Everything is kept under the version of the snapshot whose systems made it, so what other weights made is never read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from shortlist.errors import ConfigError
from shortlist.models.base import Memory


@dataclass(frozen=True, kw_only=True, slots=True)
class ShelfConfig:
    """What bounds a shelf."""

    max_mib: int = 1_024
    """Bound of a file of memories, or of all that servers share in Redis, in MiB."""
    ttl_hours: float = 168.0
    """In Redis, hours after which what nobody wrote again is dropped."""

    def __post_init__(self) -> None:
        if self.max_mib < 1 or self.ttl_hours <= 0:
            raise ConfigError(
                f"a shelf needs max_mib of at least 1 and ttl_hours above 0, got {self.max_mib} and {self.ttl_hours}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ShelfStatus:
    """What stands on a shelf."""

    kind: str
    """file or redis."""
    num_entries: int
    num_bytes: int
    max_bytes: int
    num_evicted: int
    """Entries that had to make room since the start, as far as this process saw it."""
    problem: str | None
    """Why it can not be used now; None where it can."""


class Shelf(Protocol):
    """Keeps memories by snapshot, system and user within a bound; safe to use from many threads. None of its methods raises."""

    is_shared: bool
    """Whether other servers write to it, so that what this process remembers by itself could be older."""

    @property
    def problem(self) -> str | None:
        """Why it could not be used when it was last asked; None where it could."""

    def get(self, snapshot: str, system: str, keys: Sequence[str]) -> list[Memory | None]:
        """Per user what was put last; None where there is nothing, or it can not be had now."""

    def put(self, snapshot: str, system: str, keys: Sequence[str], memories: Sequence[Memory | None]) -> None:
        """Keep in place of what was put before; None forgets."""

    def forget(self, key: str) -> bool:
        """Wipe what any system of any snapshot kept of a user; False where that could not be done now."""

    def status(self) -> ShelfStatus:
        """Sizes up to now."""

    def close(self) -> None:
        """Let go of it."""


def open_shelf(where: Path | str, config: ShelfConfig) -> Shelf:
    """The shelf at a path or a redis:// URL.

    Args:
        where: file, made when missing, or redis://host:port/number (rediss:// with TLS) with the extra `redis`.
        config: bounds.

    Raises:
        ConfigError: no such kind of place, a file that another process uses, a missing extra.
        DataError: the file is something else, or there is no room for it.
    """
    max_bytes = config.max_mib << 20
    text = str(where)
    scheme, found, _ = text.partition("://")
    if isinstance(where, Path) or not found:
        from shortlist.store.mapped_memories import MappedMemories

        return MappedMemories(Path(where), max_bytes)
    if scheme in ("redis", "rediss"):
        from shortlist.store.redis_memories import RedisMemories

        return RedisMemories(text, max_bytes, ttl_s=config.ttl_hours * 3_600)
    raise ConfigError(f"memories stand in a file (a path) or in Redis (redis://host:6379/0), not on {scheme!r}")


def owned(memory: Memory) -> Memory:
    """The same with tensors that own what they hold, on the CPU: a part of a larger tensor would keep all of it in memory."""
    own = {name: _own(tensor) for name, tensor in memory.items()}
    return memory if all(own[name] is tensor for name, tensor in memory.items()) else own


def packed(memory: Memory) -> bytes:
    """A memory in the safetensors format."""
    return save(
        {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in memory.items()}
    )


def unpacked(data: bytes) -> Memory | None:
    """What `packed` made bytes of; None where these are something else. No code in them can run."""
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError):
        return None


def digest(*parts: str) -> bytes:
    """Sixteen bytes that stand for some words in this order."""
    joined = b"".join(
        len(word).to_bytes(4, "little") + word for word in (part.encode(errors="surrogatepass") for part in parts)
    )
    return hashlib.blake2b(joined, digest_size=16).digest()


def _own(tensor: Tensor) -> Tensor:
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return (
        tensor if whole and tensor.device.type == "cpu" and not tensor.requires_grad else tensor.detach().cpu().clone()
    )
