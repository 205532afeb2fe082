"""Errors a user can act on. Each message is one sentence or two: what is wrong, what was found, what to do.

The command line prints the message and exits with 2; HTTP answers 4xx with it. Everything else is a bug and keeps its traceback.
"""


class ShortlistError(ValueError):
    """Base of all errors that are the caller's to mend."""


class DataError(ShortlistError):
    """A log, table or batch is not what it should be."""


class ConfigError(ShortlistError):
    """A setting is unknown, of the wrong type, or out of range."""


class SnapshotError(ShortlistError):
    """A snapshot or checkpoint is missing, damaged, or written by an incompatible version."""


class UnknownSystem(ConfigError):
    """A system was named that is not in the registry."""
