"""Converts frozen dataclasses to JSON and back: parsed once at the boundary, with every fault listed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from data_cache.errors import LiversegError

T = TypeVar("T")

# `__pydantic_config__` of every dataclass that is parsed: unknown keys are faults, and so is NaN, which JSON lacks.
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


_ADAPTERS: dict[
    type, TypeAdapter[Any]
] = {}  # building one takes milliseconds, and opening a store parses each case


def _adapter(cls: type) -> TypeAdapter[Any]:
    if cls not in _ADAPTERS:
        _ADAPTERS[cls] = TypeAdapter(cls)
    return _ADAPTERS[cls]


def to_json(record: object) -> Any:
    """Convert a dataclass to plain dicts, lists, strings and numbers."""
    return _adapter(type(record)).dump_python(record, mode="json")


def parse(cls: type[T], data: object, *, source: str, error: type[LiversegError]) -> T:
    """Build ``cls`` from JSON-like ``data``.

    Args:
        cls: A dataclass whose ``__pydantic_config__`` is ``STRICT``.
        data: Dicts, lists, strings, numbers, booleans and None.
        source: Where ``data`` was read, for the message.
        error: Raised with every fault: the dotted name of the key, what is wrong, and what was found.
    """
    try:
        text = json.dumps(data)
    except RecursionError:
        raise error(f"{source}: nested too deeply") from None
    try:
        # Strict JSON mode accepts a list for a tuple but not a string for a number; strict Python mode accepts neither.
        record: T = _adapter(cls).validate_json(text, strict=True)
    except ValidationError as failure:
        faults = [_fault(details) for details in failure.errors()]
        raise error(f"{source}: " + "; ".join(faults)) from None
    return record


def _fault(details: Any) -> str:
    key = ".".join(str(part) for part in details["loc"]) or "value"
    match details["type"]:
        case "unexpected_keyword_argument":
            return f"{key}: unknown key"
        case "missing" | "missing_argument":
            return f"{key}: missing"
        case "json_invalid":  # plain values, but not of records: nested too deeply, half of a character
            return f"{key}: {details['msg']}"
        case "value_error":
            # A section's own check also names the section, as it must when the section is built alone.
            return f"{key}: " + str(details["ctx"]["error"]).removeprefix(f"{key}: ")
    return f"{key}: {details['msg']}, found {details['input']!r}"


def differences(
    found: Any, expected: Any, *, found_in: str, expected_by: str, key: str = ""
) -> Iterator[str]:
    """Each setting in which two nested dicts of plain values differ: ``key: FOUND_IN has 2, EXPECTED_BY has 4``.

    Args:
        found: A result of ``to_json``, or any other plain value.
        expected: The value to compare with.
        found_in: Noun for the first, such as "checkpoint".
        expected_by: Noun for the second, such as "configuration".
        key: Dotted name of what is compared; empty at the top.
    """
    if isinstance(found, dict) and isinstance(expected, dict):
        for part in dict.fromkeys((*found, *expected)):
            name = f"{key}.{part}" if key else str(part)
            yield from differences(
                found.get(part), expected.get(part), found_in=found_in, expected_by=expected_by, key=name
            )
    elif found != expected:
        yield f"{key}: {found_in} has {found!r}, {expected_by} has {expected!r}"
