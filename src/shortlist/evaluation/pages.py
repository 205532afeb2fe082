"""The docs' pages about systems, made from the registry: idea, code, differences, settings, cost, cold start, a snippet.

`pages()` makes systems/NAME.md for every system of this package, and their index; `write` puts pages into the docs. A page links to the
claims and carries no measured quality, so that it changes only when the code does; the built site puts the recorded numbers in (`numbers`).
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from shortlist.data.histories import Histories, View
from shortlist.data.schema import Categorical, FieldTable, Numeric, Space
from shortlist.evaluation import docstrings
from shortlist.evaluation.evidence import results, results_section
from shortlist.evaluation.systems_table import settings_of
from shortlist.models.base import RequestShape, System
from shortlist.registry import Entry, find, systems

MADE = "<!-- Made by `shortlist systems --pages docs`; do not edit. -->"
MADE_ALONE = "<!-- Made by `shortlist systems {name} --pages DIR`; do not edit. -->"
_INTO_THE_SITE = re.compile(r"\[([^]]+)\]\(\.\./[^)]+\)")
NUMBERS = "<!-- numbers -->"
"""Where the built site puts the recorded results."""
NUM_USERS, NUM_ITEMS, NUM_EVENTS = 500, 1_000, 20
"""Of the generated log on which costs are stated: users, items, events of each user."""
SHAPE = RequestShape(num_history=50, num_candidates=100, num_items=NUM_ITEMS)
_STAGES = ("retrieval", "pre-ranking", "ranking", "re-ranking")


def write(folder: Path, made: Mapping[str, str]) -> None:
    """Write generated pages under `folder`, and remove those of systems that are gone."""
    for name, text in made.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for path in (folder / "systems").glob("*.md"):
        if f"systems/{path.name}" not in made and path.read_text().startswith(MADE):
            path.unlink()


def pages() -> dict[str, str]:
    """The page of every system and their index by path under docs/."""
    mine = own_systems()
    return {"systems/index.md": systems_index(mine), **{f"systems/{e.name}.md": system_page(e) for e in mine}}


def page_alone(entry: Entry) -> tuple[str, str]:
    """Path under a docs folder and text of one system's page: as `pages` makes it, or, of a system that stands in a folder of the user's,
    without links into this package's site.
    """
    text = system_page(entry)
    if entry not in own_systems():
        text = _INTO_THE_SITE.sub(r"\1", text).replace(MADE, MADE_ALONE.format(name=entry.name), 1)
    return f"systems/{entry.name}.md", text


def own_systems() -> list[Entry]:
    """Registered systems that belong to this package, not to a folder of the user's or a test."""
    return [entry for entry in systems() if entry.cls.__module__.startswith("shortlist.")]


def systems_index(entries: list[Entry]) -> str:
    """The list of systems by stage."""
    lines = [
        MADE,
        "",
        "# Systems",
        "",
        "Every published system is one file and registers itself; `shortlist systems` prints this list, "
        "`shortlist new` writes the files of a new one.",
        "",
    ]
    stages = sorted({e.stage for e in entries}, key=lambda s: (_STAGES.index(s) if s in _STAGES else len(_STAGES), s))
    for stage in stages:
        lines += [f"## {stage.capitalize()}", "", "| system | what it is | source | cold start |", "|---|---|---|---|"]
        for e in entries:
            if e.stage == stage:
                lines.append(f"| [{e.name}]({e.name}.md) | {_cell(e.summary)} | {e.paper} | {_cold_words(e)} |")
        lines.append("")
    return "\n".join(lines)


