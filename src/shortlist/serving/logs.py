"""What a server logs: one JSON object a line, without personal data.

    {"time": "2026-03-01T10:00:00.123Z", "level": "info", "request_id": "9f3c...", "event": "request", "method": "GET",
     "route": "/v1/recommend/{user:path}", "status": 200, "ms": 3.1, "key": "3f9a01c2", "page": "5d1e..."}

A route is logged as its pattern, never as the path that names a user; no address, no body, no query, and of a fault its type and the
lines it came through but not its words, which may quote what a user sent. `page` is the request_id in the answer, which names it in the
request log.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import sys
import traceback
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO, Any

REQUESTS = logging.getLogger("shortlist.requests")
_LOGGERS = ("shortlist", "uvicorn")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_FRAMES = 12


@dataclass(slots=True)
class Call:
    """What is known of a request while it is answered."""

    request_id: str
    key: str | None = None
    """Id of the key that it showed."""
    page: str | None = None
    """The request_id of the answer."""


CALL: ContextVar[Call | None] = ContextVar("call", default=None)
"""The request that is being answered."""


def request_id_of(headers: list[tuple[bytes, bytes]]) -> str:
    """The id that a proxy gave in x-request-id, where it is one: 1 to 64 letters, digits and any of . _ -; else a new one."""
    for name, value in headers:
        if name == b"x-request-id":
            given = value.decode("latin-1")
            if _REQUEST_ID.fullmatch(given):
                return given
            break
    return secrets.token_hex(8)


class JsonLines(logging.Formatter):
    """A log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        now = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line: dict[str, Any] = {"time": now, "level": record.levelname.lower()}
        call = CALL.get()
        if call is not None:
            line["request_id"] = call.request_id
        told = getattr(record, "told", None)
        line |= {"event": "message", "logger": record.name, "message": record.getMessage()} if told is None else told
        if record.exc_info and record.exc_info[1] is not None:
            if record.name.startswith("uvicorn"):
                line["message"] = line["message"].splitlines()[0]
            line |= _fault(record.exc_info[1])
        return json.dumps(line, ensure_ascii=False, default=str)


def _fault(error: BaseException) -> dict[str, Any]:
    """An exception's type and the lines it came through, innermost last."""
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    return {"error": type(error).__name__, "at": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]}


def install(*, requests: bool, stream: IO[str] | None = None) -> logging.Handler:
    """Write warnings and errors of this package and of uvicorn as lines of JSON.

    Args:
        requests: a line per request too.
        stream: where to; None = stderr.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.propagate = False
    REQUESTS.setLevel(logging.INFO if requests else logging.WARNING)
    return handler


def uninstall(handler: logging.Handler) -> None:
    """Undo `install`."""
    for name in _LOGGERS:
        logging.getLogger(name).removeHandler(handler)
        logging.getLogger(name).propagate = True
    REQUESTS.setLevel(logging.NOTSET)


def log_request(*, method: str, route: str, status: int, seconds: float) -> None:
    """One request is done."""
    if not REQUESTS.isEnabledFor(logging.INFO):
        return
    call = CALL.get()
    told = {"event": "request", "method": method, "route": route, "status": status, "ms": round(seconds * 1e3, 2)}
    if call is not None:
        told |= {name: value for name, value in (("key", call.key), ("page", call.page)) if value is not None}
    REQUESTS.info("request", extra={"told": told})
