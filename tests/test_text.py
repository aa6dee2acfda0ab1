"""Numbers and nouns in messages."""

from __future__ import annotations

from data_cache.text import pluralise


def test_one_is_no_plural() -> None:
    assert [pluralise(n, "case") for n in (0, 1, 2, 21)] == ["0 cases", "1 case", "2 cases", "21 cases"]
    assert (pluralise(1, "series", "series"), pluralise(3, "series", "series")) == ("1 series", "3 series")
