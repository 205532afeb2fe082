"""Summaries of users' histories in one file: int8, memory-mapped, of one version, whole or not there.

    NAME                head | records | keys in order | their records          what `SummaryStore.open` reads
    NAME.part           head | records so far                                   what a refresh that was stopped goes on from

Records are appended and forced to disk chunk by chunk, so a writer that is killed loses the chunk at hand; the file takes its place by a
rename when it is complete. A record is found by the first half of its key's digest and checked by the second. Summaries of another
version of the encoder are refused: read by this one they would be noise.

N users, K tokens of D numbers each.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shortlist.errors import SnapshotError
from shortlist.models.base import Memory

HEAD_BYTES = 4_096
FORMAT = 1
REMEDY = "run `shortlist refresh` again"
LOOK_S = 1.0
"""Seconds between two looks whether a newer file has taken the place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SummaryHead:
    """What a file of summaries says of itself."""

    version: str
    """Of the snapshot whose encoder made them."""
    system: str
    """Name of the system in the run."""
    num_tokens: int
    """K."""
    width: int
    """D."""
    num_users: int = 0
    """N; 0 while the file is being written."""
    sha256: str = ""
    """Digest of everything after the head, hexadecimal; empty while the file is being written."""
    format: int = FORMAT
    """Layout of the file."""

    @property
    def record(self) -> np.dtype[Any]:
        """Layout of one user's record."""
        shape = (self.num_tokens, self.width)
        return np.dtype(
            [
                ("key", "<u8"),
                ("check", "<u8"),
                ("time", "<i8"),
                ("num_events", "<i8"),
                ("scale", "<f4", shape[:1]),
                ("code", "i1", shape),
            ]
        )

    @property
    def bytes_per_user(self) -> int:
        """Record and index."""
        return self.record.itemsize + 16


def key_digests(keys: Sequence[str]) -> NDArray[np.uint64]:
    """uint64 [n, 2]: both halves of each key's digest."""
    joined = b"".join(hashlib.blake2b(key.encode(), digest_size=16).digest() for key in keys)
    return np.frombuffer(joined, dtype="<u8").reshape(-1, 2)


