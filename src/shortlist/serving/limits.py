"""How often a caller may ask: a bucket of tokens per caller, in bounded memory.

A bucket holds `burst` tokens and is filled by `rate` a second; a request takes one, and waits for none. What is remembered are the
callers that asked last, `max_callers` of them: one that is forgotten comes back with a full bucket.
"""

from __future__ import annotations

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache

from shortlist.errors import ConfigError


class Buckets:
    """Token buckets; belongs to one thread.

    Args:
        rate: tokens a second that a bucket gains.
        burst: tokens that it holds at most; None = those of two seconds, and at least one.
        max_callers: buckets remembered at most.
        clock: seconds; for tests.
    """

    def __init__(
        self,
        rate: float,
        burst: int | None = None,
        *,
        max_callers: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not (rate > 0 and math.isfinite(rate)):
            raise ConfigError(f"a rate must be a number above 0, got {rate}")
        if burst is not None and burst < 1:
            raise ConfigError(f"a burst must be at least 1, got {burst}")
        self.rate, self.burst = rate, burst or max(1, math.ceil(2 * rate))
        self.max_callers, self._clock = max_callers, clock
        self._level: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """By caller: tokens there were, and when; the one that asked last stands last."""

    def __len__(self) -> int:
        """Callers remembered."""
        return len(self._level)

    def take(self, caller: str) -> float:
        """Take a token: 0 where there was one, else the seconds until there is, and nothing is taken."""
        now = self._clock()
        tokens, since = self._level.pop(caller, (float(self.burst), now))
        tokens = min(self.burst, tokens + (now - since) * self.rate)
        enough = tokens >= 1
        self._level[caller] = (tokens - 1 if enough else tokens, now)
        if len(self._level) > self.max_callers:
            self._level.popitem(last=False)
        return 0.0 if enough else (1 - tokens) / self.rate

    def put_back(self, caller: str) -> None:
        """Undo a `take` that need not have been."""
        if caller in self._level:
            tokens, since = self._level[caller]
            self._level[caller] = (min(self.burst, tokens + 1), since)


@lru_cache(maxsize=4_096)
def network(address: str) -> str:
    """The caller that an address stands for: itself, or the /64 network of IPv6, of which one household has all addresses."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if found.version == 4:
        return address
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((found, 64), strict=False))
