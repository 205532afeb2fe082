"""The console as a web application on this machine: it samples the server, and lays out its pages for whoever looks.

    run(ConsoleConfig(target=Target(server="http://127.0.0.1:8000")))

It listens on loopback alone, since whoever reaches it may do what its API key may do, and answers no other host names, so that a page
of another site can not reach it under a name of its own.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from shortlist.errors import ConfigError, ShortlistError
from shortlist.extras import library
from shortlist.serving.console.client import Api, Report, Target, read_report
from shortlist.serving.console.look import STYLE, sentence, text
from shortlist.serving.console.numbers import History, parse

T = TypeVar("T")
HOSTS = ["127.0.0.1", "localhost"]
EVERY_S = 2.0
"""Seconds between looks at /metrics, and between updates of a page."""
PAGES = {
    "/": "Traffic",
    "/budget": "Budget",
    "/request": "Request",
    "/data": "Data",
    "/snapshots": "Snapshots",
    "/experiments": "Experiments",
}
"""Paths and names, in the order of the menu."""
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" rx="3" fill="#3949ab"/>'
    '<path d="M3 4h10M4.5 8h7M6.5 12h3" stroke="#fff" stroke-width="2"/></svg>'
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConsoleConfig:
    """What `shortlist console` shows, and where."""

    target: Target
    port: int = 8080
    """Port of the console; 0 = any free one."""
    curve: Path | None = None
    """budget.json of `shortlist budget`, where the server has none; None = the server's."""
    every_s: float = EVERY_S
    """Seconds between looks."""

    def __post_init__(self) -> None:
        if not 0 < self.every_s < 3600:
            raise ConfigError(f"every_s must be above 0 and below an hour, got {self.every_s}")


@dataclass
class Console:
    """What all pages share."""

    config: ConsoleConfig
    api: Api
    ui: Any
    """NiceGUI's `ui`."""
    report: Report | None = None
    """Read from the file that the settings name."""
    history: History = field(default_factory=History)
    problem: str | None = "nothing was read from the server so far"
    """Why /metrics could not be read when it was last asked; None where it could."""

    async def sample(self) -> None:
        """Read /metrics again and again, whoever looks."""
        while True:
            try:
                self.history.add(parse(await self.api.metrics(), at=time.monotonic()))
                self.problem = None
            except ShortlistError as error:
                self.problem = str(error)
            await asyncio.sleep(self.config.every_s)

    @contextmanager
    def frame(self, path: str) -> Any:
        """Menu and title of a page; what is laid out inside is its body."""
        ui = self.ui
        ui.page_title(f"{PAGES[path]} · Shortlist")
        with ui.element("header").classes("top"):
            ui.label("Shortlist").classes("name")
            with ui.element("nav").props('aria-label="Pages"'):
                for target, name in PAGES.items():
                    link = ui.link(name, target)
                    if target == path:
                        link.props('aria-current="page"')
        body = ui.element("div").classes("body")  # NiceGUI's page around it is the landmark
        ui.skip_link("Skip to the page", target=body).move(target_index=0)
        with body:
            ui.html(f"<h1>{PAGES[path]}</h1>", sanitize=False)
            yield

    def button(
        self, words: str, act: Callable[[], Any] | None = None, *, quiet: bool = False, label: str | None = None
    ) -> Any:
        """A button in the page's colours; without `act` it sends the form around it. `label` is for who can not see its place."""
        made = self.ui.button(words, on_click=act, color=None).props("no-caps unelevated")
        if quiet:
            made.classes("quiet")
        if label is not None:
            made.props(f'aria-label="{text(label)}"')
        return made.props("type=submit") if act is None else made

    async def confirm(self, question: str) -> bool:
        """Ask before something that everybody's pages feel."""
        with self.ui.dialog() as dialog, self.ui.card().props('role="alertdialog"'):
            self.ui.label(question)
            with self.ui.element("div").classes("bar"):
                self.button("Yes", lambda: dialog.submit(True))
                self.button("No", lambda: dialog.submit(False), quiet=True)
        answer = bool(await dialog)
        dialog.delete()
        return answer

    def refused(self, error: ShortlistError) -> None:
        """Say that something was not done, and why."""
        self.ui.notify(sentence(error), type="negative", position="top", multi_line=True)

    def fresh(
        self, fetch: Callable[[], Awaitable[T]], show: Callable[[T], None], *, every_s: float | None = None
    ) -> AbstractContextManager[Any]:
        """A part of a page that follows the server: one sentence stands in its place while that can not be asked.

        Args:
            fetch: asks; ShortlistError where there is no answer.
            show: brings what came into the elements that are laid out inside.
            every_s: seconds between looks.

        Returns: the context in which those elements are laid out.
        """
        ui = self.ui
        told = ui.label("Asking the server …").classes("soft").props('role="status"')
        body = ui.element("div")
        body.set_visibility(False)

        async def look() -> None:
            try:
                found = await fetch()
            except ShortlistError as error:
                told.set_text(sentence(error))
                told.classes(replace="problem").set_visibility(True)
                body.set_visibility(False)
                return
            if not body.is_deleted:
                show(found)
                told.set_visibility(False)
                body.set_visibility(True)

        ui.timer(every_s or self.config.every_s, look)
        return body


def run(config: ConsoleConfig, say: Callable[[str], None]) -> None:
    """Serve the console until SIGTERM or SIGINT.

    Args:
        config: what to show.
        say: gets one line when the console can be looked at.

    Raises ConfigError: the extra is not installed, the port is taken, or the file of the curve is none.
    """
    library("nicegui", extra="console", user="the console")
    import uvicorn

    report = None
    if config.curve is not None:
        report = read_report(config.curve.read_bytes())
    with _bind(config.port) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def ready() -> None:
            say(f"the console of {config.target.server} is at {address}")
            sys.stdout.flush()

        app = create(config, report, ready)
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=1)
        )
        # uvicorn passes the signal on when it is done; here that only means that it is.
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
        signal.signal(signal.SIGTERM, before)


def create(config: ConsoleConfig, report: Report | None = None, ready: Callable[[], None] = lambda: None) -> Any:
    """The application (ASGI), which calls `ready` when it is. One per process, since NiceGUI keeps its pages in the process."""
    from fastapi import FastAPI
    from nicegui import ui
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from shortlist.serving.console.pages import budget, data, experiments, request, snapshots, traffic

    console = Console(config=config, api=Api(config.target), ui=ui, report=report)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sampling = asyncio.create_task(console.sample())
        ready()
        yield
        sampling.cancel()
        with suppress(asyncio.CancelledError):
            await sampling
        await console.api.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)
    ui.add_css(STYLE, shared=True)
    for path, page in zip(PAGES, (traffic, budget, request, data, snapshots, experiments)):
        _add(console, path, page.show)
    ui.run_with(
        app, title="Shortlist", favicon=ICON, dark=None, language="en-US", tailwind=False, show_welcome_message=False
    )
    return app


def _add(console: Console, path: str, show: Callable[[Console], None]) -> None:
    def page() -> None:
        with console.frame(path):
            show(console)

    console.ui.page(path)(page)


def _bind(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(f"port {port} can not be listened on ({error}); choose another with --port") from error
    return listener
