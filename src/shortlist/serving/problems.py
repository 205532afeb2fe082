"""Errors as a client gets them: {"error": "one sentence"}."""

from __future__ import annotations

import json

from fastapi import Response


def problem(status: int, sentence: str) -> Response:
    """An error as the client gets it."""
    return Response(json.dumps({"error": sentence}), status_code=status, media_type="application/json")


def nothing_at(path: str) -> Response:
    """The answer to a path that does not exist."""
    return problem(404, f"there is nothing at {path}; /docs lists what there is")
