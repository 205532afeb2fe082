"""Who may ask what, and how often: decided from a request's head, before its body is read.

    port      /metrics, /v1/admin and /v1/experiments answer on the inner port alone, where there is one
    key       pages: read; events, items, users, campaigns: write; /v1/admin and changes that no rule names: admin; health, docs: none
    rate      a bucket of tokens per key, per address where no key is asked for

Refusals are one sentence with 401, 403, 404 or 429. Keys are never logged; a log names a key by its id.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

import anyio.to_thread
from fastapi import FastAPI, Response
from starlette.types import Scope

from shortlist.serving.keys import Key, Keyring, Role
from shortlist.serving.limits import Buckets, network
from shortlist.serving.logs import CALL
from shortlist.serving.problems import nothing_at, problem
from shortlist.serving.settings import ServerConfig

OPEN = ("/v1/health", "/docs", "/openapi.json", "/static-offline-docs")
"""Paths for which nobody needs a key: a load balancer asks for the first, and the others are the same on every server."""
INNER = ("/metrics", "/v1/admin", "/v1/experiments")
"""Paths that move to the inner port, where there is one."""
ASK = ("/v1/recommend", "/v1/search", "/v1/ads", "/v1/similar", "/v1/explain")
"""Paths, and not what lies below them, to which POST is a question."""
WRITE = ("/v1/events", "/v1/items", "/v1/users", "/v1/ads/click", "/v1/ads/campaigns")
"""Paths at which data and money stand, whatever the method."""
TRIES_PER_S, MAX_TRIES = 1.0, 10
"""Keys that are none which one address may try: each can cost up to 0.1 s of a core."""
_LONGEST_KEY = 200


def below(path: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a path is one of these or lies below one."""
    return any(path == prefix or path.startswith(f"{prefix}/") for prefix in prefixes)


def needed(method: str, path: str) -> Role | None:
    """The role that a request needs; None where everybody may. What is not known here needs the highest, unless it only reads."""
    if below(path, OPEN):
        return None
    if below(path, ("/v1/admin",)):
        return "admin"
    if below(path, WRITE):
        return "write"
    return "read" if method in ("GET", "HEAD") or (method == "POST" and path in ASK) else "admin"


class Guard:
    """Decides about requests; belongs to the event loop of a server.

    Args:
        config: keys, rates and ports; without any of them everything passes.
        clock: seconds; for tests.

    Raises ConfigError: the file of keys can not be used.
    """

    def __init__(self, config: ServerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.admin_port = config.admin_port
        self.keyring = None if config.keys is None else Keyring(config.keys, clock)
        self.buckets = (
            None
            if config.rate_per_s is None
            else Buckets(config.rate_per_s, config.burst, max_callers=config.max_callers, clock=clock)
        )
        self._tries = Buckets(TRIES_PER_S, MAX_TRIES, max_callers=config.max_callers, clock=clock)
        self._proving = asyncio.Semaphore(1)

    async def refusal(self, scope: Scope) -> Response | None:
        """Why a request is not taken; None where it is."""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self.admin_port is not None and not self._is_at(path, (scope.get("server") or ("", None))[1]):
            return nothing_at(path)
        role = needed(scope["method"], path)
        if role is None:
            return None
        address = network((scope.get("client") or ("unknown", 0))[0])
        caller = address
        if self.keyring is not None:
            key = await self._key(scope, address)
            if isinstance(key, Response):
                return key
            if not key.may(role):
                return problem(
                    403, f"this needs a key of the role {role}, and the key {key.id} has the role {key.role}"
                )
            caller = key.id
        wait_s = 0.0 if self.buckets is None else self.buckets.take(caller)
        return _slower(wait_s, "requests come faster than this server takes them from one caller") if wait_s else None

    def _is_at(self, path: str, port: int | None) -> bool:
        """Whether a path is answered on the port that was asked."""
        if port == self.admin_port:
            return below(path, (*INNER, *OPEN))
        return not below(path, INNER)

    async def _key(self, scope: Scope, address: str) -> Key | Response:
        """The key that a request shows, or why it counts for nothing."""
        assert self.keyring is not None
        given = _shown(scope)
        if given is None:
            return _unknown("this needs an API key; send it as the header authorization: Bearer KEY")
        key = self.keyring.known(given)
        if key is None:
            wait_s = self._tries.take(address)
            if wait_s:
                return _slower(wait_s, "too many keys that are not known here were tried from this address")
            async with self._proving:  # one at a time: tried keys must not take the cores that pages need
                key = self.keyring.known(given) or await anyio.to_thread.run_sync(self.keyring.prove, given)
            if key is None:
                return _unknown("this API key is not known here; it may have been revoked")
            self._tries.put_back(address)  # many callers behind one address may all be right
        call = CALL.get()
        if call is not None:
            call.key = key.id
        return key


def describe_keys(app: FastAPI) -> None:
    """Say in the API's description how a key is sent, so that /docs offers to."""
    plain = app.openapi

    def with_keys() -> dict[str, Any]:
        description = plain()
        description.setdefault("components", {})["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        description["security"] = [{"bearer": []}, {"header": []}]
        return description

    object.__setattr__(app, "openapi", with_keys)


def _shown(scope: Scope) -> str | None:
    """The key in a request's head; x-api-key goes before authorization, which a proxy may use for itself."""
    bearer = None
    for name, value in scope["headers"]:
        if name == b"x-api-key":
            return _text(value)
        if name == b"authorization" and bearer is None and value[:7].lower() == b"bearer ":
            bearer = _text(value[7:])
    return bearer


def _text(value: bytes) -> str:
    return value[:_LONGEST_KEY].decode("latin-1").strip()


def _unknown(sentence: str) -> Response:
    refusal = problem(401, sentence)
    refusal.headers["www-authenticate"] = "Bearer"
    return refusal


def _slower(wait_s: float, sentence: str) -> Response:
    seconds = max(1, math.ceil(wait_s))
    refusal = problem(429, f"{sentence}; try again in {seconds} s")
    refusal.headers["retry-after"] = str(seconds)
    return refusal
