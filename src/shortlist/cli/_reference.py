"""The API reference, made from signatures and docstrings: what `import shortlist` offers, the kinds of system, all settings."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import get_type_hints

from shortlist.evaluation import docstrings
from shortlist.evaluation.pages import MADE
from shortlist.evaluation.systems_table import sentences, settings_of

LINE = 100
"""Characters above which a signature is broken into one line per parameter."""


def pages() -> dict[str, str]:
    """Markdown of every page of the reference by its path under docs/."""
    made = {"python": _python(), "kinds": _kinds(), "settings": _settings()}
    return {f"reference/{name}.md": f"{MADE}\n\n{text}" for name, text in made.items()}


def _python() -> str:
    import shortlist
    from shortlist import api
    from shortlist.cascade.answers import Answer, Item
    from shortlist.cascade.run import Run
    from shortlist.data.log import EventLog
    from shortlist.data.roles import Roles
    from shortlist.evaluation.evaluate import Comparison
    from shortlist.evaluation.runs import RunReport
    from shortlist.registry import Entry
    from shortlist.store.events import Event

    first, _, example = inspect.cleandoc(api.__doc__ or "").partition("\n\n")
    head = [
        "# Python",
        first,
        f"```text\n{example}\n```",
        "Names are imported when they are first used, so that `import shortlist` is quick.",
    ]
    names = [(name, getattr(api, name)) for name in api.__all__ if hasattr(shortlist, name)]
    functions = [entry(f"shortlist.{name}", thing) for name, thing in names if not inspect.isclass(thing)]
    given = [
        entry(cls.__name__, cls) for cls in (EventLog, Roles, Run, RunReport, Comparison, Answer, Item, Event, Entry)
    ]
    return _page([*head, *functions, entry("shortlist.Engine", api.Engine), "## What they take and give", *given])


def _kinds() -> str:
    from shortlist import registry
    from shortlist.models import base

    head = [
        "# Kinds of system",
        docstrings.of(base),
        "A system is registered where it is defined:",
        entry("shortlist.registry.system", registry.system),
    ]
    names = [
        name
        for name, thing in vars(base).items()
        if getattr(thing, "__module__", "") == base.__name__ and not name.startswith("_")
    ]
    return _page([*head, *(entry(name, getattr(base, name)) for name in names)])


def _settings() -> str:
    from shortlist.cascade import config
    from shortlist.cascade.engine import EngineConfig
    from shortlist.cascade.rules import Rules
    from shortlist.serving.settings import ServerConfig

    types = get_type_hints(config.RunConfig)
    sections = [(f"[{name}]", types[name]) for name in types if dataclasses.is_dataclass(types[name])]
    parts = ["# Settings of a run", docstrings.of(config)]
    for title, cls in [*sections, ("[stages.NAME]", config.Action)]:
        parts += [f"## {title}", docstrings.of(cls), _fields(cls)]
    parts += ["Settings of a system, `[systems.NAME]`, stand on [its page](../systems/index.md)."]
    for other in (EngineConfig, ServerConfig, Rules):
        parts += [f"## {other.__name__}", docstrings.of(other), _fields(other)]
    return _page(parts)


def entry(name: str, thing: object) -> str:
    """Heading, signature and docstring of a function or class; of a class its fields or its methods too."""
    parts = [f"## {name}", signature(name.removeprefix("shortlist."), thing), docstrings.of(thing)]
    if inspect.isclass(thing):
        if dataclasses.is_dataclass(thing) or hasattr(thing, "_fields"):
            parts.append(_fields(thing))
        parts += list(_methods(thing))
    return "\n\n".join(part for part in parts if part)


def signature(name: str, thing: object) -> str:
    """The signature as a code block; nothing for data classes, whose fields say the same."""
    if inspect.isclass(thing) and (dataclasses.is_dataclass(thing) or hasattr(thing, "_fields")):
        return ""
    given = inspect.signature(thing)  # type: ignore[arg-type]
    parameters = [p.replace(annotation=_bare(p.annotation)) for p in given.parameters.values()]
    given = given.replace(parameters=parameters, return_annotation=_bare(given.return_annotation))
    shown = f"{name}{given}"
    if len(shown) > LINE:
        shown = f"{name}{_broken(given)}"
    return f"```python\n{shown}\n```"


class _Annotation(str):
    """An annotation that prints without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _bare(annotation: object) -> object:
    return _Annotation(annotation) if isinstance(annotation, str) else annotation


def _broken(given: inspect.Signature) -> str:
    """One line per parameter."""
    lines, is_keyword = [], False
    for parameter in given.parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not is_keyword:
            is_keyword = True
            lines.append("    *,")
        lines.append(f"    {parameter},")
    result = given.return_annotation
    arrow = "" if result is inspect.Signature.empty else f" -> {inspect.formatannotation(result)}"
    return "(\n" + "\n".join(lines) + f"\n){arrow}"


def _methods(cls: type) -> Iterator[str]:
    for name, member in vars(cls).items():
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if name.startswith("_") or not getattr(function, "__doc__", None):
            continue
        if isinstance(function, property):
            yield f"### {cls.__name__}.{name}\n\n{docstrings.of(function)}"
        elif inspect.isfunction(function):
            yield f"### {cls.__name__}.{name}\n\n{signature(name, function)}\n\n{docstrings.of(function)}"


def _fields(cls: type) -> str:
    """Fields with types, defaults and sentences."""
    if not dataclasses.is_dataclass(cls):
        found = sentences(cls)
        return "\n".join(f"- `{name}`: {found.get(name, '')}" for name in cls._fields)  # type: ignore[attr-defined]
    lines = ["| field | type | default | |", "|---|---|---|---|"]
    types = {f.name: str(f.type) for f in dataclasses.fields(cls)}
    for field in settings_of(cls):
        about = field["about"].replace("|", "\\|").replace("<", "&lt;")
        shown = types[field["name"]].replace(" | ", " or ")  # a bar would end the cell
        lines.append(f"| `{field['name']}` | `{shown}` | `{field['default']}` | {about} |")
    return "\n".join(lines)


def _page(parts: list[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"
