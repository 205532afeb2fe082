"""Shortlist: from behaviour logs to a trained cascade, served inside a compute budget."""

from shortlist._version import __version__

__all__ = ["__version__"]
