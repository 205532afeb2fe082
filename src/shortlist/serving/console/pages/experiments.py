"""Experiments: variants, their shares and pages so far, why one ended, and an end by hand."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from shortlist.errors import ShortlistError
from shortlist.serving.console import look
from shortlist.serving.console.app import Console
from shortlist.serving.console.client import Experiment


def show(console: Console) -> None:
    """Lay the page out."""
    ui = console.ui
    shown: dict[str, tuple[bool, Any]] = {}

    def update(found: Sequence[Experiment]) -> None:
        lead.set_content(look.paragraph(_lead(found), "lead"))
        if {one.name: one.running for one in found} != {name: running for name, (running, _) in shown.items()}:
            lay_out(found)  # only then, so that what has the focus keeps it
        for one in found:
            shown[one.name][1].set_content(_body(one))

    def lay_out(found: Sequence[Experiment]) -> None:
        listed.clear()
        shown.clear()
        with listed:
            for one in found:
                shown[one.name] = (one.running, ui.html(sanitize=False))
                if one.running:
                    console.button("End it", partial(end, one.name), quiet=True, label=f"End experiment {one.name}")

    async def end(name: str) -> None:
        with spoken:  # the button that was pressed may be gone by the time there is an answer
            question = f"End experiment {name} for good? Everyone is then served as if it did not exist."
            if not await console.confirm(question):
                return
            try:
                update(await console.api.stop_experiment(name))
            except ShortlistError as error:
                console.refused(error)

    spoken = ui.element("div")
    with console.fresh(console.api.experiments, update):
        lead = ui.html(sanitize=False)
        listed = ui.element("div")


def _lead(found: Sequence[Experiment]) -> str:
    if not found:
        return "This server runs no experiments; start it with --experiments FILE."
    running = sum(one.running for one in found)
    return f"{running} of {len(found)} experiments run. “shortlist experiment report” says what they found."


def _body(one: Experiment) -> str:
    words = [f"{one.surface.capitalize()}; {look.share(one.traffic)} of all take part; {one.primary} decides."]
    if one.interleave:
        words.append("Both variants make each page.")
    if not one.running:
        words.append(look.sentence(f"over: {one.stopped}") if one.stopped else "Not running.")
    total = sum(one.pages.values())
    names = [*one.shares, *(name for name in one.pages if name not in one.shares)]
    rows = [
        [
            name,
            look.share(one.shares[name]) if name in one.shares else look.NOTHING,
            look.count(one.pages.get(name, 0)),
            look.share(one.pages.get(name, 0) / total) if total else look.NOTHING,
        ]
        for name in names
    ]
    heads = ["variant", "share set", "pages since the start", "share of them"]
    return f"<h2>{look.text(one.name)}</h2>" + look.paragraph(" ".join(words)) + look.table("Variants", heads, rows)
