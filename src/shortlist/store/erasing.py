"""Deletion that leaves nothing behind in a SQLite file: rows, their index entries, and what the log of changes still has of them.

`PRAGMA secure_delete` writes zeros over deleted rows; copies that SQLite left in unused parts of pages when it split them go with VACUUM,
which writes the file anew; the write-ahead log is emptied last. A file of more than `MAX_VACUUM_BYTES` is not written anew: that would
hold up other writers for long, and is left to a quiet hour (`VACUUM` in any SQLite client).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import Delete, Engine

MAX_VACUUM_BYTES = 1 << 30
_WAIT_S = 5.0


def erase(engine: Engine, path: Path, deletions: Sequence[Delete]) -> tuple[int, bool]:
    """Delete rows in one transaction and wipe their bytes: how many rows went, and whether the file was written anew.

    Args:
        engine: of the file, in WAL mode.
        path: of the file.
        deletions: what to delete.

    Raises SQLAlchemyError where the file can not be written.
    """
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("PRAGMA secure_delete = ON").close()
        connection.exec_driver_sql("BEGIN IMMEDIATE").close()
        try:
            num_rows = sum(connection.execute(deletion).rowcount for deletion in deletions)
            connection.exec_driver_sql("COMMIT").close()
        except BaseException:
            connection.exec_driver_sql("ROLLBACK").close()
            raise
        anew = path.stat().st_size <= MAX_VACUUM_BYTES
        if anew:
            connection.exec_driver_sql("VACUUM").close()
        deadline = time.monotonic() + _WAIT_S
        while True:
            # A reader of an older state keeps the log; readers here are short.
            busy = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").scalar()
            if not busy or time.monotonic() > deadline:
                return num_rows, anew and not busy
            time.sleep(0.05)
