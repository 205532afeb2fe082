"""API keys: who may read pages, who may write events, who may administer. A file keeps their salted hashes, never the keys.

    sl_3f9a01c2_Vb4...          a key: its id, which is no secret, and 32 random bytes; shown once, when it is made
    keys.json                   {"format": 1, "keys": [{"id", "name", "role", "made_at", "salt", "hash", "cost"}]}

A hash is scrypt's (RFC 7914), slow on purpose; a key that was proved once is known again by a quick digest under a secret of this
process. Both are compared in constant time. The id finds the one hash to compare with, so a wrong key costs at most one scrypt.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from shortlist.errors import ConfigError

LOG = logging.getLogger("shortlist.serving")
Role = Literal["read", "write", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
"""Each may do what those before it may."""
FORMAT = 1
COST = 2**14
"""scrypt's n: 16 MiB and 0.05 to 0.1 s for every key that was not proved before."""
_COSTS = range(2**10, 2**17)
_LOOK_S = 1.0
"""Seconds between looks at the file: a key that is revoked stops working within this time."""
_KEY = re.compile(r"sl_([0-9a-f]{8})_([A-Za-z0-9_-]{43})")
_NAME = re.compile(r"[\w.@-]{1,64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """What is kept of a key."""

    id: str
    """Eight hexadecimal digits, part of the key; logs name a key by it."""
    name: str
    """Who has it."""
    role: Role
    made_at: str
    """ISO 8601, UTC."""
    salt: str
    """16 bytes, hexadecimal."""
    hash: str
    """32 bytes, hexadecimal."""
    cost: int = COST
    """scrypt's n."""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ConfigError(f"a key's role is one of {', '.join(ROLES)}, got {self.role!r}")
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ConfigError(f"a key's name is 1 to 64 letters, digits and any of . _ @ -, got {self.name!r:.80}")
        for name, length in (("id", 8), ("salt", 32), ("hash", 64)):
            value = getattr(self, name)
            if not isinstance(value, str) or not re.fullmatch(f"[0-9a-f]{{{length}}}", value):
                raise ConfigError(f"a key's {name} is {length} hexadecimal digits, got {value!r:.80}")
        if not isinstance(self.cost, int) or self.cost not in _COSTS or self.cost & (self.cost - 1):
            raise ConfigError(f"a key's cost is a power of two from 1,024 to 65,536, got {self.cost!r}")

    def may(self, needed: Role) -> bool:
        """Whether its role is enough."""
        return ROLES.index(self.role) >= ROLES.index(needed)


def read_keys(path: Path) -> dict[str, Key]:
    """Keys by id; ConfigError names the file where it is missing, damaged or none of ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ConfigError(f"it is of format {content['format']}, and this version reads format {FORMAT}")
        keys = [Key(**entry) for entry in content["keys"]]
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; make a key with `shortlist keys add NAME --role read --file {path}`"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} can not be used as a file of keys ({error}); put back a copy or make it anew"
        ) from error
    return {key.id: key for key in keys}


def add_key(path: Path, name: str, role: Role, *, cost: int = COST) -> tuple[Key, str]:
    """Make a key and keep its hash; the file is made when missing.

    Args:
        path: file of keys; its folder must exist.
        name: who gets the key.
        role: what it is for.
        cost: scrypt's n.

    Returns what is kept, and the key itself, which can not be had again.

    Raises ConfigError: the name is taken, a value is not what it should be, or the file is damaged; nothing was written.
    """
    with _locked(path):
        keys = read_keys(path) if path.exists() else {}
        if any(key.name == name for key in keys.values()):
            raise ConfigError(f"{path} has a key named {name!r} already; revoke it first or take another name")
        number = secrets.token_hex(4)
        while number in keys:
            number = secrets.token_hex(4)
        secret, salt = secrets.token_urlsafe(32), secrets.token_bytes(16)
        key = Key(
            id=number,
            name=name,
            role=role,
            made_at=datetime.now(UTC).isoformat(timespec="seconds"),
            salt=salt.hex(),
            hash=_hash(secret, salt, cost).hex(),
            cost=cost,
        )
        _write(path, {**keys, number: key})
    return key, f"sl_{number}_{secret}"


def revoke_key(path: Path, name: str) -> Key:
    """Take a key out, by name or id; ConfigError where there is none. Running servers refuse it within a second."""
    with _locked(path):
        keys = read_keys(path)
        found = next((key for key in keys.values() if name in (key.name, key.id)), None)
        if found is None:
            raise ConfigError(
                f"{path} has no key named {name!r}; `shortlist keys list --file {path}` shows those it has"
            )
        _write(path, {number: key for number, key in keys.items() if number != found.id})
    return found


class Keyring:
    """The keys of a file as a server asks for them; follows changes of the file.

    A file that is damaged or gone while the server runs changes nothing, and an error is logged.

    Args:
        path: file of keys.
        clock: seconds; for tests.

    Raises ConfigError: the file can not be read, or holds no key.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self._clock = Path(path), clock
        self._stamp = _stamp(self.path)
        self._keys = read_keys(self.path)
        if not self._keys:
            raise ConfigError(
                f"{path} holds no key, so nobody could ask; add one with `shortlist keys add NAME --role read --file {path}`"
            )
        self._looked = clock()
        self._pepper = secrets.token_bytes(32)
        self._proved: dict[str, bytes] = {}
        """By id, the digest of the key that was proved: never more entries than the file has keys."""

    def known(self, given: str) -> Key | None:
        """The key, where it was proved before: takes microseconds."""
        self._follow()
        parts = _KEY.fullmatch(given)
        if parts is None:
            return None
        digest = self._proved.get(parts[1])
        if digest is None or not hmac.compare_digest(digest, self._digest(given)):
            return None
        return self._keys.get(parts[1])

    def prove(self, given: str) -> Key | None:
        """The key, if it is one; None else. Takes scrypt's time where the id is known, so call it off the event loop."""
        parts = _KEY.fullmatch(given)
        key = None if parts is None else self._keys.get(parts[1])
        if parts is None or key is None:
            return None
        if not hmac.compare_digest(_hash(parts[2], bytes.fromhex(key.salt), key.cost), bytes.fromhex(key.hash)):
            return None
        self._proved[key.id] = self._digest(given)
        return key

    def _digest(self, given: str) -> bytes:
        return hashlib.blake2b(given.encode(), key=self._pepper, digest_size=32).digest()

    def _follow(self) -> None:
        """Read the file again where it has changed."""
        now = self._clock()
        if now - self._looked < _LOOK_S:
            return
        self._looked = now
        stamp = _stamp(self.path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            fresh = read_keys(self.path)
        except ConfigError as error:
            LOG.error("%s; the keys read before stay valid", error)
            return
        for number in [number for number in self._proved if fresh.get(number) != self._keys.get(number)]:
            del self._proved[number]
        self._keys = fresh


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Changes when the file does."""
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_ino, about.st_size, about.st_mtime_ns


def _hash(secret: str, salt: bytes, cost: int) -> bytes:
    return hashlib.scrypt(secret.encode(), salt=salt, n=cost, r=8, p=1, maxmem=2**28, dklen=32)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time, by a lock on the folder."""
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is not a folder, so no file of keys can be made in it; create it first")
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _write(path: Path, keys: dict[str, Key]) -> None:
    """Replace the file whole; only its owner may read it."""
    content = {"format": FORMAT, "keys": [asdict(key) for key in keys.values()]}
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
