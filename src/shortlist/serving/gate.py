"""What stands around every route: who may ask, the limit on bodies, the count and the log of requests, and errors as one sentence."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shortlist.errors import ShortlistError
from shortlist.serving.batching import Overloaded
from shortlist.serving.guard import Guard
from shortlist.serving.logs import CALL, Call, log_request, request_id_of
from shortlist.serving.metrics import Metrics
from shortlist.serving.problems import nothing_at
from shortlist.serving.problems import problem as problem
from shortlist.serving.settings import ServerConfig
from shortlist.store.events import StoreUnavailable

LOG = logging.getLogger("shortlist.serving")
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
"""Counted under their names; what else a client may call a method is counted as "other", so that counters stay bounded."""


class Gate:
    """ASGI middleware: refuses who may not ask and bodies that are too long or too slow; times, counts and logs every request.

    Every answer has the header x-request-id, which its log lines carry; a page's is not to be kept by anything on the way.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, config: ServerConfig) -> None:
        self.app, self.metrics, self.guard = app, metrics, Guard(config)
        self.max_body_bytes, self.body_s = config.max_body_bytes, config.body_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        status = 0
        call = Call(request_id_of(scope["headers"]))
        before = CALL.set(call)
        own = [(b"x-request-id", call.request_id.encode())]
        if scope["path"].startswith("/v1/"):
            own.append((b"cache-control", b"no-store"))

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        try:
            refusal = await self.guard.refusal(scope)
            if refusal is not None:
                await refusal(scope, receive, send_and_note)
            else:
                await self._limited(scope, receive, send_and_note)
        except Exception as error:
            LOG.exception("a request failed", exc_info=error)
            if status:  # the answer has begun: the connection can only be cut
                raise
            fault = problem(500, f"this is a fault of the server, not of the request ({type(error).__name__})")
            await fault(scope, receive, send_and_note)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in METHODS else "other"
            seconds = time.perf_counter() - began
            status = status or 499  # the client went away before there was an answer
            self.metrics.answered(route, method, status, seconds)
            log_request(method=method, route=route, status=status, seconds=seconds)
            CALL.reset(before)

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body before the route sees it, up to a length and a time, so that a long or slow one costs no more than these."""
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        body, more = b"", scope["method"] in ("POST", "PUT", "PATCH")
        too_long = declared.isdigit() and int(declared) > self.max_body_bytes
        try:
            async with asyncio.timeout(self.body_s if more else None):
                while more and not too_long:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body, more = body + message.get("body", b""), message.get("more_body", False)
                    too_long = len(body) > self.max_body_bytes
        except TimeoutError:
            refusal = problem(408, f"the body did not come within {self.body_s:g} s; send it faster or in parts")
            await refusal(scope, receive, send)
            return
        if too_long:
            refusal = problem(413, f"the body is longer than {self.max_body_bytes:,} bytes; send it in parts")
            await refusal(scope, receive, send)
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)


def add_error_handlers(app: FastAPI) -> None:
    """Every error becomes {"error": one sentence} with a status that says whose it is."""

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if isinstance(first.get("input"), bytes):
            return problem(415, "the body must be JSON and be sent with the header content-type: application/json")
        return problem(400 if first["type"] == "json_invalid" else 422, validation_sentence(first))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        sentence = str(error.detail)
        if error.status_code == 404:
            return nothing_at(request.url.path)
        if error.status_code == 405:
            sentence = f"{request.method} is not possible at {request.url.path}; /docs lists what is"
        elif error.status_code == 400 and "parsing the body" in sentence:
            sentence = "the body is not JSON that can be read"
        answer = problem(error.status_code, sentence)
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(ShortlistError)
    async def _refused(_: Request, error: ShortlistError) -> Response:
        return problem(422, str(error))

    @app.exception_handler(StoreUnavailable)
    async def _unavailable(_: Request, error: StoreUnavailable) -> Response:
        LOG.error("%s", error)
        return problem(503, f"events can not be kept now, send them again later: {error}")

    @app.exception_handler(Overloaded)
    async def _overloaded(_: Request, error: Overloaded) -> Response:
        answer = problem(503, str(error))
        answer.headers["retry-after"] = "1"
        return answer


def validation_sentence(error: dict[str, Any]) -> str:
    """One finding of Pydantic as a sentence: where, what, and what was found."""
    kind, found = error["type"], error.get("input")
    if kind == "json_invalid":
        return f"the body is not JSON: {error.get('ctx', {}).get('error', 'it can not be read')}"
    names = [str(part) for part in error["loc"] if _is_place(part)]
    where = ".".join(names) or "the body"
    if kind == "extra_forbidden":
        return f"{where} is not a known field; /docs lists the fields"
    if kind == "missing":
        return f"{where} is missing"
    message = error["msg"].removeprefix("Value error, ")
    message = (
        message.replace("Input should", "it must").replace("String should", "it must").replace("List should", "it must")
    )
    return f"{where}: {message[0].lower()}{message[1:]}, got {_short(found)}"


def _is_place(part: str | int) -> bool:
    """Whether a part of Pydantic's location names a place in the request, rather than the branch of a type, as "(id)" does."""
    return isinstance(part, int) or (part not in ("body", "query", "path") and not part.startswith("("))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
