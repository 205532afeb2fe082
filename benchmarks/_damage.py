"""Ways to damage the files that Shortlist writes, and a payload that tells when code in a file was run.

    change = CHANGES["one bit"]
    change.work(path, lot)            the file at the path is another one now
    seal(folder)                      and the manifest agrees with it

A change takes a file and a lot (a numpy generator) and says in words what it did.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors.torch import load_file, save_file

from shortlist.data.manifest import MANIFEST, write_manifest

MARK = Path(tempfile.gettempdir()) / f"shortlist-code-ran-{os.getpid()}"
"""Folder that is there once the payload has run, in this process or in one that reads its files."""
Lot = np.random.Generator


class Loud:
    """Runs code when it is unpickled: leaves the mark, and raises what no handler expects."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"import os; os.makedirs({str(MARK)!r}, exist_ok=True); raise SystemExit({str(MARK)!r})",)


PICKLE = pickle.dumps(Loud())


def code_ran() -> bool:
    """Whether the payload has run since this was last asked."""
    ran = MARK.exists()
    shutil.rmtree(MARK, ignore_errors=True)
    return ran


def object_array() -> bytes:
    """A .npy whose elements are pickled."""
    made = io.BytesIO()
    np.save(made, np.array([Loud()], dtype=object), allow_pickle=True)
    return made.getvalue()


def torch_pickle() -> bytes:
    """What torch.save writes."""
    made = io.BytesIO()
    torch.save({"x": Loud()}, made)
    return made.getvalue()


def seal(folder: Path) -> None:
    """Write every manifest beneath anew, the innermost first, so that only the content itself is left to give a change away."""
    for path in sorted(folder.rglob(MANIFEST), key=lambda path: -len(path.parts)):
        write_manifest(path.parent)


# -- by content ---------------------------------------------------------------------------------------------------------


