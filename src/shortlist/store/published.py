"""A place where versions of a run are published, and which of them is served now.

    PLACE/current.json             the version that is served, and all versions in the order in which they were published
    PLACE/3f2a09c41b7d/            a run, as `shortlist train --out` wrote it
    PLACE/3f2a09c41b7d.allocation  and what stood beside it there: calibrations, summaries, text index, report

A version is copied beside its place, checked against its own digests and renamed; `current.json` is replaced in one step after that.
So whoever reads the place, also in the middle of a publication or after a kill -9, finds a whole run. Versions never change, which
allows files to be shared (hard links) with the run they came from.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from shortlist.data.manifest import read_json
from shortlist.errors import ConfigError, SnapshotError
from shortlist.store.snapshot import MANIFEST, flush, read_snapshot

CURRENT = "current.json"
FORMAT = 1
KEEP = 5
"""Versions that stay in a place where nobody says another number."""
BESIDE = (".allocation", ".search", ".summaries.*", ".clicks.json", "-report")
"""What belongs to a run and stands beside it: how such a name goes on after that of the run."""
_VERSION = re.compile(r"[0-9a-f]{12}")
_REMEDY = "publish a run to the place again"
_LOCK, _COPYING, _LEAVING = ".lock", "publishing", "leaving"


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """A run in a place."""

    version: str
    """Of its snapshot; also the name of its folder."""
    published_at: str
    """When, ISO 8601 in UTC."""
    note: str = ""
    """What whoever published it had to say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What a place holds."""

    current: str
    """The version that is served."""
    versions: tuple[Version, ...]
    """In the order in which they were published, oldest first."""

    def get(self, version: str) -> Version | None:
        """The version of that name."""
        return next((one for one in self.versions if one.version == version), None)

    def before(self) -> Version | None:
        """The version that was published before the current one; None where there is none."""
        place = [one.version for one in self.versions].index(self.current)
        return self.versions[place - 1] if place else None


def is_place(folder: Path) -> bool:
    """Whether runs were published to this folder."""
    return (Path(folder) / CURRENT).is_file()


def served_run(folder: Path) -> Path:
    """The folder of the run to serve: of a place its current version, of a run itself. SnapshotError where `current.json` is damaged."""
    return Place(folder).current_run if is_place(folder) else Path(folder)


class Place:
    """A folder of published runs; several processes may publish to and read from it at once.

    Args:
        folder: where versions are, made by the first publication.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).absolute()

    def state(self) -> State:
        """What is there now; SnapshotError where nothing was published yet, or `current.json` is damaged."""
        path = self.folder / CURRENT
        if not path.exists():
            raise SnapshotError(
                f"{self.folder} holds no published run; publish one with `shortlist publish RUN --to {self.folder}`"
            )
        content = read_json(path, remedy=_REMEDY)
        try:
            if content["format"] != FORMAT:
                raise SnapshotError(f"{path} is of format {content['format']} and this version reads format {FORMAT}")
            state = State(
                current=content["current"], versions=tuple(Version(**version) for version in content["versions"])
            )
            strange = [one.version for one in state.versions if not _is_version(one.version)]
        except (KeyError, TypeError, AttributeError) as error:
            raise SnapshotError(f"{path} is damaged ({error}); {_REMEDY}") from error
        if strange:
            raise SnapshotError(f"{path} is damaged: {strange[0]!r:.80} is no version; {_REMEDY}")
        if state.get(state.current) is None:
            raise SnapshotError(
                f"{path} is damaged: its current version {state.current!r:.80} is not among its versions; {_REMEDY}"
            )
        return state

    def run(self, version: str) -> Path:
        """Folder of a version."""
        return self.folder / version

    @property
    def current_run(self) -> Path:
        """Folder of the version that is served; SnapshotError as `state`."""
        return self.run(self.state().current)

    def stamp(self) -> tuple[int, int, int] | None:
        """Changes whenever `current.json` is replaced; cheap to ask for. None where there is none."""
        try:
            found = (self.folder / CURRENT).stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def publish(self, run: Path, *, keep: int = KEEP, link: bool = True, note: str = "") -> Version:
        """Copy a run and what stands beside it into the place, and make it the current version.

        Args:
            run: a folder that `shortlist train --out` wrote.
            keep: versions that stay, the current one among them; older ones are removed.
            link: share files with the run where the file system allows it; False = always copy.
            note: kept with the version.

        Raises:
            SnapshotError: the run is damaged (names the file), or the place is a folder of something else. Nothing has changed then.
            ConfigError: `keep` is below 1.
        """
        if keep < 1:
            raise ConfigError(f"keep must be at least 1, got {keep}: the current version always stays")
        run = Path(run).absolute()
        version = read_snapshot(run).version
        self._make()
        with self._locked():
            before = self.state() if is_place(self.folder) else None
            self._clear(before)
            for path in _beside(run):
                self._bring(path, version, f"{version}{path.name.removeprefix(run.name)}", link=False)
            if not self._is_whole(version):
                self._bring(run, version, version, link=link)
            made = Version(version=version, published_at=datetime.now(UTC).isoformat(timespec="seconds"), note=note)
            others = () if before is None else before.versions
            versions = (*(one for one in others if one.version != version), made)[-keep:]
            state = State(current=version, versions=versions)
            self._write(state)
            self._clear(state)
        return made

    def select(self, version: str) -> Version:
        """Make a version that is there the current one.

        Raises SnapshotError, and changes nothing, where it is not there or is damaged; names the file.
        """
        with self._locked():
            state = self.state()
            chosen = state.get(version)
            if chosen is None:
                there = ", ".join(one.version for one in state.versions)
                raise SnapshotError(f"{self.folder} has no version {version!r}; it has {there}")
            self._check(version)
            self._write(State(current=version, versions=state.versions))
        return chosen

    def rollback(self, version: str | None = None) -> Version:
        """Go back to a version: the one given, else the one that was published before the current one; raises as `select`."""
        if version is None:
            before = self.state().before()
            if before is None:
                raise SnapshotError(
                    f"{self.folder} has no version from before the current one; name one of its versions"
                )
            version = before.version
        return self.select(version)

    # -- files ---------------------------------------------------------------------------------------------------

    def _make(self) -> None:
        if self.folder.is_dir() and not is_place(self.folder):
            strange = [path.name for path in self.folder.iterdir() if path.name != _LOCK and not _is_ours(path.name)]
            if strange:
                raise SnapshotError(
                    f"{self.folder} holds {strange[0]} and is no place of published runs; choose a folder of its own"
                )
        self.folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time; the lock of one that was killed is free at once."""
        if not self.folder.is_dir():
            raise SnapshotError(f"{self.folder} is not a folder; publish a run to it first")
        with (self.folder / _LOCK).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _is_whole(self, version: str) -> bool:
        """Whether the version is there already, and undamaged; what is left of a damaged one is removed."""
        if not self.run(version).exists():
            return False
        try:
            self._check(version)
        except SnapshotError:
            self._remove(self.run(version))
            return False
        return True

    def _check(self, version: str) -> None:
        found = read_snapshot(self.run(version)).version
        if found != version:
            raise SnapshotError(f"{self.run(version) / MANIFEST} is of version {found}; publish the run again")

    def _bring(self, source: Path, version: str, name: str, *, link: bool) -> None:
        """A file or folder, copied beside its name and then renamed to it; a run is checked in between."""
        beside, target = self.folder / f"{name}.{_COPYING}", self.folder / name
        copy = _link if link else shutil.copy2
        if source.is_dir():
            shutil.copytree(source, beside, copy_function=copy)
        else:
            copy(source, beside)
        if name == version and read_snapshot(beside).version != version:
            raise SnapshotError(f"{source} was replaced while it was copied; publish it again")
        flush(beside)
        if target.is_dir():
            self._remove(target)
        os.replace(beside, target)

    def _write(self, state: State) -> None:
        """Replace `current.json` in one step."""
        content = {"format": FORMAT, "current": state.current, "versions": [asdict(one) for one in state.versions]}
        beside = self.folder / f"{CURRENT}.{_COPYING}"
        with beside.open("w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.folder / CURRENT)
        _flush_names(self.folder)

    def _clear(self, state: State | None) -> None:
        """Remove what a writer that was killed has left, and versions that are no longer listed."""
        listed = set() if state is None else {one.version for one in state.versions}
        for path in self.folder.iterdir():
            name = path.name
            if name in (CURRENT, _LOCK) or not _is_ours(name):
                continue
            if name.endswith((f".{_COPYING}", f".{_LEAVING}")) or _version(name) not in listed:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """First out of its name, so that nobody meets half of it."""
        leaving = path if path.name.endswith(f".{_LEAVING}") else path.with_name(f"{path.name}.{_LEAVING}")
        if leaving != path:
            shutil.rmtree(leaving, ignore_errors=True)
            os.replace(path, leaving)
        if leaving.is_dir():
            shutil.rmtree(leaving)
        else:
            leaving.unlink()


def _is_ours(name: str) -> bool:
    """Whether a name in a place is one that publishing gives: a version, what stands beside one, or `current.json` being written."""
    return name.startswith(f"{CURRENT}.") or _version(name) is not None


def _version(name: str) -> str | None:
    """The version that a name in a place belongs to."""
    head = re.split(r"[.-]", name, maxsplit=1)[0]
    return head if _is_version(head) else None


def _is_version(name: object) -> bool:
    """Whether it is what a snapshot's version looks like, so that a path made with it stays in the place."""
    return isinstance(name, str) and _VERSION.fullmatch(name) is not None


def _beside(run: Path) -> list[Path]:
    """What stands beside a run and belongs to it; locks and what is being written do not."""
    found = [path for kind in BESIDE for path in sorted(run.parent.glob(f"{_literal(run.name)}{kind}"))]
    return [path for path in found if not path.name.endswith((".lock", ".writing", ".previous", ".part"))]


def _literal(name: str) -> str:
    """A name whose letters stand for themselves in a pattern of files."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _link(source: str | Path, target: str | Path) -> None:
    """The same file under another name; a copy where the file system allows no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _flush_names(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
