"""A list of the files of a folder with their sizes and digests, by which a reader knows that each is what was written.

    FOLDER/manifest.json     format, writing version, and for every other file its size and sha256

It tells damage by accident, not forgery: who can write the folder can write its manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from shortlist._version import __version__
from shortlist.errors import SnapshotError

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """What a file must be."""

    bytes: int
    """Size."""
    sha256: str
    """Digest of the content, hexadecimal."""

    def __post_init__(self) -> None:
        if not (isinstance(self.bytes, int) and isinstance(self.sha256, str)):
            raise TypeError(f"a file has a size and a digest, not {self.bytes!r} and {self.sha256!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a folder holds."""

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


def write_manifest(folder: Path) -> Manifest:
    """Read every file beneath the folder and write down what it is."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    files = {
        path.relative_to(folder).as_posix(): FileRecord(bytes=path.stat().st_size, sha256=_digest(path))
        for path in paths
    }
    now = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = Manifest(format=FORMAT, written_by=__version__, written_at=now, files=files)
    content = {
        "format": manifest.format,
        "written_by": manifest.written_by,
        "written_at": manifest.written_at,
        "version": manifest.version,
        "files": {name: {"bytes": r.bytes, "sha256": r.sha256} for name, r in manifest.files.items()},
    }
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")
    return manifest


def read_manifest(folder: Path, *, remedy: str, verify: bool = True) -> Manifest:
    """The manifest of a folder, once every file is found to be what it says.

    Args:
        folder: as given to `write_manifest`.
        remedy: what to do about damage, in words that follow a semicolon.
        verify: read every file and compare its digest; without it only presence and size are checked.

    Raises SnapshotError: the manifest or a file is missing, damaged or of an unknown format; names the file.
    """
    manifest = _parsed(folder / MANIFEST, remedy)
    for name, record in manifest.files.items():
        path = folder / name
        try:
            size = path.stat().st_size if path.is_file() else None
        except OSError as error:
            raise SnapshotError(
                f"{path.parent} holds no file that can be read under {name[:80]!r}; {remedy}"
            ) from error
        if size is None:
            raise SnapshotError(f"{path} is missing, though the manifest lists it; {remedy}")
        if size != record.bytes:
            raise SnapshotError(f"{path} has {size:,} bytes where {record.bytes:,} were written; {remedy}")
        if verify and _digest(path) != record.sha256:
            raise SnapshotError(f"{path} is damaged: its content is not what was written; {remedy}")
    return manifest


def read_json(path: Path, *, remedy: str) -> dict[str, Any]:
    """The object in a JSON file; SnapshotError names it where it is missing, or holds anything else, or is nested too deeply to be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SnapshotError(f"{path} is missing or can not be read ({error.strerror}); {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise SnapshotError(f"{path} is damaged ({type(error).__name__}: {error}); {remedy}") from error
    if not isinstance(content, dict):
        raise SnapshotError(f"{path} is damaged: it holds no object; {remedy}")
    return content


def _parsed(path: Path, remedy: str) -> Manifest:
    content = read_json(path, remedy=remedy)
    try:
        if content["format"] != FORMAT:
            raise SnapshotError(
                f"{path} is of format {content['format']} and this version reads format {FORMAT}; "
                f"it was written by version {content['written_by']}: use that version, or {remedy}"
            )
        manifest = Manifest(
            format=content["format"],
            written_by=content["written_by"],
            written_at=content["written_at"],
            files={name: FileRecord(**record) for name, record in content["files"].items()},
        )
        intact = manifest.version == content["version"]
    except (KeyError, TypeError, AttributeError, UnicodeEncodeError) as error:
        raise SnapshotError(f"{path} is damaged ({type(error).__name__}: {error}); {remedy}") from error
    if not intact:
        raise SnapshotError(f"{path} is damaged: its list of files is not what was written; {remedy}")
    for name in manifest.files:
        if not is_inside(name):
            raise SnapshotError(f"{path} is damaged: it lists {name[:80]!r}, which is outside its folder; {remedy}")
    return manifest


def is_inside(name: str) -> bool:
    """Whether a path with forward slashes stays in the folder that it is joined to."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
