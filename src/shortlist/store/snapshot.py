"""Folders that are whole or not there: written beside, hashed file by file, renamed into place, checked when read.

    RUN/manifest.json     format, writing version, and for every other file its size and sha256
    RUN/...               whatever the writer put there

A reader never sees a half-written folder, and a damaged one is refused with the name of the file at fault.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shortlist._version import __version__
from shortlist.errors import SnapshotError

MANIFEST = "manifest.json"
FORMAT = 1
REMEDY = "restore the snapshot from a copy or train again"


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """What a file must be."""

    bytes: int
    """Size."""
    sha256: str
    """Digest of the content, hexadecimal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a snapshot holds."""

    format: int
    """Layout of the folder; a reader refuses one it does not know."""
    written_by: str
    """Version of this package that wrote it."""
    written_at: str
    """When, ISO 8601 in UTC."""
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    """Every file but the manifest by its path inside the folder, with forward slashes."""

    @property
    def version(self) -> str:
        """Twelve hexadecimal digits that change when any file changes: what answers and logs call the snapshot's version."""
        lines = "".join(f"{name} {record.sha256}\n" for name, record in sorted(self.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()[:12]


def write_snapshot(folder: Path, write: Callable[[Path], None]) -> Manifest:
    """Let `write` fill a new folder, then put it in the place of `folder`, replacing a snapshot that stands there.

    When `write` raises, nothing has changed.

    Raises:
        SnapshotError: `folder` exists and is something other than a snapshot.
    """
    folder = Path(folder).absolute()
    beside, previous = folder.with_name(f"{folder.name}.writing"), folder.with_name(f"{folder.name}.previous")
    restore_interrupted(folder)
    check_writable(folder)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        write(beside)
        manifest = _describe(beside)
        _write_manifest(beside, manifest)
        flush(beside)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        folder.rename(previous)
    beside.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)
    return manifest


def restore_interrupted(folder: Path) -> None:
    """Put back the snapshot that a writer had moved aside when it died between its two renames. For writers: another may be at work."""
    previous = folder.with_name(f"{folder.name}.previous")
    if previous.exists() and not folder.exists():
        previous.rename(folder)


def check_writable(folder: Path) -> None:
    """SnapshotError where `folder` can not be made or holds something else, so that a long run does not fail at its end."""
    folder = Path(folder).absolute()
    if not folder.name:
        raise SnapshotError(f"{folder} can not be the folder of a snapshot; choose one inside it")
    above = next(parent for parent in folder.parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise SnapshotError(
            f"{folder} can not be made: {above} is not a folder that can be written; choose another place"
        )
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).exists()):
        raise SnapshotError(f"{folder} exists and is not a snapshot; choose another folder or remove it yourself")


def read_snapshot(folder: Path, *, verify: bool = True) -> Manifest:
    """Check a snapshot and give its manifest.

    Args:
        folder: as given to `write_snapshot`.
        verify: read every file and compare its digest; without it only presence and size are checked.

    Raises:
        SnapshotError: the folder, the manifest or a file is missing, damaged or of an unknown format; names the file.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise SnapshotError(f"{path} is missing, though the manifest lists it; {REMEDY}")
        if path.stat().st_size != record.bytes:
            raise SnapshotError(
                f"{path} has {path.stat().st_size:,} bytes where {record.bytes:,} were written; {REMEDY}"
            )
        if verify and _digest(path) != record.sha256:
            raise SnapshotError(f"{path} is damaged: its content is not what was written; {REMEDY}")
    return manifest


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as one safetensors file; those that share memory are written apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; SnapshotError names it when it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise SnapshotError(f"{path} is missing or damaged ({error}); {REMEDY}") from error


def _describe(folder: Path) -> Manifest:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): FileRecord(bytes=path.stat().st_size, sha256=_digest(path))
        for path in paths
    }
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Manifest(format=FORMAT, written_by=__version__, written_at=now, files=files)


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    content = {
        "format": manifest.format,
        "written_by": manifest.written_by,
        "written_at": manifest.written_at,
        "version": manifest.version,
        "files": {name: {"bytes": r.bytes, "sha256": r.sha256} for name, r in manifest.files.items()},
    }
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise SnapshotError(
            f"{folder} is not a snapshot: it has no {MANIFEST}; give the folder that `train --out` wrote"
        )
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise SnapshotError(
                f"{path} is of format {content['format']} and this version reads format {FORMAT}; "
                f"it was written by version {content['written_by']}: use that version or train again"
            )
        manifest = Manifest(
            format=content["format"],
            written_by=content["written_by"],
            written_at=content["written_at"],
            files={name: FileRecord(**record) for name, record in content["files"].items()},
        )
        intact = manifest.version == content["version"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise SnapshotError(f"{path} is damaged ({type(error).__name__}: {error}); {REMEDY}") from error
    if not intact:
        raise SnapshotError(f"{path} is damaged: its list of files is not what was written; {REMEDY}")
    return manifest


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(folder: Path) -> None:
    """Force a file, or a folder with all that is in it, to disk, so that the rename can not outlive the content in a power cut."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
