"""The error of this package."""

from __future__ import annotations


class DataError(ValueError):
    """A source of data that cannot be used; the message says why and what to do."""
