"""What machine this is, for figures that mean nothing without it."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_name() -> str:
    """Model of the processor, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
