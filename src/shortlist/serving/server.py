"""A running server: binds its port first, says when it is ready, and stops without losing anything."""

from __future__ import annotations

import gc
import signal
import socket
import sys
from collections.abc import Callable

import torch
import uvicorn

from shortlist.cascade.engine import Engine
from shortlist.cascade.trials import Trials
from shortlist.errors import ConfigError
from shortlist.serving import logs
from shortlist.serving.app import create_app
from shortlist.serving.budgeting import Budgets
from shortlist.serving.settings import ServerConfig, with_ports
from shortlist.serving.shadow import Shadow
from shortlist.serving.watching import Watcher


def run(
    engine: Engine,
    listener: socket.socket,
    config: ServerConfig,
    say: Callable[[str], None],
    admin: socket.socket | None = None,
    watcher: Watcher | None = None,
    shadow: Shadow | None = None,
    budgets: Budgets | None = None,
    trials: Trials | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then finish the requests under way. The engine stays the caller's to close.

    Args:
        engine: answers.
        listener: from `settings.bind`.
        config: as given to it.
        say: gets one line when requests are taken, with the address.
        admin: from `settings.bind_admin`; answers /metrics, /v1/admin and /v1/experiments in place of `listener`.
        watcher, shadow, budgets, trials: the caller's to close; see `create_app`.
    """
    # Requests run side by side; a pool of torch threads inside each would only fight over the same cores.
    torch.set_num_threads(1)
    # A thread that holds the interpreter hands it over after 1 ms and not 5, so that a log writer's burst delays no answer by more.
    sys.setswitchinterval(0.001)
    config = with_ports(config, listener, admin)
    address, inner = _address(listener), "" if admin is None else f"; metrics and admin at {_address(admin)}"
    handler = logs.install(requests=config.log_requests)
    settings = uvicorn.Config(
        create_app(engine, config, watcher=watcher, shadow=shadow, budgets=budgets, trials=trials),
        log_config=None,
        log_level="warning",
        access_log=False,
        http="h11",  # the one that bounds the head of a request
        h11_max_incomplete_event_size=config.max_head_bytes,
        limit_concurrency=config.max_connections,
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=config.grace_s,
    )
    server = _Server(
        settings, lambda: say(f"serving {engine.snapshot_version} at {address} (docs at {address}/docs){inner}")
    )
    # What loading made stays: looking through it again for every batch of events took the collector half of the batch's time. A run that
    # is swapped out goes all the same, since nothing in it refers back to itself.
    gc.collect()
    gc.freeze()
    # uvicorn passes the signal on when it is done; here that only means: go on to the caller's closing.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        server.run(sockets=[listener] if admin is None else [listener, admin])
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
        listener.close()
        if admin is not None:
            admin.close()
        logs.uninstall(handler)
    if not server.started:
        raise ConfigError("the server could not start; its log above says why")


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


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