def system_page(entry: Entry) -> str:
    """The page of one system."""
    module = sys.modules[entry.cls.__module__]
    idea, differences, legend = docstrings.parts(module.__doc__ or "")
    path = module.__name__.replace(".", "/") + ".py"
    code = f"src/{path}" if path.startswith("shortlist/") else Path(module.__file__ or path).name
    head = [
        MADE,
        f"# {entry.name}",
        inspect.getdoc(entry.cls) or "",
        f"A **{entry.kind}** for **{entry.stage}**. Source: {entry.paper}. Code: `{code}`.",
        "## Idea",
        docstrings.to_markdown(idea),
    ]
    if differences:
        head += ["## Differences from the paper", docstrings.to_markdown(differences[0].upper() + differences[1:])]
    body = [
        "## In the code",
        *([f"Letters that end the names of tensors: {legend}"] if legend else []),
        "\n".join(_members(entry, module)),
        "## Use it",
        _snippet_words(entry),
        *([f"```toml\n{snippet(entry)}```"] if entry.stage in _STAGES else []),
        "## Settings",
        settings_table(entry.cls.Config),  # type: ignore[attr-defined]
        *(
            ["## What it needs, and who it can serve", _needs_words(entry), "## Cost to serve", cost_words(entry.name)]
            if issubclass(entry.cls, System)
            else []
        ),
        "## Evidence",
        "Claims, figures and the commands that repeat them stand in [Evidence](../evidence.md); `shortlist prove` lists the claims.",
        NUMBERS,
    ]
    return "\n\n".join([*head, *body]) + "\n"


def settings_table(config: type) -> str:
    """Name, default and sentence of every setting."""
    lines = ["| setting | default | what it does |", "|---|---|---|"]
    lines += [f"| `{s['name']}` | `{s['default']}` | {_cell(s['about'])} |" for s in settings_of(config)]
    return "\n".join(lines)


def snippet(entry: Entry) -> str:
    """A run's TOML in which the system acts at its usual stage."""
    before = {
        "retrieval": [],
        "pre-ranking": ["retrieval"],
        "ranking": ["retrieval"],
        "re-ranking": ["retrieval", "ranking"],
    }
    usual = {"retrieval": ["popularity", "counts"], "ranking": ["dnn"]}
    keep = {"retrieval": 200, "pre-ranking": 100, "ranking": 50, "re-ranking": 10}
    stages = [(stage, usual[stage]) for stage in before[entry.stage]] + [(entry.stage, [entry.name])]
    lines = []
    for stage, names in stages:
        quoted = ", ".join(f'"{name}"' for name in names)
        lines += [f"[stages.{stage}]", f"systems = [{quoted}]", f"keep = {keep[stage]}", ""]
    first = next((s for s in settings_of(entry.cls.Config) if _is_plain(s["default"])), None)  # type: ignore[attr-defined]
    if first is not None:
        value = (
            first["default"].lower() if first["default"] in ("True", "False") else first["default"].replace("'", '"')
        )
        lines += [f"[systems.{entry.name}]", f"{first['name']} = {value}", ""]
    return "\n".join(lines[:-1]) + "\n"


def numbers(name: str, evidence: Path) -> str:
    """Markdown of all recorded results that speak of a system; a sentence where there is none."""
    found = [result for result in results(evidence) if name in result["systems"]]
    if not found:
        return "No claim about it has been recorded yet."
    return "\n".join(line for result in found for line in results_section(result, level=3))


@cache
def cost_words(name: str) -> str:
    """What one request costs a system at `SHAPE`, after `prepare` on the generated log."""
    entry = find(name)
    model = entry.cls(entry.config(), _view().space)
    model.prepare(_view())
    cost = model.cost(SHAPE)
    num_scored = SHAPE.num_items if entry.stage == "retrieval" else SHAPE.num_candidates
    scored = "item of the catalogue" if entry.stage == "retrieval" else "candidate"
    flops = [f"{_count(number)}FLOP" for number in (cost.user_flops, cost.item_flops, cost.flops(num_scored))]
    return (
        f"One request with {SHAPE.num_history} past events, {SHAPE.num_candidates} candidates and {SHAPE.num_items:,} items, default "
        f"settings, by the system's own `cost()` (one multiply-add is 2 FLOPs):\n\n"
        f"| once per request | per {scored} | in all | read |\n|---|---|---|---|\n"
        f"| {' | '.join(flops)} | {_count(cost.bytes)}B |\n\n"
        f"What is counted rather than learned was counted on a generated log of {NUM_USERS} users with {NUM_EVENTS} events each."
    )


