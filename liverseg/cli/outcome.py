"""What a command hands back, and the JSON object that ``liverseg --json`` prints of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of a command.

    Attributes:
        result: Values by name: numbers, text, paths, records, and lists and dicts of these.
        complete: False where a part failed and was reported; the exit code is then 1.
    """

    result: Mapping[str, Any]
    complete: bool = True


def as_json(outcome: Outcome, *, command: str) -> str:
    """One JSON object on one line, in ASCII; NaN and infinity, which JSON lacks, are null."""
    content = {"command": command, "complete": outcome.complete, **plain(outcome.result)}
    return json.dumps(content, allow_nan=False)


def plain(value: Any) -> Any:
    """Records as dicts by field, paths as text, numbers of NumPy as Python's.

    Raises:
        TypeError: The value has no form in JSON.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no form in JSON")