def array(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Changes the array of a .npy."""
    return lambda path: np.save(path, change(np.load(path)))


def put(place: int, value: float) -> Callable[[Path], None]:
    """Puts a number into the array of a .npy."""

    def change(found: np.ndarray) -> np.ndarray:
        found = found.copy()
        found[place] = value
        return found

    return array(change)


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    """Changes the tensors of a safetensors file."""
    return lambda path: save_file({name: t.contiguous() for name, t in change(load_file(path)).items()}, path)


def table(change: Callable[[pl.DataFrame], pl.DataFrame]) -> Callable[[Path], None]:
    """Changes the table of a Parquet file."""
    return lambda path: change(pl.read_parquet(path)).write_parquet(path)


def raw(content: bytes) -> Callable[[Path], None]:
    """Puts bytes in place of the content."""

    def work(path: Path) -> None:
        path.write_bytes(content)

    return work


def text(content: str) -> Callable[[Path], None]:
    """Puts text in place of the content."""
    return raw(content.encode())


def instead(old: str, new: str) -> Callable[[Path], None]:
    """Replaces words."""

    def work(path: Path) -> None:
        path.write_text(path.read_text().replace(old, new))

    return work


# -- at random ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Change:
    """One way to damage a file."""

    work: Callable[[Path, Lot], None]
    suffixes: tuple[str, ...] = ()
    """Of the files that it fits; empty = any file."""
    name: str = ""
    """Of the files that it fits; empty = any."""

    def fits(self, path: Path) -> bool:
        """Whether the file can be changed in this way."""
        return (not self.suffixes or path.suffix in self.suffixes) and (not self.name or path.name == self.name)


def _one_bit(path: Path, lot: Lot) -> None:
    content = bytearray(path.read_bytes())
    content[lot.integers(len(content))] ^= 1 << int(lot.integers(8))
    path.write_bytes(content)


def _scratch(path: Path, lot: Lot) -> None:
    content = path.read_bytes()
    at = int(lot.integers(len(content)))
    path.write_bytes(content[:at] + lot.bytes(min(64, len(content) - at)) + content[at + 64 :])


def _cut(path: Path, lot: Lot) -> None:
    os.truncate(path, int(lot.integers(1, path.stat().st_size)))


def _longer(path: Path, lot: Lot) -> None:
    path.write_bytes(path.read_bytes() + lot.bytes(40))


def _folder(path: Path, _: Lot) -> None:
    path.unlink()
    path.mkdir()


def _swapped(path: Path, lot: Lot) -> None:
    others = [other for other in sorted(path.parent.iterdir()) if other.is_file() and other != path]
    other = others[lot.integers(len(others))] if others else path
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


def _json(change: Callable[[Any, Lot], Any]) -> Callable[[Path, Lot], None]:
    """Changes one leaf of a JSON file, chosen at random."""

    def work(path: Path, lot: Lot) -> None:
        content = json.loads(path.read_text())
        places = list(_leaves(content))
        holder, key = places[lot.integers(len(places))]
        holder[key] = change(holder[key], lot)
        path.write_text(json.dumps(content))

    return work


def _leaves(value: Any) -> Any:
    """Every place in a JSON value that holds no further places: its holder and its key there."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in list(inner):
        if isinstance(one, dict | list) and one:
            yield from _leaves(one)
        else:
            yield value, key


def _other_type(value: Any, lot: Lot) -> Any:
    return ([], {"a": 1}, None, True, 7, "seven", [[1]])[lot.integers(7)]


def _key_gone(path: Path, lot: Lot) -> None:
    content = json.loads(path.read_text())
    holders = [content, *(value for value in content.values() if isinstance(value, dict) and value)]
    holder = holders[lot.integers(len(holders))]
    del holder[sorted(holder)[lot.integers(len(holder))]]
    path.write_text(json.dumps(content))


def _outside(path: Path, lot: Lot) -> None:
    """A name in the file leads to a file that is there, outside the folder, and a manifest says what it is."""
    content = json.loads(path.read_text())
    names = ("../outside", "../../outside", "/etc/hostname", "..", "a\0b", "x" * 5_000, "\ud800")
    name = names[lot.integers(len(names))]
    if path.name == MANIFEST:
        files = content["files"]
        files[name] = files.pop(sorted(files)[lot.integers(len(files))])
    else:
        holder, key = _named(content)
        holder[key] = name
    path.write_text(json.dumps(content))


def _named(content: dict[str, Any]) -> tuple[Any, Any]:
    """Where a record names a file or a version."""
    return (content["files"], 0) if "files" in content else (content, "current")


def _line(change: Callable[[str, Lot], str]) -> Callable[[Path, Lot], None]:
    """Changes the value of one `key = value` line of a TOML file."""

    def work(path: Path, lot: Lot) -> None:
        lines = path.read_text().splitlines()
        at = [n for n, line in enumerate(lines) if re.match(r"[\w-]+ = ", line)]
        if at:
            n = at[lot.integers(len(at))]
            key, _, value = lines[n].partition(" = ")
            lines[n] = f"{key} = {change(value, lot)}"
        path.write_text("\n".join(lines) + "\n")

    return work


def _one(found: dict[str, torch.Tensor], lot: Lot) -> str:
    return sorted(found)[lot.integers(len(found))]


def _tensors(change: Callable[[torch.Tensor, Lot], torch.Tensor | None]) -> Callable[[Path, Lot], None]:
    """Changes one tensor of a file, or takes it out."""

    def work(path: Path, lot: Lot) -> None:
        found = load_file(path)
        if not found:
            return
        name = _one(found, lot)
        made = change(found.pop(name), lot)
        if made is not None:
            found[name] = made
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, path)

    return work


def _array(change: Callable[[np.ndarray, Lot], np.ndarray]) -> Callable[[Path, Lot], None]:
    return lambda path, lot: np.save(path, change(np.load(path), lot))


def _far(found: Any, lot: Lot) -> Any:
    """One number is far out of range."""
    made = found.clone() if isinstance(found, torch.Tensor) else found.copy()
    flat = made.reshape(-1)
    if flat.shape[0]:
        whole = not (made.is_floating_point() if isinstance(made, torch.Tensor) else made.dtype.kind == "f")
        numbers = (1, 0) if "bool" in str(made.dtype) else (100, -7) if "8" in str(made.dtype) else (10**6, -7)
        flat[int(lot.integers(flat.shape[0]))] = (
            numbers[lot.integers(2)] if whole else (np.nan, np.inf)[lot.integers(2)]
        )
    return made.reshape(found.shape)


def _table(change: Callable[[pl.DataFrame, Lot], pl.DataFrame]) -> Callable[[Path, Lot], None]:
    return lambda path, lot: change(pl.read_parquet(path), lot).write_parquet(path)


