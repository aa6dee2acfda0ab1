"""Counts of things in messages."""

from __future__ import annotations


def pluralise(n: int, noun: str, plural: str = "") -> str:
    """A count with its noun; ``plural`` is for a noun whose plural does not simply add an s.

    >>> pluralise(1, "case"), pluralise(0, "case"), pluralise(2, "series", "series")
    ('1 case', '0 cases', '2 series')
    """
    return f"{n} {noun if n == 1 else plural or noun + 's'}"
