"""Docstrings as Markdown: formulas become code blocks, lists and the sections Args and Raises become lists."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from itertools import groupby

SECTIONS = ("Args:", "Raises:", "Returns:", "Yields:")
_LIST = re.compile(r"(- |\d+\. )")
_LEGEND = re.compile(r"[B-HJ-Z] [a-z]+,")
_DIFFERENCES = re.compile(r"(?<![^\s])Differences[^:.]*:")


def of(thing: object) -> str:
    """The docstring of a class or function as Markdown; empty where it has none of its own."""
    return to_markdown(inspect.cleandoc(getattr(thing, "__doc__", None) or ""))


def to_markdown(text: str) -> str:
    """Markdown of one docstring whose indentation is clean (`inspect.cleandoc`)."""
    blocks = [block for block in re.split(r"\n\s*\n", text.strip("\n")) if block.strip()]
    merged: list[str] = []
    for block in blocks:  # an indented block with a blank line inside stays one
        if merged and block.startswith("    ") and merged[-1].startswith("    "):
            merged[-1] += "\n\n" + block
        else:
            merged.append(block)
    return "\n\n".join(part for block in merged for part in _block(block))


def parts(text: str) -> tuple[str, str, str]:
    """A model file's docstring in three: what it is, its differences from the paper, the legend of its letters; "" where absent."""
    blocks = [block for block in re.split(r"\n\s*\n", inspect.cleandoc(text)) if block.strip()]
    legend = next((block for block in reversed(blocks) if _LEGEND.match(block)), "")
    rest = "\n\n".join(block for block in blocks if block is not legend)
    found = _DIFFERENCES.search(rest)
    if found is None:
        return rest, "", _joined(legend)
    after = rest[found.end() :].strip("\n ")
    own, _, more = after.partition("\n\n")
    return "\n\n".join(filter(None, (rest[: found.start()].rstrip(), more))), own, _joined(legend)


def first_sentence(thing: object) -> str:
    """First sentence of a docstring, on one line."""
    return _joined((getattr(thing, "__doc__", None) or "").strip().split("\n\n")[0]).split(". ")[0].rstrip(".:") + "."


def _block(block: str) -> Iterator[str]:
    """Markdown of one paragraph, formula, list or section; a formula or list may follow its sentence without a blank line."""
    lines = block.split("\n")
    if lines[0] in SECTIONS:
        yield f"*{lines[0].rstrip(':')}*"
        yield "\n".join(_entries(lines[1:]))
        return
    for kind, run in groupby(lines, _kind):
        if kind == "formula":
            yield "```text\n" + inspect.cleandoc("\n" + "\n".join(run)) + "\n```"
        elif kind == "list":  # continuation lines indented by four, as Python-Markdown wants it
            yield "\n".join(line if _LIST.match(line) else f"    {line.strip()}" for line in run)
        else:
            yield "\n".join(run)


def _kind(line: str) -> str:
    if line.startswith("    ") or not line.strip():
        return "formula"
    return "list" if line.startswith("  ") or _LIST.match(line) else "text"


def _entries(lines: list[str]) -> Iterator[str]:
    """`name: text` entries of a section as a list."""
    cleaned = inspect.cleandoc("\n" + "\n".join(lines)).split("\n")
    for line in cleaned:
        name, colon, text = line.partition(": ")
        if line.startswith(" "):
            yield f"    {line.strip()}"
        elif colon and re.fullmatch(r"[\w*, ]+", name):
            yield f"- `{name}`: {text}"
        else:
            yield f"- {line}"


def _joined(block: str) -> str:
    return " ".join(block.split())
