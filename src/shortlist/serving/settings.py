"""What the HTTP server is started with, and its port. Imports nothing heavy, so that a taken port is told at once."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from shortlist.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """Settings of the HTTP server."""

    host: str = "127.0.0.1"
    """Address to listen on; beyond this machine only behind something that checks who is asking."""
    port: int = 8000
    """0 = any free one."""
    max_body_bytes: int = 4 * 2**20
    """Longest request body."""
    max_events: int = 10_000
    """Most events in one body."""
    num_workers: int = 2
    """Batches of requests worked on at once; others wait."""
    max_batch: int = 16
    """Requests answered together at most: those that come while all workers are busy."""
    linger_ms: float = 0.0
    """Time for which a free worker waits for company; 0 = not at all."""
    time_limit_ms: float | None = None
    """Time within which a request for a page is answered or refused; None = it waits as long as it takes."""
    max_waiting: int = 1_000
    """Requests for pages that may wait; beyond that they are refused."""
    num_threads: int = 8
    """Other requests, such as those that bring events, worked on at once."""
    grace_s: int = 10
    """Seconds that requests under way get to finish when the server is told to stop."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"port must be from 0 to 65535, got {self.port}")
        for name in (
            "max_body_bytes",
            "max_events",
            "num_workers",
            "max_batch",
            "max_waiting",
            "num_threads",
            "grace_s",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.linger_ms < 0:
            raise ConfigError(f"linger_ms must not be negative, got {self.linger_ms}")
        if self.time_limit_ms is not None and self.time_limit_ms <= 0:
            raise ConfigError(f"time_limit_ms must be above 0, got {self.time_limit_ms}")


def bind(config: ServerConfig) -> socket.socket:
    """A listening socket; ConfigError when the address can not be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # The protocol is named because asyncio only sends small answers at once (TCP_NODELAY) on sockets that say they are TCP;
    # without it each answer waits 40 ms for the client's acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
        listener.listen(512)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"can not listen on {config.host} port {config.port}: {error.strerror or error}; choose another with --port or --host"
        ) from error
    return listener
