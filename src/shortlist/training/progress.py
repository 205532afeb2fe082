"""What a person sees while training runs: a moving bar on a terminal, a line per epoch elsewhere, nothing when not wanted."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress


class Progress:
    """Shows loss, rows per second and time left on standard error; standard output stays free for results.

    Args:
        shown: False = say nothing.
        title: the system's name.
    """

    def __init__(self, *, shown: bool, title: str) -> None:
        self._title = title
        self._console: Any = None
        self._bar: RichProgress | None = None
        self._task: Any = None
        if shown:
            from rich.console import Console

            self._console = Console(stderr=True, highlight=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def begin(self, phase: str, *, epochs: int, steps: int, done: int) -> None:
        """Start the bar of a phase of `epochs` x `steps` steps, `done` of them already made."""
        self.end()
        if self._console is None or not self._console.is_terminal:
            return
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._bar.start()
        self._task = self._bar.add_task(f"{self._title} {phase}", total=epochs * steps, completed=done, state="")

    def step(self, done: int, *, epoch: int, loss: float, rows_per_second: float) -> None:
        """Move the bar to `done` steps."""
        if self._bar is not None:
            state = f"epoch {epoch}  loss {loss:.4f}  {rows_per_second:,.0f} rows/s"
            self._bar.update(self._task, completed=done, state=state)

    def line(self, text: str) -> None:
        """One line that stays."""
        if self._console is not None:
            self._console.print(f"{self._title} {text}", markup=False)

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
