"""Counts and names in messages."""

from __future__ import annotations

import unicodedata

# Control characters (terminal escapes, line breaks), invisible ones that turn the direction of a text, surrogates of
# bytes that are not UTF-8, and separators of lines.
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def pluralise(n: int, noun: str, plural: str = "") -> str:
    """A count with its noun; ``plural`` is for a noun whose plural does not simply add an s.

    >>> pluralise(1, "case"), pluralise(0, "case"), pluralise(2, "series", "series")
    ('1 case', '0 cases', '2 series')
    """
    return f"{n} {noun if n == 1 else plural or noun + 's'}"


def visible(text: str) -> str:
    """A text on one line, in characters that can be seen: what a terminal would obey, or not show, as escapes.

    >>> visible("a\\x1b[31m\\nb.nii")
    'a\\\\x1b[31m\\\\nb.nii'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode("ascii") if unicodedata.category(c) in _HIDDEN else c for c in text
    )
