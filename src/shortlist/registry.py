"""The one list of published systems: what the docs table, the tests, the command line and the benchmarks all read.

A system registers itself where it is defined:

    @system("din", stage="ranking", paper="Zhou et al., KDD 2018", needs={"history"}, tiny={"dim": 4})
    class DIN(Ranker): ...

and is found without being imported by name anywhere. Systems of your own are found in every folder named in the
environment variable SHORTLIST_SYSTEMS (separated like PATH).
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from shortlist.errors import ConfigError, UnknownSystem

Need = Literal["order", "clock", "history", "user_fields", "item_fields", "context", "pair", "text", "image"]
NEEDS: tuple[Need, ...] = (
    "order",
    "clock",
    "history",
    "user_fields",
    "item_fields",
    "context",
    "pair",
    "text",
    "image",
)

PACKAGES = (
    "shortlist.embeddings",
    "shortlist.layers",
    "shortlist.models",
    "shortlist.training",
    "shortlist.cascade",
)
ENVIRONMENT = "SHORTLIST_SYSTEMS"

T = TypeVar("T", bound=type)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One registered system."""

    name: str
    """Name in configs, evidence and docs: the digest's file name, lower case."""
    kind: str
    """Contract it fulfils: retriever, ranker, reranker, encoder, table, layer, gradient-rule, allocator, ..."""
    stage: str
    """Where it usually acts: retrieval, pre-ranking, ranking, re-ranking, or the room it belongs to."""
    cls: type
    """The class; `cls(config, space)` builds it, `cls.Config` is its settings class."""
    paper: str
    """Source: authors, venue, year; or "baseline"."""
    needs: frozenset[str]
    """What a log must offer: a subset of NEEDS."""
    cold_users: bool
    """True where a user without history or training events still gets a personal or sensible answer."""
    cold_items: bool
    """True where an item without training events can be recommended through its fields."""
    tiny: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Settings that make it small enough for the contract tests."""

    @property
    def summary(self) -> str:
        """First sentence of the class's docstring."""
        return (self.cls.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".") + "."

    def config(self, settings: Mapping[str, Any] | None = None) -> Any:
        """Settings object of the system with `settings` over its defaults; ConfigError on an unknown name."""
        known = list(getattr(self.cls.Config, "__dataclass_fields__", {}))  # type: ignore[attr-defined]
        for key in settings or {}:
            if key not in known:
                raise ConfigError(f"{self.name} has no setting {key!r}: {nearest(key, known)}")
        return self.cls.Config(**(settings or {}))  # type: ignore[attr-defined]


_ENTRIES: dict[str, Entry] = {}
_DISCOVERED: set[str] = set()


def system(
    name: str,
    *,
    stage: str,
    paper: str,
    needs: Collection[Need] = (),
    cold_users: bool = False,
    cold_items: bool = False,
    tiny: Mapping[str, Any] | None = None,
) -> Callable[[T], T]:
    """Register the decorated class under `name`; its kind is the class attribute `kind` of its contract.

    Raises ConfigError when the name is taken by another class or the class has no `kind` or no `Config`.
    """

    def register(cls: T) -> T:
        taken = _ENTRIES.get(name)
        if taken is not None and (taken.cls.__module__, taken.cls.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(f"system {name!r} is defined twice: in {taken.cls.__module__} and in {cls.__module__}")
        for attribute in ("kind", "Config"):
            if not hasattr(cls, attribute):
                raise ConfigError(
                    f"system {name!r}: {cls.__qualname__} has no {attribute!r}; inherit a kind from models/base.py"
                )
        unknown = set(needs) - set(NEEDS)
        if unknown:
            raise ConfigError(
                f"system {name!r} needs {sorted(unknown)}, which no log can offer; choose from {list(NEEDS)}"
            )
        _ENTRIES[name] = Entry(
            name=name,
            kind=cls.kind,  # type: ignore[attr-defined]
            stage=stage,
            cls=cls,
            paper=paper,
            needs=frozenset(needs),
            cold_users=cold_users,
            cold_items=cold_items,
            tiny=MappingProxyType(dict(tiny or {})),
        )
        return cls

    return register


def systems(*, kind: str | None = None, stage: str | None = None) -> list[Entry]:
    """All registered systems, sorted by name, filtered by kind and stage where given."""
    discover()
    entries = sorted(_ENTRIES.values(), key=lambda entry: entry.name)
    return [e for e in entries if kind in (None, e.kind) and stage in (None, e.stage)]


def find(name: str) -> Entry:
    """The entry called `name`; UnknownSystem names the nearest ones."""
    discover()
    if name not in _ENTRIES:
        raise UnknownSystem(
            f"no system named {name!r}: {nearest(name, list(_ENTRIES), 'run `shortlist systems` for the list')}"
        )
    return _ENTRIES[name]


def discover() -> None:
    """Import every module that may hold a system: the package's own rooms, then the folders in SHORTLIST_SYSTEMS."""
    for package in PACKAGES:
        if package not in _DISCOVERED:
            _DISCOVERED.add(package)
            root = importlib.import_module(package)
            for module in pkgutil.walk_packages(root.__path__, f"{package}."):
                importlib.import_module(module.name)
    for folder in filter(None, os.environ.get(ENVIRONMENT, "").split(os.pathsep)):
        if folder not in _DISCOVERED:
            _import_folder(Path(folder))
            _DISCOVERED.add(folder)


@contextmanager
def registered(path: Path, module_name: str) -> Iterator[None]:
    """Inside the block the systems of one file are registered, under that name of its module, and forgotten after it."""
    before, module_before = dict(_ENTRIES), sys.modules.get(module_name)
    try:
        _import_file(path, module_name)
        yield
    finally:
        _ENTRIES.clear()
        _ENTRIES.update(before)
        sys.modules.pop(module_name, None)
        if module_before is not None:
            sys.modules[module_name] = module_before


def _import_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(f"{ENVIRONMENT} names {folder}, which is not a folder; correct or unset it")
    for path in sorted(folder.glob("*.py")):
        if path.name.startswith(("_", "test_")):
            continue
        _import_file(path, f"shortlist_systems_{path.stem}")


def _import_file(path: Path, module_name: str) -> None:
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} can not be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)


def nearest(name: str, known: list[str], otherwise: str = "") -> str:
    """What to say of a name that is not known: up to three that look like it, else `otherwise`, else all that are known."""
    near = difflib.get_close_matches(name, known, n=3)
    return (
        f"did you mean {' or '.join(near)}?" if near else otherwise or f"known are {', '.join(sorted(known)) or 'none'}"
    )
