"""What was assumed or is doubtful about scans, said once per scan; what many scans have in common, once per command."""

from __future__ import annotations

from collections.abc import Sequence

from data_cache.text import pluralise


def warn_of_scan(name: str, notes: Sequence[str]) -> None:
    """Print each note of a scan but the missing unit, which ``warn_of_units`` counts."""
    from liverseg.console import warn
    from pipeline.nifti import NO_UNIT

    for note in notes:
        if note != NO_UNIT:
            warn(f"{name}: {note}")


def warn_of_units(notes_of: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Print one line about all scans whose header states no unit, which is nibabel's default; none without such scans.

    Args:
        notes_of: The name of each scan, and its notes.
    """
    from liverseg.console import output, warn
    from pipeline.nifti import NO_UNIT

    names = [name for name, notes in notes_of if NO_UNIT in notes]
    if len(names) == 1:
        warn(f"{names[0]}: {NO_UNIT}")
    elif names:
        which = f": {', '.join(names)}" if output().verbose else " (--verbose names them)"
        warn(f"{pluralise(len(names), 'scan')} do not state a unit of length: mm was assumed{which}")
