"""Real PostgreSQL and Redis for tests, from Debian's packages, on loopback, each in a folder of its own.

    python tests/services.py        installs what is missing (as root, with apt-get); `make services` calls it

PostgreSQL refuses to run as root, so as root it runs as the user that its package brings.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

PACKAGES = {"postgres": "postgresql", "redis-server": "redis-server"}
_APT = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120"]
_START_S = 30.0
_PR_SET_PDEATHSIG = 1


class CanNotBeHad(RuntimeError):
    """A server that is neither there nor can be installed."""


def program(name: str) -> str | None:
    """Path of a server's program; Debian keeps PostgreSQL's out of PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


def install() -> None:
    """Install what is missing; CanNotBeHad says why that is not possible. Several processes may call it at once."""
    # Not in TMPDIR, which tests set to folders of their own.
    with open(f"/tmp/shortlist-services-{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = [package for name, package in PACKAGES.items() if program(name) is None]
        if not missing:
            return
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            raise CanNotBeHad(f"{' and '.join(missing)} must be installed: apt-get install {' '.join(missing)}")
        # Without a run level the packages start no server of their own.
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        for arguments in (["update"], ["install", "-y", "--no-install-recommends", *missing]):
            done = subprocess.run([*_APT, *arguments], env=quiet, capture_output=True, text=True)
            if done.returncode:
                said = (done.stderr or done.stdout).strip().splitlines()[-1:]
                raise CanNotBeHad(f"apt-get {' '.join(arguments)} failed: {' '.join(said)}")


class _Service:
    """A server process that can be killed and started again on the same port and folder."""

    def __init__(self, prefix: str, user: str | None, beneath: str | None = None) -> None:
        where = Path(beneath or _quick_folder())
        _sweep(where, prefix)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=where))
        self.user = user if os.geteuid() == 0 else None
        if self.user is not None:
            owner = pwd.getpwnam(self.user)
            os.chown(self.folder, owner.pw_uid, owner.pw_gid)
        self.port = _free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    def start(self) -> None:
        """Start, and return when connections are taken."""
        with open(self.folder.with_suffix(".log"), "ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_end_with_parent,  # also when a run of tests is killed
                **self.credentials(),
            )
        deadline = time.monotonic() + _START_S
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise CanNotBeHad(f"{self.command()[0]} did not start: {self.log()[-500:]}")
            time.sleep(0.03)

    def credentials(self) -> dict[str, object]:
        """Arguments of Popen that make the process another user's."""
        return {} if self.user is None else {"user": self.user, "group": self.user, "extra_groups": []}

    def log(self) -> str:
        """What the server said."""
        return self.folder.with_suffix(".log").read_text(errors="replace")

    def answers(self) -> bool:
        raise NotImplementedError

    def kill(self) -> None:
        """kill -9 of the server and every process of its own."""
        if self.process is not None and self.process.poll() is None:
            self._signal(signal.SIGKILL)
            self.process.wait()

    def pause(self, on: bool) -> None:
        """Let the server hang, or go on."""
        self._signal(signal.SIGSTOP if on else signal.SIGCONT)

    def _signal(self, number: int) -> None:
        """To the server first, so that it starts no more, and to its children, each of which has a session of its own."""
        family = [self.process.pid, *_children(self.process.pid)]
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def close(self) -> None:
        """End the server and remove its folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.with_suffix(".log").unlink(missing_ok=True)


class Postgres(_Service):
    """PostgreSQL with an empty schema per call of `schema`."""

    def __init__(self, beneath: str | None = None) -> None:
        super().__init__("shortlist-pg-", "postgres", beneath)
        self.count = 0
        self.data = self.folder / "data"
        made = subprocess.run(
            [program("initdb"), "-D", self.data, "-A", "trust", "-U", "shortlist", "-E", "UTF8", "--locale=C", "-N"],
            cwd=self.folder,
            capture_output=True,
            text=True,
            **self.credentials(),
        )
        if made.returncode:
            raise CanNotBeHad(f"initdb failed: {made.stderr[-500:]}")

    def command(self) -> list[str]:
        settings = (
            "listen_addresses=127.0.0.1",
            "unix_socket_directories=",
            "dynamic_shared_memory_type=mmap",  # in the folder: a killed server leaves nothing in /dev/shm
            "shared_buffers=16MB",
            "min_wal_size=32MB",
        )
        options = [word for setting in settings for word in ("-c", setting)]
        return [program("postgres"), "-D", str(self.data), "-p", str(self.port), *options]

    def answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url(), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def url(self, name: str = "public") -> str:
        """Of a schema of the one database."""
        return f"postgresql://shortlist@127.0.0.1:{self.port}/postgres?options=-csearch_path%3D{name}"

    def schema(self) -> str:
        """URL of a new and empty schema."""
        import psycopg

        self.count += 1
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA shop{self.count}")
        return self.url(f"shop{self.count}")


class Redis(_Service):
    """Redis that keeps its data over a restart."""

    def __init__(self) -> None:
        super().__init__("shortlist-redis-", None)

    def command(self) -> list[str]:
        settings = {"port": self.port, "bind": "127.0.0.1", "dir": self.folder, "appendonly": "yes", "save": "''"}
        return [program("redis-server"), *(word for name, v in settings.items() for word in (f"--{name}", str(v)))]

    def answers(self) -> bool:
        import redis

        try:
            return redis.Redis(port=self.port, socket_timeout=1, retry=None).ping()
        except redis.RedisError:
            return False

    def url(self, number: int = 0) -> str:
        return f"redis://127.0.0.1:{self.port}/{number}"

    def empty(self) -> None:
        """Forget everything."""
        import redis

        redis.Redis(port=self.port).flushall()


def _end_with_parent() -> None:
    """SIGINT for this process when its parent dies: PostgreSQL and Redis both stop at once on it, clients or not."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)


def _sweep(where: Path, prefix: str) -> None:
    """Remove what runs of tests that were killed have left."""
    for left in where.glob(f"{prefix}*"):
        pid = left.name.removeprefix(prefix).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _children(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
    return found


def _quick_folder() -> str:
    """Memory where there is room: what is tested is the death of processes, and a busy disk makes each recovery take half a minute."""
    memory = "/dev/shm"
    return memory if os.path.isdir(memory) and shutil.disk_usage(memory).free > 1 << 30 else "/tmp"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    try:
        install()
    except CanNotBeHad as error:
        print(f"Tests on PostgreSQL and Redis will be skipped: {error}", file=sys.stderr)