def _csv(path: Path, _: Lot) -> None:
    text(pl.read_parquet(path).cast(pl.String, strict=False).write_csv())(path)


def _fixed(work: Callable[[Path], None]) -> Callable[[Path, Lot], None]:
    return lambda path, _: work(path)


JSON, TOML, NPY, TENSORS, TABLE = (".json",), (".toml",), (".npy",), (".safetensors",), (".parquet",)
CHANGES: dict[str, Change] = {
    "one bit": Change(work=_one_bit),
    "64 bytes scratched": Change(work=_scratch),
    "cut": Change(work=_cut),
    "emptied": Change(work=_fixed(raw(b""))),
    "longer": Change(work=_longer),
    "gone": Change(work=_fixed(Path.unlink)),
    "a folder in its place": Change(work=_folder),
    "swapped with a neighbour": Change(work=_swapped),
    "pickle": Change(work=_fixed(raw(PICKLE))),
    "value of another type": Change(work=_json(_other_type), suffixes=JSON),
    "not a number": Change(work=_json(lambda _, lot: (np.nan, np.inf, -np.inf)[lot.integers(3)]), suffixes=JSON),
    "huge number": Change(work=_json(lambda _, lot: (10**30, -(2**63), 1e308)[lot.integers(3)]), suffixes=JSON),
    "number of 5,000 digits": Change(
        work=lambda path, _: text(re.sub(r"\d+", "9" * 5_000, path.read_text(), count=1))(path), suffixes=JSON
    ),
    "nested without end": Change(work=_fixed(text("[" * 200_000)), suffixes=JSON),
    "a list": Change(work=_fixed(text("[1, 2]")), suffixes=JSON),
    "key gone": Change(work=_key_gone, suffixes=JSON),
    "name of a file outside": Change(work=_outside, name=MANIFEST),
    "version of a folder outside": Change(work=_outside, name="current.json"),
    "part of a log outside": Change(work=_outside, name="ingest.json"),
    "setting of another type": Change(
        work=_line(lambda _, lot: ("[]", "true", "-1", '"x"', "1e400", "{a = 1}")[lot.integers(6)]), suffixes=TOML
    ),
    "code by name": Change(
        work=_line(lambda _, lot: ('"os.system"', '["../../x"]', '"__import__"')[lot.integers(3)]), suffixes=TOML
    ),
    "setting nobody knows": Change(work=lambda path, _: text(f"strange = 1\n{path.read_text()}")(path), suffixes=TOML),
    "pickled objects": Change(work=_fixed(raw(object_array())), suffixes=NPY),
    "array of another type": Change(
        work=_array(lambda found, lot: found.astype((np.complex64, "U5", np.float16)[lot.integers(3)])), suffixes=NPY
    ),
    "shorter array": Change(work=_array(lambda found, lot: found[: lot.integers(len(found))]), suffixes=NPY),
    "number far out": Change(work=_array(_far), suffixes=NPY),
    "torch pickle": Change(work=_fixed(raw(torch_pickle())), suffixes=TENSORS),
    "tensor gone": Change(work=_tensors(lambda *_: None), suffixes=TENSORS),
    "tensor cut": Change(work=_tensors(lambda tensor, _: tensor.reshape(-1)[:1]), suffixes=TENSORS),
    "tensor of another type": Change(work=_tensors(lambda tensor, _: tensor.to(torch.bool)), suffixes=TENSORS),
    "number far out in a tensor": Change(work=_tensors(_far), suffixes=TENSORS),
    "CSV in place of Parquet": Change(work=_csv, suffixes=TABLE),
    "rows cut": Change(work=_table(lambda found, lot: found.head(lot.integers(found.height))), suffixes=TABLE),
    "rows turned round": Change(work=_table(lambda found, _: found.reverse()), suffixes=TABLE),
    "column renamed": Change(work=_table(lambda found, _: found.rename({found.columns[0]: "x"})), suffixes=TABLE),
    "column of another type": Change(
        work=_table(lambda found, _: found.with_columns(pl.lit([1, 2]).alias(found.columns[0]))), suffixes=TABLE
    ),
}
"""By name; a random choice of them, with a random file that each fits, is what benchmarks/damage.py goes through."""