@cache
def _view() -> View:
    """The generated log: every user walks through the catalogue, popular items more often; one category and one price per item."""
    rng = np.random.default_rng(0)
    n = NUM_USERS * NUM_EVENTS
    item = 1 + np.minimum((NUM_ITEMS * rng.random(n) ** 3).astype(np.int64), NUM_ITEMS - 1)
    day = np.tile(np.arange(NUM_EVENTS, dtype=np.int64), NUM_USERS)
    histories = Histories(
        offsets=np.concatenate([[0], np.arange(NUM_USERS + 1) * NUM_EVENTS]).astype(np.int64),
        item=item,
        time=day * 86_400,
        group=np.arange(n, dtype=np.int64),
        action=np.ones(n, dtype=np.int64),
        value=np.ones(n, dtype=np.float32),
    )
    rows = torch.arange(NUM_ITEMS + 1)
    items = FieldTable(
        NUM_ITEMS + 1,
        (Categorical(name="category", size=20), Numeric(name="price")),
        {"category": torch.where(rows > 0, 1 + rows % 20, 0), "price": rows / NUM_ITEMS},
    )
    space = Space(
        items=items,
        known_items=rows > 0,
        num_users=NUM_USERS,
        pair_fields=(Numeric(name="times_seen"), Numeric(name="days_since")),
    )
    return View(histories=histories, space=space, users=FieldTable(NUM_USERS + 1), now=NUM_EVENTS * 86_400)


def _members(entry: Entry, module: ModuleType) -> Iterator[str]:
    """One line per class and per method of the system that the module defines and documents."""
    config = entry.cls.Config  # type: ignore[attr-defined]
    for name, cls in inspect.getmembers(module, inspect.isclass):
        if (
            cls.__module__ == module.__name__
            and cls not in (entry.cls, config)
            and cls.__doc__
            and not _registered(cls)
        ):
            yield f"- `{name}`: {_prose(docstrings.first_sentence(cls))}"
    for name, method in vars(entry.cls).items():
        if inspect.isfunction(method) and not name.startswith("_") and method.__doc__:
            yield f"- `{entry.cls.__name__}.{name}`: {_prose(docstrings.first_sentence(method))}"


def _registered(cls: type) -> bool:
    return any(cls is e.cls or cls is e.cls.Config for e in systems())  # type: ignore[attr-defined]


def _snippet_words(entry: Entry) -> str:
    if entry.stage not in _STAGES:
        return f"It acts inside other systems ({entry.stage}); their settings name it."
    return (
        "In a run's TOML (`shortlist train LOG --config run.toml --out runs/mine`); `--set "
        f"{entry.name}.SETTING=VALUE` changes a setting:"
    )


def _needs_words(entry: Entry) -> str:
    needs = ", ".join(f"`{need}`" for need in sorted(entry.needs))
    users = "gets a sensible page" if entry.cold_users else "gets nothing of its own"
    items = "can be found through its fields" if entry.cold_items else "is not found"
    return (
        f"{f'The log must offer {needs}.' if needs else 'Any log will do.'} A person without a past {users}; "
        f"an item without training events {items}. [Cold start](../guides/cold-start.md) says what a cascade makes of it."
    )


def _cold_words(entry: Entry) -> str:
    return ", ".join(side for side, able in (("users", entry.cold_users), ("items", entry.cold_items)) if able) or "-"


def _is_plain(default: str) -> bool:
    return default in ("True", "False") or default.replace(".", "", 1).isdigit() or default.startswith("'")


def _count(number: float) -> str:
    """Three significant digits with a prefix: 12.3 k."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.3g} "


def _cell(text: str) -> str:
    """Text that is safe inside a table."""
    return _prose(text).replace("|", "\\|")


def _prose(text: str) -> str:
    """Text whose angle brackets are not taken for HTML."""
    return text.replace("<", "&lt;")