class SummaryStore:
    """Reads summaries of one file; safe to use from many threads.

    When a newer file has taken its place, `renewed` says so once, and the new one is read from then on; one of another version is not.
    """

    def __init__(self, path: Path, head: SummaryHead) -> None:
        self.path, self.head = path, head
        self._lock = threading.Lock()
        self._stamp = _stamp(path)
        self._looked = time.monotonic()
        self._arrays = _mapped(path, head)

    @classmethod
    def open(cls, path: Path, *, version: str, verify: bool = True) -> SummaryStore:
        """Open a complete file.

        Args:
            version: of the snapshot that reads.
            verify: compare the digest of the content; without it only the size is checked.

        Raises SnapshotError: missing, damaged, incomplete, of an unknown format or another version; names the file.
        """
        head = read_head(path)
        if head.version != version:
            raise SnapshotError(f"{path} holds summaries of snapshot {head.version}, this is {version}; {REMEDY}")
        expected = HEAD_BYTES + head.num_users * head.bytes_per_user
        if not head.sha256 or path.stat().st_size != expected:
            raise SnapshotError(f"{path} has {path.stat().st_size:,} bytes where {expected:,} are expected; {REMEDY}")
        if verify and _body_digest(path) != head.sha256:
            raise SnapshotError(f"{path} is damaged: its content is not what was written; {REMEDY}")
        return cls(path, head)

    def __len__(self) -> int:
        """N."""
        return self.head.num_users

    def get(self, keys: Sequence[str]) -> list[Memory | None]:
        """Per user the summary as a memory: code int8 [K, D], scale float32 [K], time and num_events int64; None where there is none."""
        with self._lock:
            ordered, places, records = self._arrays
        if not len(ordered):
            return [None] * len(keys)
        digest_n2 = key_digests(keys)
        first = np.searchsorted(ordered, digest_n2[:, 0])
        found: list[Memory | None] = []
        for at, (key, check) in zip(first.tolist(), digest_n2):
            memory = None
            while at < len(ordered) and ordered[at] == key:  # digests whose first halves are equal stand side by side
                record = records[places[at]]
                if record["check"] == check:
                    memory = _memory(record)
                    break
                at += 1
            found.append(memory)
        return found

    def forget(self, key: str) -> bool:
        """Write zeros over a user's summary, in the file that is read; whether there was one. SnapshotError where that is not possible."""
        with self._lock:
            if not self.head.num_users:
                return False
            ordered, places, records = self._arrays
            digest = key_digests([key])[0]
            first = np.searchsorted(ordered, digest[0])
            same = places[first : np.searchsorted(ordered, digest[0], side="right")]
            mine = [int(place) for place in same if records[int(place)]["check"] == digest[1]]
            if not mine:
                return False
            try:
                self.head = _wipe(self.path, self.head, mine)
            except OSError as error:
                raise SnapshotError(f"{self.path}: a summary can not be wiped ({error}); delete the file") from error
            self._stamp = _stamp(self.path)
            return True

    def generation(self) -> str:
        """Digest of what the file holds."""
        with self._lock:
            return self.head.sha256[:16]

    def renewed(self) -> bool:
        """Whether another file of the same version stands in the place since the last call; looks about once a second."""
        with self._lock:
            if time.monotonic() - self._looked < LOOK_S:
                return False
            self._looked = time.monotonic()
            stamp = _stamp(self.path)
            if stamp is None or stamp == self._stamp:
                return False
            self._stamp = stamp
            try:
                fresh = SummaryStore.open(self.path, version=self.head.version, verify=False)
            except SnapshotError:
                return False  # of another snapshot: the one at hand still fits this encoder
            self.head, self._arrays = fresh.head, fresh._arrays
            return True


