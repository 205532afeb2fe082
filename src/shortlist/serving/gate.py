"""What stands around every route: the limit on bodies, the count of requests, and errors as one sentence."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shortlist.errors import ShortlistError
from shortlist.serving.batching import Overloaded
from shortlist.serving.metrics import Metrics
from shortlist.store.events import StoreUnavailable

LOG = logging.getLogger("shortlist.serving")


class Gate:
    """ASGI middleware: refuses bodies that are too long, times and counts every request."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, max_body_bytes: int) -> None:
        self.app, self.metrics, self.max_body_bytes = app, metrics, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        status = 500

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._limited(scope, receive, send_and_note)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.answered(route, scope["method"], status, time.perf_counter() - began)

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body up to the limit before the route sees it, so that a long one costs no more than the limit."""
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        body, more = b"", scope["method"] in ("POST", "PUT", "PATCH")
        too_long = declared.isdigit() and int(declared) > self.max_body_bytes
        while more and not too_long:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
            too_long = len(body) > self.max_body_bytes
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


def problem(status: int, sentence: str) -> Response:
    """An error as the client gets it."""
    return Response(json.dumps({"error": sentence}), status_code=status, media_type="application/json")


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
            sentence = f"there is nothing at {request.url.path}; /docs lists what there is"
        elif error.status_code == 405:
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

    @app.exception_handler(Exception)
    async def _bug(_: Request, error: Exception) -> Response:
        LOG.exception("a request failed", exc_info=error)
        return problem(500, f"this is a fault of the server, not of the request ({type(error).__name__})")


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
