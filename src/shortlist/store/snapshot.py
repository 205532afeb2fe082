"""Folders that are whole or not there: written beside, hashed file by file, renamed into place, checked when read.

    RUN/manifest.json     format, writing version, and for every other file its size and sha256
    RUN/...               whatever the writer put there

A reader never sees a half-written folder, and a damaged one is refused with the name of the file at fault.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shortlist.data.manifest import MANIFEST as MANIFEST
from shortlist.data.manifest import Manifest as Manifest
from shortlist.data.manifest import read_manifest, write_manifest
from shortlist.errors import SnapshotError

REMEDY = "restore the snapshot from a copy or train again"


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
        manifest = write_manifest(beside)
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
    if not (folder / MANIFEST).is_file():
        raise SnapshotError(
            f"{folder} is not a snapshot: it has no {MANIFEST}; give the folder that `train --out` wrote"
        )
    return read_manifest(folder, remedy=REMEDY, verify=verify)


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


def flush(folder: Path) -> None:
    """Force a file, or a folder with all that is in it, to disk, so that the rename can not outlive the content in a power cut."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
