"""What the HTTP server is started with, and its port. Imports nothing heavy, so that a taken port is told at once."""

from __future__ import annotations

import ipaddress
import re
import socket
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from shortlist.errors import ConfigError
from shortlist.serving.keys import Keyring

_ORIGIN = re.compile(r"https?://[^/\s,*]+|\*")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """Settings of the HTTP server."""

    host: str = "127.0.0.1"
    """Address to listen on; beyond this machine only with keys."""
    port: int = 8000
    """0 = any free one."""
    keys: Path | None = None
    """File of API keys (`shortlist keys`); None = everybody who reaches the address may ask."""
    admin_port: int | None = None
    """Port that /metrics, /v1/admin and /v1/experiments move to; 0 = any free one, None = they stay with the others."""
    admin_host: str = "127.0.0.1"
    """Address of that port; beyond this machine only with keys."""
    cors: tuple[str, ...] = ()
    """Origins whose web pages may ask, such as https://shop.example; "*" = all. Empty = browsers keep all other sites away."""
    rate_per_s: float | None = None
    """Requests a second that a key, or an address where no keys are asked for, may keep up; None = any number."""
    burst: int | None = None
    """Requests that one caller may send at once; None = those of two seconds."""
    max_callers: int = 10_000
    """Callers whose rate is remembered."""
    max_connections: int = 2_000
    """Connections and requests under way; beyond that 503."""
    max_head_bytes: int = 16 * 2**10
    """Longest request line and headers together; beyond that 400."""
    max_body_bytes: int = 4 * 2**20
    """Longest request body."""
    body_s: float = 30.0
    """Seconds within which a body must have come."""
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
    admin: bool = False
    """Whether /v1/admin is there: whoever reaches it, with an admin's key where there are keys, may change what is served."""
    log_requests: bool = False
    """Log a line per request, without personal data; warnings and errors are logged anyway."""

    def __post_init__(self) -> None:
        for name in ("port", "admin_port"):
            if not 0 <= (getattr(self, name) or 0) <= 65_535:
                raise ConfigError(f"{name} must be from 0 to 65535, got {getattr(self, name)}")
        if self.admin_port and self.admin_port == self.port:
            raise ConfigError(f"admin_port must be another than port, got {self.port} for both")
        for origin in self.cors:
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(f"an origin is like https://shop.example, without a path, or *, got {origin!r}")
        for name in ("rate_per_s", "body_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name} must be above 0, got {value}")
        if self.burst is not None and (self.burst < 1 or self.rate_per_s is None):
            raise ConfigError(f"burst must be at least 1 and goes with rate_per_s, got {self.burst}")
        for name in (
            "max_callers",
            "max_connections",
            "max_head_bytes",
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
    """A listening socket; ConfigError when the address can not be had, or when others can reach it and no keys are asked for."""
    if config.keys is not None:
        Keyring(config.keys)  # a file that can not be used is said before anything is loaded
    return _listen(config.host, config.port, "port", config.keys is not None)


def bind_admin(config: ServerConfig) -> socket.socket | nullcontext[None]:
    """The second listening socket, or nothing where none is wanted; errors as of `bind`."""
    if config.admin_port is None:
        return nullcontext()
    return _listen(config.admin_host, config.admin_port, "admin-port", config.keys is not None)


def with_ports(config: ServerConfig, listener: socket.socket, admin: socket.socket | None) -> ServerConfig:
    """The settings with the ports that were really had."""
    inner = None if admin is None else admin.getsockname()[1]
    return replace(config, port=listener.getsockname()[1], admin_port=inner)


def _listen(host: str, port: int, option: str, has_keys: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio only sends small answers at once (TCP_NODELAY) on sockets that say they are TCP;
    # without it each answer waits 40 ms for the client's acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        if not has_keys and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
            raise ConfigError(
                f"others can reach {host}, so this needs API keys: make one with `shortlist keys add NAME --role read "
                "--file keys.json` and give --keys keys.json, or listen on 127.0.0.1"
            )
        listener.listen(512)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"can not listen on {host} port {port}: {error.strerror or error}; "
            f"choose another with --{option} or --{option.replace('port', 'host')}"
        ) from error
    except ConfigError:
        listener.close()
        raise
    return listener
