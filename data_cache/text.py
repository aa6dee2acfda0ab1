"""Numbers and nouns in messages."""

from __future__ import annotations


def pluralise(n: int, noun: str, plural: str = "") -> str:
    """``1 case``, ``2 cases``; ``plural`` for a noun that takes no s.

    >>> counted(1, "case"), counted(0, "case"), counted(2, "series", "series")
    ('1 case', '0 cases', '2 series')
    """
    return f"{n} {noun if n == 1 else plural or noun + 's'}"
