"""Memories in one memory-mapped file of a fixed size: they survive a restart, and kill -9 leaves nothing that could be misread.

    head                4,096 bytes: what the file is, and its size
    record, record ...  64 bytes: mark, both checksums, length, number, key, user; then the memory as safetensors; to a multiple of 64

The body is a ring. A new record goes behind the last one and takes the place of the oldest; a memory that grew no further than its place
is written over in place. Whatever is replaced or forgotten is overwritten with zeros. The mark of a record goes away before its content
changes and comes back after, and a record is only believed when its checksums fit, so one that was being written when the process or the
machine died counts as not there. Keys are digests of snapshot, system and user: no name of a user stands in the file.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from shortlist.errors import ConfigError, DataError
from shortlist.models.base import Memory
from shortlist.store.shelf import ShelfStatus, digest, packed, unpacked

HEAD_BYTES = 4_096
MIN_BYTES = 1 << 20
_KIND = b"shortlist memories 1\n"
_MARK = 0x5A17_C0DE_4D45_4D31
_UNIT = 64
"""Records begin at multiples of this."""
_RECORD = struct.Struct("<QIIQQ16s16s")
"""Mark, checksum of what follows in the head, checksum of the content, its length, number of the record, key, user."""


@dataclass(slots=True)
class _Entry:
    """Where a record stands; its order among others is that in which they came into the ring."""

    start: int
    room: int
    """Bytes from `start` that are its own, a multiple of the unit."""
    number: int
    user: bytes


class MappedMemories:
    """Memories of one server in a file; safe to use from many threads of one process.

    Args:
        path: file, made when missing; with another size than `max_bytes` it is begun anew.
        max_bytes: its size.

    Raises:
        ConfigError: the bound is below a MiB, or another process uses the file.
        DataError: the file is something else, its folder is missing, or the disk has no room for it.
    """

    is_shared = False

    def __init__(self, path: Path, max_bytes: int) -> None:
        if max_bytes < MIN_BYTES:
            raise ConfigError(f"a file of memories needs a bound of at least 1 MiB, got {max_bytes:,} bytes")
        self.path = Path(path)
        self.problem: str | None = None
        self._capacity = (max_bytes - HEAD_BYTES) // _UNIT * _UNIT
        self._file = _opened(self.path, HEAD_BYTES + self._capacity)
        self._map = np.memmap(self._file, np.uint8, "r+", HEAD_BYTES, (self._capacity,))
        self._bytes: NDArray[np.uint8] = self._map
        self._lock = threading.Lock()
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._keys_of: dict[bytes, set[bytes]] = {}
        self._num_bytes = self._num_evicted = self._number = self._next = 0
        self._read()

    def get(self, snapshot: str, system: str, keys: Sequence[str]) -> list[Memory | None]:
        """Per user what was put last; None where there is nothing whole."""
        found: list[Memory | None] = []
        for user in keys:
            key = digest(snapshot, system, user)
            with self._lock:
                entry = self._entries.get(key)
                record = b"" if entry is None else self._bytes[entry.start : entry.start + entry.room].tobytes()
            content = _content(record, key)
            found.append(None if content is None else unpacked(content))
            if record and content is None:
                with self._lock:
                    if self._entries.get(key) is entry:
                        self._wipe(key)
        return found

    def put(self, snapshot: str, system: str, keys: Sequence[str], memories: Sequence[Memory | None]) -> None:
        """Keep in place of what was put before; None forgets. One that would take more than a quarter of the file is not kept."""
        for user, memory in zip(keys, memories, strict=True):
            key = digest(snapshot, system, user)
            content = None if memory is None else packed(memory)
            with self._lock:
                if self._file.closed:
                    return
                if content is None or _room(len(content)) > self._capacity // 4:
                    self._wipe(key)
                else:
                    self._write(key, digest(user), content)

    def forget(self, key: str) -> bool:
        """Write zeros over what any system of any snapshot kept of a user, and wait for the disk."""
        with self._lock:
            wiped = self._keys_of.get(digest(key), set()).copy()
            for one in wiped:
                self._wipe(one)
            if wiped:
                self._map.flush()
        return True

    def status(self) -> ShelfStatus:
        """Sizes up to now."""
        with self._lock:
            return ShelfStatus(
                kind="file",
                num_entries=len(self._entries),
                num_bytes=self._num_bytes,
                max_bytes=HEAD_BYTES + self._capacity,
                num_evicted=self._num_evicted,
                problem=None,
            )

    def close(self) -> None:
        """Write what the system has not yet, and let go of the file."""
        with self._lock:
            if not self._file.closed:
                self._map.flush()
                self._file.close()
                self._entries.clear()
                self._keys_of.clear()
                self._num_bytes = 0
                del self._map
                self._bytes = np.zeros(0, np.uint8)

    # -- under the lock ------------------------------------------------------------------------------------------

    def _write(self, key: bytes, user: bytes, content: bytes) -> None:
        room = _room(len(content))
        entry = self._entries.get(key)
        if entry is not None and entry.room < room:
            self._wipe(key)
            entry = None
        if entry is None:
            entry = _Entry(self._place(room), room, self._number, user)
            self._number += 1
            self._add(key, entry)
        start = entry.start
        content_start, end = start + _RECORD.size, start + entry.room
        self._bytes[start:content_start] = 0
        self._bytes[content_start : content_start + len(content)] = np.frombuffer(content, np.uint8)
        self._bytes[content_start + len(content) : end] = 0
        self._bytes[start:content_start] = np.frombuffer(_head(key, user, entry.number, content), np.uint8)

    def _place(self, room: int) -> int:
        """Where the next record of that many bytes begins; what stands there makes room.

        The oldest entries are those just ahead: at the end of the ring, what stands in the rest that is too short goes too, so that
        this stays so.
        """
        start = self._next
        if start + room > self._capacity:
            self._evict(start, self._capacity)
            start = 0
        self._evict(start, start + room)
        self._next = start + room
        return start

    def _evict(self, start: int, end: int) -> None:
        while self._entries:
            key, oldest = next(iter(self._entries.items()))
            if not start <= oldest.start < end:
                return
            self._wipe(key)
            self._num_evicted += 1

    def _wipe(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        self._bytes[entry.start : entry.start + entry.room] = 0
        self._num_bytes -= entry.room
        mine = self._keys_of[entry.user]
        mine.discard(key)
        if not mine:
            del self._keys_of[entry.user]

    def _add(self, key: bytes, entry: _Entry) -> None:
        self._entries[key] = entry
        self._keys_of.setdefault(entry.user, set()).add(key)
        self._num_bytes += entry.room

    def _read(self) -> None:
        """Find the records of an earlier process. Their content is checked when it is asked for."""
        marks = self._bytes.view("<u8")[:: _UNIT // 8]
        found: list[tuple[int, bytes, _Entry]] = []
        end = 0
        for start in (np.flatnonzero(marks == _MARK) * _UNIT).tolist():
            if start < end:  # inside a record: content that looks like a head
                continue
            head = self._bytes[start : start + _RECORD.size].tobytes()
            _, check, _, length, number, key, user = _RECORD.unpack(head)
            room = _room(length)
            if check != zlib.crc32(head[12:]) or start + room > self._capacity:
                continue
            end = start + room
            found.append((number, key, _Entry(start, room, number, user)))
        for number, key, entry in sorted(found, key=lambda each: each[0]):
            self._wipe(key)
            self._add(key, entry)
            self._number, self._next = number + 1, entry.start + entry.room


def _room(length: int) -> int:
    """Bytes that a record takes whose content has `length` bytes."""
    return -(-(_RECORD.size + length) // _UNIT) * _UNIT


def _head(key: bytes, user: bytes, number: int, content: bytes) -> bytes:
    rest = _RECORD.pack(_MARK, 0, zlib.crc32(content), len(content), number, key, user)[12:]
    return struct.pack("<QI", _MARK, zlib.crc32(rest)) + rest


def _content(record: bytes, key: bytes) -> bytes | None:
    """What a record holds; None where it is not whole, or another key's."""
    if not record:
        return None
    mark, check, content_check, length, _, own, _ = _RECORD.unpack(record[: _RECORD.size])
    content = record[_RECORD.size : _RECORD.size + length]
    whole = mark == _MARK and own == key and check == zlib.crc32(record[12 : _RECORD.size])
    return content if whole and len(content) == length and zlib.crc32(content) == content_check else None


def _opened(path: Path, size: int) -> BinaryIO:
    """The file at its full size on disk, locked; a write to a mapped page that the disk has no room for would end the process."""
    if not path.parent.is_dir():
        raise DataError(f"{path.parent} is not a folder, so no file of memories can be made in it; create it first")
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        head = file.read(HEAD_BYTES)
        if head and not head.startswith(_KIND):
            raise DataError(f"{path} can not be used for memories: it is something else; choose another file")
        if os.fstat(file.fileno()).st_size != size:
            file.truncate(0)
        os.posix_fallocate(file.fileno(), 0, size)
        file.seek(0)
        file.write(_KIND.ljust(HEAD_BYTES, b"\0"))
        file.flush()
    except BlockingIOError:
        file.close()
        raise ConfigError(
            f"{path} holds the memories of another process; choose another file, or share them through redis://"
        ) from None
    except OSError as error:
        file.close()
        raise DataError(f"{path} can not be used for memories: {error.strerror}; {size:,} bytes are wanted") from error
    except DataError:
        file.close()
        raise
    return file
