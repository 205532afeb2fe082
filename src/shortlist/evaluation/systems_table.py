"""The list of systems for people: command line, docs and README all print it from the registry and the recorded evidence."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

from shortlist.evaluation.evidence import listing
from shortlist.registry import Entry, systems


def rows(*, stage: str | None = None, evidence: Path | None = None) -> list[dict[str, Any]]:
    """One row per system: name, kind, stage, paper, summary, needs, cold start, proof (claims and verdicts)."""
    claims = listing(evidence) if evidence else []
    table = []
    for entry in systems(stage=stage):
        proof = [f"{c['name']} {c['verdict']}" for c in claims if entry.name in c["systems"]]
        cold = [side for side, warm in (("users", entry.cold_users), ("items", entry.cold_items)) if warm]
        table.append(
            {
                "name": entry.name,
                "kind": entry.kind,
                "stage": entry.stage,
                "paper": entry.paper,
                "summary": entry.summary,
                "needs": sorted(entry.needs),
                "cold": cold,
                "proof": proof,
            }
        )
    return table


def text_table(table: list[dict[str, Any]]) -> str:
    """Plain text, one line per system."""
    widths = {key: max([len(row[key]) for row in table] + [len(key)]) for key in ("name", "kind", "stage")}
    head = "  ".join(f"{key:{width}}" for key, width in widths.items())
    lines = [f"{head}  paper"]
    lines += ["  ".join(f"{row[key]:{width}}" for key, width in widths.items()) + f"  {row['paper']}" for row in table]
    return "\n".join(lines)


def markdown_table(table: list[dict[str, Any]]) -> str:
    """The docs' table."""
    lines = ["| system | kind | stage | what it is | paper | cold start | proof |", "|---|---|---|---|---|---|---|"]
    for row in table:
        cells = (row["name"], row["kind"], row["stage"], row["summary"], row["paper"])
        lines.append("| " + " | ".join((*cells, ", ".join(row["cold"]) or "-", "; ".join(row["proof"]) or "-")) + " |")
    return "\n".join(lines)


def describe(entry: Entry) -> dict[str, Any]:
    """One system: its docstring, source file and settings with their defaults and sentences."""
    settings = settings_of(entry.cls.Config)  # type: ignore[attr-defined]
    lines = [
        f"{entry.name} ({entry.kind}, {entry.stage}). {entry.paper}",
        "",
        inspect.getdoc(entry.cls) or "",
        "",
        "Settings:",
    ]
    lines += [f"  {s['name']} = {s['default']}    {s['about']}" for s in settings]
    return {
        "name": entry.name,
        "kind": entry.kind,
        "stage": entry.stage,
        "settings": settings,
        "text": "\n".join(lines),
    }


def settings_of(config: type) -> list[dict[str, str]]:
    """Every field of a settings class: its name, default and sentence."""
    about = sentences(config)
    return [
        {"name": f.name, "default": _default(f), "about": about.get(f.name, "")} for f in dataclasses.fields(config)
    ]


def _default(f: dataclasses.Field[Any]) -> str:
    if f.default is not dataclasses.MISSING:
        return repr(f.default)
    if f.default_factory is not dataclasses.MISSING:
        return repr(f.default_factory())
    return "(required)"


def sentences(cls: type) -> dict[str, str]:
    """The string under each annotated field of a class or of the classes it extends, by field; empty where there is none."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__[:-1]):
        found |= _own_sentences(owner)
    return found


def _own_sentences(cls: type) -> dict[str, str]:
    import ast

    try:
        tree = ast.parse(inspect.cleandoc(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    found = {}
    for node, after in zip(body, [*body[1:], None]):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            found[node.target.id] = " ".join(str(text).split())
    return found
