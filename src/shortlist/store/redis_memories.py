"""Memories in Redis, for servers that share them: within a bound of their own, dropped when nobody renews them, and done without while
Redis is away.

    {shortlist}:memory:USER:SNAPSHOT      hash of one user's memories under one snapshot, by system; expires
    {shortlist}:memory-used               sorted set of USER:SNAPSHOT by when it was last written, milliseconds
    {shortlist}:memory-bytes              hash of USER:SNAPSHOT to its bytes; "" holds the sum
    {shortlist}:memory-snapshots          sorted set of snapshots by when they were last written for

USER is a digest: no name of a user stands in Redis. One script does a write, so the sum never leaves the bound between two servers'
writes: the users that were written longest ago make room. What Redis drops by a bound of its own (maxmemory) is counted until its turn
comes, so the sum errs on the safe side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shortlist.errors import ConfigError
from shortlist.extras import library
from shortlist.models.base import Memory
from shortlist.store.breaker import Breaker
from shortlist.store.shelf import ShelfStatus, digest, packed, unpacked

ENTRY_BYTES = 256
"""Counted for every memory on top of its content."""
REST_S = 0.5
"""Seconds for which a Redis that could not be reached is left alone."""
CONNECT_S = 0.25
ANSWER_S = 0.25
"""Seconds after which a request does without."""
PREFIX = "{shortlist}:memory"
"""Braces keep all keys on one node of a Redis Cluster."""

_DROP = """
local function drop(member)
  redis.call('DEL', KEYS[1] .. ':' .. member)
  redis.call('ZREM', KEYS[2], member)
  local size = tonumber(redis.call('HGET', KEYS[3], member) or '0')
  redis.call('HDEL', KEYS[3], member)
  redis.call('HINCRBY', KEYS[3], '', 0 - size)
end
"""
_PUT = (
    _DROP
    + """
local user, snapshot, system, content = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local max_bytes, ttl_ms, overhead = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local member = user .. ':' .. snapshot
local entry = KEYS[1] .. ':' .. member
if content == '' then redis.call('HDEL', entry, system) else redis.call('HSET', entry, system, content) end
local size = 0
for _, name in ipairs(redis.call('HKEYS', entry)) do size = size + redis.call('HSTRLEN', entry, name) + overhead end
if size == 0 then
  drop(member)
else
  local before = tonumber(redis.call('HGET', KEYS[3], member) or '0')
  redis.call('HSET', KEYS[3], member, size)
  redis.call('HINCRBY', KEYS[3], '', size - before)
  redis.call('ZADD', KEYS[2], now, member)
  redis.call('ZADD', KEYS[4], now, snapshot)
  redis.call('PEXPIRE', entry, ttl_ms)
end
for _, old in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now - ttl_ms, 'LIMIT', 0, 100)) do drop(old) end
redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', now - ttl_ms)
local evicted = 0
while tonumber(redis.call('HGET', KEYS[3], '') or '0') > max_bytes do
  local oldest = redis.call('ZRANGE', KEYS[2], 0, 0)[1]
  if not oldest then redis.call('DEL', KEYS[3]) break end
  drop(oldest)
  evicted = evicted + 1
end
for _, name in ipairs({KEYS[2], KEYS[3], KEYS[4]}) do redis.call('PEXPIRE', name, 2 * ttl_ms) end
return evicted
"""
)
_FORGET = (
    _DROP
    + """
