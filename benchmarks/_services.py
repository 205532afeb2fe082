"""Real PostgreSQL and Redis for benchmarks, as tests/services.py starts them for the tests."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def services() -> Any:
    """The module tests/services.py, which belongs to no package."""
    folder = str(Path(__file__).parents[1] / "tests")
    if folder not in sys.path:
        sys.path.append(folder)  # last: names stay whose they were
    return importlib.import_module("services")


@contextmanager
def started(kind: Callable[[], Any]) -> Iterator[Any]:
    """A service that runs."""
    service = kind()
    try:
        service.start()
        yield service
    finally:
        service.close()
