"""Published snapshots: which one is served, and another one served instead."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import partial

from shortlist.errors import ShortlistError
from shortlist.serving.console import look
from shortlist.serving.console.app import Console
from shortlist.serving.console.client import ApiError, Snapshots


def show(console: Console) -> None:
    """Lay the page out."""
    ui = console.ui
    shown: list[Snapshots] = []

    def update(found: Snapshots) -> None:
        if [found] == shown:
            return  # what has the focus keeps it
        shown[:] = [found]
        lead.set_content(_lead(found))
        listed.clear()
        with listed:
            for version in reversed(found.versions):
                with ui.element("li").classes("bar apart"):
                    mark = " · served" if version.version == found.serving else ""
                    note = f" · {version.note}" if version.note else ""
                    ui.label(f"{version.version} · {_moment(version.published_at)}{note}{mark}")
                    if version.version != found.current:
                        console.button(
                            "Serve this",
                            partial(serve, version.version),
                            quiet=True,
                            label=f"Serve snapshot {version.version}",
                        )
        back.set_visibility(len(found.versions) > 1 and found.versions[0].version != found.current)

    async def serve(version: str) -> None:
        await confirm(f"Serve snapshot {version}?", lambda: console.api.publish(version))

    async def roll_back() -> None:
        await confirm("Go back to the snapshot that was published before the current one?", console.api.rollback)

    async def confirm(question: str, act: Callable[[], Awaitable[Snapshots]]) -> None:
        with spoken:  # the button that was pressed may be gone by the time there is an answer
            if not await console.confirm(question):
                return
            try:
                found = await act()
            except ShortlistError as error:
                console.refused(error)
                return
            update(found)
            if found.problem is not None:
                console.refused(ApiError(f"snapshot {found.serving} goes on answering: {found.problem}"))
            else:
                ui.notify(f"Snapshot {found.serving} is served.", position="top")

    spoken = ui.element("div")
    with console.fresh(console.api.snapshots, update):
        lead = ui.html(sanitize=False)
        back = console.button("Roll back", roll_back)
        listed = ui.element("ul").style("padding: 0; margin: .5rem 0; list-style: none")


def _lead(found: Snapshots) -> str:
    words = [f"Snapshot {found.serving} answers; its place holds {look.count(len(found.versions))}."]
    if found.num_swaps:
        words.append(f"{look.count(found.num_swaps)} swaps since the server started.")
    told = look.paragraph(" ".join(words), "lead")
    if found.problem:
        told += look.paragraph(
            f"Snapshot {found.current} is current but can not be served: {found.problem}.", "problem"
        )
    return told


def _moment(given: str) -> str:
    try:
        return datetime.fromisoformat(given).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return given