local snapshots = redis.call('ZRANGE', KEYS[4], 0, -1)
for _, snapshot in ipairs(snapshots) do drop(ARGV[1] .. ':' .. snapshot) end
return #snapshots
"""
)


class RedisMemories:
    """Memories of several servers in one Redis; safe to use from many threads.

    Args:
        url: redis://user:password@host:port/number, or rediss:// with TLS.
        max_bytes: bound of all of them together.
        ttl_s: seconds after which what nobody wrote again is dropped.

    A Redis that can not be reached is no error here: nothing is remembered until it is back, and `problem` says so.

    Raises ConfigError for a bound below a MiB, a URL that can not be read, or a missing extra.
    """

    is_shared = True

    def __init__(self, url: str, max_bytes: int, *, ttl_s: float) -> None:
        redis = library("redis", extra="redis", user="keeping memories in Redis")
        if max_bytes < 1 << 20:
            raise ConfigError(f"memories in Redis need a bound of at least 1 MiB, got {max_bytes:,} bytes")
        self._error = redis.RedisError
        # Once more at once: a connection that lay idle may have been cut by a restart in between.
        again = redis.retry.Retry(redis.backoff.NoBackoff(), 1, supported_errors=(redis.ConnectionError,))
        try:
            self._redis: Any = redis.Redis.from_url(
                url, socket_connect_timeout=CONNECT_S, socket_timeout=ANSWER_S, retry=again, max_connections=64
            )
        except ValueError:
            raise ConfigError("the URL of Redis can not be read; write redis://user:password@host:6379/0") from None
        told = self._redis.connection_pool.connection_kwargs
        self.name = f"redis://{told.get('host', told.get('path', 'localhost'))}:{told.get('port', 6379)}"
        self.max_bytes, self._ttl_ms = max_bytes, round(ttl_s * 1_000)
        self._put, self._forget = self._redis.register_script(_PUT), self._redis.register_script(_FORGET)
        self._names = [PREFIX, f"{PREFIX}-used", f"{PREFIX}-bytes", f"{PREFIX}-snapshots"]
        self._breaker = Breaker(REST_S)
        self._num_evicted = 0

    @property
    def problem(self) -> str | None:
        """Why Redis could not be used when it was last asked; None where it could."""
        reason = self._breaker.reason
        return None if reason is None else f"{self.name} can not be used: {reason}"

    def get(self, snapshot: str, system: str, keys: Sequence[str]) -> list[Memory | None]:
        """Per user what any server put last; None where there is nothing, or Redis is away."""

        def ask() -> list[bytes | None]:
            with self._redis.pipeline(transaction=False) as line:
                for user in keys:
                    line.hget(f"{PREFIX}:{digest(user).hex()}:{snapshot}", system)
                return line.execute()

        found = self._try(ask)
        return [None] * len(keys) if found is None else [None if data is None else unpacked(data) for data in found]

    def put(self, snapshot: str, system: str, keys: Sequence[str], memories: Sequence[Memory | None]) -> None:
        """Keep for all servers, in place of what was put before; None forgets. One above a quarter of the bound is not kept."""
        contents = [b"" if memory is None else packed(memory) for memory in memories]

        def send() -> list[int]:
            with self._redis.pipeline(transaction=False) as line:
                for user, content in zip(keys, contents, strict=True):
                    fits = content if len(content) <= self.max_bytes // 4 else b""
                    told = [digest(user).hex(), snapshot, system, fits, self.max_bytes, self._ttl_ms, ENTRY_BYTES]
                    self._put(keys=self._names, args=told, client=line)
                return line.execute()

        self._num_evicted += sum(self._try(send) or ())

    def forget(self, key: str) -> bool:
        """Wipe what any system of any snapshot kept of a user; False where Redis is away."""
        return self._try(lambda: self._forget(keys=self._names, args=[digest(key).hex()])) is not None

    def status(self) -> ShelfStatus:
        """Sizes of what all servers keep together; zeros while Redis is away."""

        def ask() -> tuple[int, int]:
            return int(self._redis.zcard(self._names[1])), int(self._redis.hget(self._names[2], "") or 0)

        num_entries, num_bytes = self._try(ask) or (0, 0)
        return ShelfStatus(
            kind="redis",
            num_entries=num_entries,
            num_bytes=num_bytes,
            max_bytes=self.max_bytes,
            num_evicted=self._num_evicted,
            problem=self.problem,
        )

    def close(self) -> None:
        """Close the connections; what was put stays."""
        self._redis.close()

    def _try(self, work: Any) -> Any:
        """The result of `work`; None while Redis is away, which costs a wait only for the first who notices."""
        if self._breaker.refusal() is not None:
            return None
        try:
            result = work()
        except (self._error, OSError) as error:
            self._breaker.failed(" ".join(str(error).split()) or type(error).__name__)
            return None
        self._breaker.worked()
        return result
