"""One request, followed through the stages: who it is for, which chain and why, what each stage did, and what stands on the page."""

from __future__ import annotations

from shortlist.errors import ShortlistError
from shortlist.serving.console import look
from shortlist.serving.console.app import Console
from shortlist.serving.console.client import Allotment, Answered, Why, WhyItem
from shortlist.serving.console.pages.traffic import REASONS

NUM_NEAR = 2
"""Past events that are named with an item."""


def show(console: Console) -> None:
    """Lay the page out."""
    ui = console.ui

    async def ask() -> None:
        told.set_visibility(False)
        result.set_visibility(False)
        why.set_content("")
        try:
            k = None if size.value is None else int(size.value)
            found = await console.api.page(user.value or None, k, query.value or None)
        except ShortlistError as error:
            told.set_text(look.sentence(error))
            told.set_visibility(True)
            return
        page.set_content(_page(found))
        asked["id"] = found.request_id
        result.set_visibility(True)

    async def explain() -> None:
        try:
            why.set_content(_reasons(await console.api.explain(asked["id"])))
        except ShortlistError as error:
            why.set_content(look.paragraph(look.sentence(error), "problem"))

    asked: dict[str, str] = {}
    with ui.element("form").classes("bar").props('aria-label="A request"').on("submit.prevent", ask):
        user = ui.input("User").props("dense outlined autocomplete=off")
        size = ui.number("Items", value=10, min=1, precision=0).props("dense outlined")
        query = ui.input("Search words, if any").props("dense outlined autocomplete=off")
        console.button("Ask")
    ui.html(
        look.paragraph("A real request: it is counted, and logged where the server keeps a request log.", "soft"),
        sanitize=False,
    )
    told = ui.label().classes("problem").props('role="status"')
    told.set_visibility(False)
    with ui.element("div").props('aria-live="polite"') as result:
        page = ui.html(sanitize=False)
        console.button("Why these items", explain, quiet=True)
        why = ui.html(sanitize=False)
    result.set_visibility(False)


def _page(found: Answered) -> str:
    words = [f"{len(found.items)} items by chain {found.chain}, {_why(found.allotted)}."]
    words.append(f"{look.count(found.num_history)} past events known; snapshot {found.snapshot_version}.")
    for kind, counts in (
        ("removed", found.removed),
        ("placed by rules", found.arranged),
        ("matched nothing", found.ignored),
    ):
        if any(counts.values()):
            words.append(
                f"{kind.capitalize()}: {', '.join(f'{look.count(n)} {name}' for name, n in counts.items() if n)}."
            )
    if found.note:
        words.append(look.sentence(found.note))
    head = look.tiles(
        {
            "time": look.number(found.spent_ms, "ms"),
            "in stages": look.number(sum(s.spent_ms for s in found.stages), "ms"),
            "compute": look.number(sum(s.spent_mflop for s in found.stages), "MFLOP"),
        }
    )
    degraded = look.paragraph(f"Degraded: {found.degraded}.", "problem") if found.degraded else ""
    stages = [
        [
            s.stage,
            ", ".join(s.systems),
            f"{s.num_received:,} → {s.num_kept:,}",
            look.number(s.spent_ms),
            look.number(s.spent_mflop),
        ]
        for s in found.stages
    ]
    names = [s.stage for s in found.stages]
    items = [
        [
            str(place),
            str(item.item_id) if item.title is None else f"{item.title.strip()} ({item.item_id})",
            *(look.NOTHING if (score := item.scores.get(name)) is None else f"{score:.4g}" for name in names),
        ]
        for place, item in enumerate(found.items, start=1)
    ]
    return (
        look.paragraph(" ".join(words), "lead")
        + degraded
        + head
        + look.table("Stages", ["stage", "systems", "candidates", "ms", "MFLOP"], stages, words=[1])
        + look.table("The page, with each stage's score", ["place", "item", *names], items, words=[1])
    )


def _why(allotted: Allotment) -> str:
    """The chain's reason, with what it costs and is worth."""
    words = REASONS.get(allotted.reason, allotted.reason)
    if allotted.ms is not None:
        words += f" (calibrated cost {look.number(allotted.ms, 'ms')}, {look.number(allotted.mflop, 'MFLOP')}"
        words += f"; expected worth {look.number(allotted.value)})" if allotted.value is not None else ")"
    if allotted.propensity < 1:
        words += f", chosen with chance {look.share(allotted.propensity)}"
    return words


def _reasons(told: Why) -> str:
    """Why each item is there: who found it, where it stood, and what in the past moved it."""
    items = [
        f"<li><details{' open' if place == 0 else ''}><summary>{look.text(one.title or one.item_id)}</summary>"
        f"{look.text(_reason(one))}</details></li>"
        for place, one in enumerate(told.items)
    ]
    return f'<h2>Why these items</h2><ol class="why">{"".join(items)}</ol>'


def _reason(one: WhyItem) -> str:
    words = ["put here by a rule"] if one.pinned else []
    if one.found:
        words.append("found by " + ", ".join(f"{by.system} at place {by.place:,} of {by.length:,}" for by in one.found))
    if one.stages:
        words.append("then " + ", ".join(f"{kept.stage} {kept.place:,} of {kept.of:,}" for kept in one.stages))
    if one.own is not None and one.own.times:
        words.append(
            f"in the person's past {one.own.times:,} times" if one.own.times > 1 else "in the person's past once"
        )
    if one.near:
        words.append("like " + ", ".join(str(past.title or past.item_id).strip() for past in one.near[:NUM_NEAR]))
    moved = [past for past in one.events if past.item_id != one.item_id][:NUM_NEAR]
    if moved:
        words.append(
            "moved by " + ", ".join(f"{str(past.title or past.item_id).strip()} ({past.by:+.2g})" for past in moved)
        )
    return look.sentence("; ".join(words) or "fills the page, since nothing better was left")
