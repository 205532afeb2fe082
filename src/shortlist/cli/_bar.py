"""Moving bars for long work that counts what it has done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import TaskID


@contextmanager
def bars(*, shown: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Gives `tell(what, done, of)`; one bar on a terminal for every `what`, nothing elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield lambda what, done, of: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        tasks: dict[tuple[str, int], TaskID] = {}

        def tell(what: str, done: int, of: int) -> None:
            if (what, of) not in tasks:
                tasks[what, of] = progress.add_task(what, total=of)
            progress.update(tasks[what, of], completed=done)

        yield tell
