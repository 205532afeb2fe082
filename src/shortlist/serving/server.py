"""A running server: binds its port first, says when it is ready, and stops without losing anything."""

from __future__ import annotations

import ipaddress
import signal
import socket
import sys
from collections.abc import Callable

import torch
import uvicorn

from shortlist.cascade.engine import Engine
from shortlist.errors import ConfigError
from shortlist.serving.app import create_app
from shortlist.serving.settings import ServerConfig


def run(engine: Engine, listener: socket.socket, config: ServerConfig, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT, then finish the requests under way. The engine stays the caller's to close.

    Args:
        engine: answers.
        listener: from `settings.bind`.
        config: as given to it.
        say: gets one line when requests are taken, with the address.
    """
    # Requests run side by side; a pool of torch threads inside each would only fight over the same cores.
    torch.set_num_threads(1)
    # A thread that holds the interpreter hands it over after 1 ms and not 5, so that a log writer's burst delays no answer by more.
    sys.setswitchinterval(0.001)
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    if not ipaddress.ip_address(host).is_loopback:
        say(
            "anyone who can reach this address can read and write here: put something in front that checks who is asking"
        )
    settings = uvicorn.Config(
        create_app(engine, config),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=config.grace_s,
    )
    server = _Server(settings, lambda: say(f"serving {engine.snapshot_version} at {address} (docs at {address}/docs)"))
    # uvicorn passes the signal on when it is done; here that only means: go on to the caller's closing.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
        listener.close()
    if not server.started:
        raise ConfigError("the server could not start; its log above says why")


class _Server(uvicorn.Server):
    """uvicorn's, telling when it takes requests."""

    def __init__(self, config: uvicorn.Config, when_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._when_ready = when_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._when_ready()
            sys.stdout.flush()