class SummaryWriter:
    """Writes summaries of users in a fixed order, and goes on where an earlier one of the same head was stopped.

        with SummaryWriter(path, head, keys) as writer:
            while writer.num_done < len(keys):
                writer.append(columns of some users from keys[writer.num_done] on)
            writer.finish()

    Args:
        path: of the finished file.
        head: what the file is about.
        keys: of all users, in order; an earlier writer's records count as far as they are those of the same users.
        fresh: begin anew in any case.

    Raises SnapshotError where another writer is at work on the same file.
    """

    def __init__(self, path: Path, head: SummaryHead, keys: Sequence[str], *, fresh: bool = False) -> None:
        self.path, self.head = Path(path), head
        self._part = self.path.with_name(f"{self.path.name}.part")
        self._digest_N2 = key_digests(keys)
        self._file = os.fdopen(os.open(self._part, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise SnapshotError(f"{self._part} is being written by another refresh; wait for it to end") from None
        self.num_done = 0 if fresh else self._found()
        self._file.write(_head_bytes(head))
        self._file.truncate(HEAD_BYTES + self.num_done * head.record.itemsize)
        self._file.seek(0, os.SEEK_END)

    def __enter__(self) -> SummaryWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, columns: Mapping[str, NDArray[Any]]) -> None:
        """Add the next users' records, and return when they are on disk.

        Args:
            columns: code int8 [n, K, D], scale float32 [n, K], time and num_events int64 [n].
        """
        count = len(columns["time"])
        records = np.zeros(count, dtype=self.head.record)
        records["key"], records["check"] = self._digest_N2[self.num_done : self.num_done + count].T
        for name in ("time", "num_events", "scale", "code"):
            records[name] = columns[name]
        self._file.write(records.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.num_done += count

    def finish(self) -> SummaryHead:
        """Add the index and put the file in its place; its head. Raises ValueError before the last user was written."""
        if self.num_done != len(self._digest_N2):
            raise ValueError(f"{self.num_done:,} of {len(self._digest_N2):,} users are written")
        order = np.lexsort((self._digest_N2[:, 1], self._digest_N2[:, 0]))
        self._file.write(np.ascontiguousarray(self._digest_N2[order, 0]).tobytes())
        self._file.write(order.astype("<i8").tobytes())
        self._file.flush()
        told = {**asdict(self.head), "num_users": self.num_done, "sha256": _body_digest(self._part)}
        head = SummaryHead(**told)
        self._file.seek(0)
        self._file.write(_head_bytes(head))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._part, self.path)
        descriptor = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return head

    def _found(self) -> int:
        """Whole records of an earlier writer with the same head and the same first keys."""
        try:
            if read_head(self._part) != self.head:
                return 0
        except SnapshotError:
            return 0
        count = (self._part.stat().st_size - HEAD_BYTES) // self.head.record.itemsize
        count = min(count, len(self._digest_N2))
        if count < 1:
            return 0
        records = np.memmap(self._part, self.head.record, "r", HEAD_BYTES, (count,))
        same = (records["key"] == self._digest_N2[:count, 0]) & (records["check"] == self._digest_N2[:count, 1])
        return count if same.all() else int(same.argmin())


def _wipe(path: Path, head: SummaryHead, places: Sequence[int]) -> SummaryHead:
    """Zeros in place of records, but for the first half of the key's digest, by which the index is in order; the new head."""
    with path.open("r+b") as file:
        for place in places:
            file.seek(HEAD_BYTES + place * head.record.itemsize + 8)
            file.write(bytes(head.record.itemsize - 8))
        file.flush()
        head = replace(head, sha256=_body_digest(path))
        file.seek(0)
        file.write(_head_bytes(head))
        file.flush()
        os.fsync(file.fileno())
    return head


def read_head(path: Path) -> SummaryHead:
    """What a file says of itself; SnapshotError names one that is missing, damaged or of an unknown format."""
    try:
        with path.open("rb") as file:
            told = json.loads(file.read(HEAD_BYTES).rstrip(b"\0"))
        head = SummaryHead(**told)
    except (OSError, ValueError, TypeError) as error:
        raise SnapshotError(f"{path} is missing or no file of summaries ({error}); {REMEDY}") from error
    if head.format != FORMAT:
        raise SnapshotError(f"{path} is of format {head.format} and this version reads format {FORMAT}; {REMEDY}")
    return head


def _mapped(path: Path, head: SummaryHead) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Keys in order uint64 [N], the place int64 [N] of each one's record, and the records [N]."""
    n = head.num_users
    if not n:
        return np.zeros(0, "<u8"), np.zeros(0, "<i8"), np.zeros(0, head.record)
    at = HEAD_BYTES + n * head.record.itemsize
    return (
        np.memmap(path, "<u8", "r", at, (n,)),
        np.memmap(path, "<i8", "r", at + 8 * n, (n,)),
        np.memmap(path, head.record, "r", HEAD_BYTES, (n,)),
    )


def _memory(record: Any) -> Memory:
    """One record as tensors of its own, so that no thread keeps a page of the file."""
    return {
        "code": torch.from_numpy(record["code"].copy()),
        "scale": torch.from_numpy(record["scale"].astype(np.float32)),
        "time": torch.tensor(int(record["time"])),
        "num_events": torch.tensor(int(record["num_events"])),
    }


def _head_bytes(head: SummaryHead) -> bytes:
    return json.dumps(asdict(head)).encode().ljust(HEAD_BYTES, b"\0")


def _body_digest(path: Path) -> str:
    digest = hashlib.sha256()
    for part in _body(path):
        digest.update(part)
    return digest.hexdigest()


def _body(path: Path, size: int = 1 << 20) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(HEAD_BYTES)
        while part := file.read(size):
            yield part


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
