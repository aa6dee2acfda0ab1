"""The one CT series of a folder or zip, and whether its slices make a volume."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_cache.errors import VolumeError
from data_cache.text import pluralise
from pipeline.dicom.header import (
    LOCALIZER,
    ROUNDED,
    SUBJECT_KEYWORDS,
    FaultyFile,
    OtherFile,
    Slice,
    read_file,
    require_pydicom,
)
from pipeline.dicom.source import AGAIN, UNPACK, DicomSource

SAME_MM = 0.01  # closer slices are at one and the same position
UNEVEN = 0.1  # of the spacing: more than that off is a missing slice, or not an evenly spaced series
ROUNDED_MM = 0.1  # scanners write positions with one to six decimals
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
REPAIR = "repair these files, or take out what is not of the series"
MAX_NAMED = 3  # files in a message
MAX_PASSES = 4  # more turns of the table than that are an arbitrary numbering


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One CT series.

    Attributes:
        slices: Along their normal: the order of the NIfTI file's.
        notes: What was passed over beside it, and what is doubtful about it.
    """

    slices: tuple[Slice, ...]
    notes: tuple[str, ...]


def read_series(source: DicomSource, *, uid: str | None = None, force: bool = False) -> Series:
    """Read the headers of a folder or zip and put its CT series together; no pixels are read.

    What is recognizably something else (localizers, segmentations, reports, pictures, text) is passed over and
    said. Everything else must be a slice that fits.

    Args:
        source: Folder (with its subfolders) or zip.
        uid: SeriesInstanceUID of the series to take; needed where there are several.
        force: Take what is not CT, and values without a rescale slope, as if they were HU.

    Raises:
        VolumeError: There is no CT series, or more than one and ``uid`` does not choose; files cannot be read; slices
            are missing, double, of different sizes or orientations, off their line, or of several passes. The
            message names the files.
    """
    require_pydicom(source.path)
    found = [read_file(source, file, force=force) for file in source.files()]
    slices = [f for f in found if isinstance(f, Slice)]
    others = [f for f in found if isinstance(f, OtherFile)]
    faulty = [f for f in found if isinstance(f, FaultyFile)]
    chosen, rest = _choose(source, slices, others, faulty, uid=uid)
    chosen.sort(key=lambda s: s.height_mm)
    _check_readable(source, chosen, others, faulty)
    _check_one_pass(source, chosen)
    _check_one_subject(source, chosen)
    _check_geometry(source, chosen)
    notes = (*_passed_over(rest, others, faulty, series=chosen[0].series), *_doubts(chosen))
    return Series(slices=tuple(chosen), notes=notes)


def series_affine(slices: Sequence[Slice]) -> NDArray[np.float64]:
    """Voxel centers (i, j, k) to RAS+ mm, from the first and last slice's positions (DICOM PS3.3 C.7.6.2.1.1).

    The third column is the real step between slices: with a tilted gantry it is not normal to them.
    """
    first, last = slices[0], slices[-1]
    row, column = np.reshape(first.orientation, (2, 3))
    affine = np.eye(4)
    affine[:3, 0] = row * first.pixel_mm[1]
    affine[:3, 1] = column * first.pixel_mm[0]
    affine[:3, 2] = (np.array(last.position_mm) - np.array(first.position_mm)) / (len(slices) - 1)
    affine[:3, 3] = first.position_mm
    return LPS_TO_RAS @ affine


# ---- which series


def _choose(
    source: DicomSource,
    slices: Sequence[Slice],
    others: Sequence[OtherFile],
    faulty: Sequence[FaultyFile],
    *,
    uid: str | None,
) -> tuple[list[Slice], list[Slice]]:
    """The slices of the one series that is asked for, and all others."""
    by_uid: dict[str, list[Slice]] = defaultdict(list)
    for s in slices:
        by_uid[s.series].append(s)
    volumes = {name: members for name, members in by_uid.items() if len(members) > 1}
    if not by_uid:
        raise VolumeError(f"{source.path}: {_nothing_found(others, faulty)}")
    if uid is not None and uid not in by_uid:
        raise VolumeError(f"{source.path}: has no CT series {uid}; it has {_listing(by_uid)}")
    if uid is None and len(volumes) > 1:
        raise VolumeError(
            f"{source.path}: holds {len(volumes)} series: {_listing(volumes)}: choose one with --series UID, or "
            "name a folder of one of them"
        )
    if uid is None:
        uid = next(iter(volumes or by_uid))
    if len(by_uid[uid]) < 2:
        _check_readable(source, by_uid[uid], others, faulty)
        raise VolumeError(
            f"{source.path}: {by_uid[uid][0].file.name} is the only slice: expected a series of 2 or more"
        )
    return by_uid[uid], [s for s in slices if s.series != uid]


def _listing(by_uid: dict[str, list[Slice]]) -> str:
    return ", ".join(
        f"{members[0].description!r} ({pluralise(len(members), 'image')}, {uid})"
        for uid, members in by_uid.items()
    )


def _nothing_found(others: Sequence[OtherFile], faulty: Sequence[FaultyFile]) -> str:
    if faulty:
        return _faults(faulty)
    kinds = Counter(other.what for other in others)
    if not kinds:
        return "holds no DICOM images: name the folder of one CT series"
    if "enhanced multi-frame CT" in kinds:
        return (
            "holds enhanced multi-frame CT, several slices in one file, which is not read here: convert it with "
            "dcm2niix"
        )
    if set(kinds) <= {".nii file", ".gz file"}:
        return "holds NIfTI files and no DICOM images: unpack it and name the NIfTI files"
    held = ", ".join(f"{n} × {what}" for what, n in kinds.most_common(5))
    return f"holds no CT series, but {held}: name the folder of one CT series"


def _check_readable(
    source: DicomSource, chosen: Sequence[Slice], others: Sequence[OtherFile], faulty: Sequence[FaultyFile]
) -> None:
    """Nothing that may be one of the series' slices is left out."""
    uid = chosen[0].series
    ours = [f for f in faulty if f.series in ("", uid)]
    ours += [
        FaultyFile(file=o.file, fault=f"is of the same series, but {o.what}")
        for o in others
        if o.series == uid and o.what != LOCALIZER
    ]
    if ours:
        raise VolumeError(f"{source.path}: {_faults(ours)}")


def _faults(faulty: Sequence[FaultyFile]) -> str:
    """Faults with the files that have them; equal ones once."""
    names: dict[str, list[str]] = defaultdict(list)
    for f in faulty:
        names[f.fault].append(f.file.name)
    listed = [
        f"{files[0]}{f' (and {len(files) - 1} more)' * (len(files) > 1)} {fault}"
        for fault, files in list(names.items())[:MAX_NAMED]
    ]
    if len(names) > MAX_NAMED:
        listed.append(f"and {len(names) - MAX_NAMED} more faults")
    remedy = "" if any(UNPACK in fault or AGAIN in fault for fault in names) else f": {REPAIR}"
    return f"{'; '.join(listed)}{remedy}"


def _passed_over(
    rest: Sequence[Slice], others: Sequence[OtherFile], faulty: Sequence[FaultyFile], *, series: str
) -> Iterator[str]:
    names: dict[str, list[str]] = defaultdict(list)
    for other in others:
        names[other.what].append(other.file.name)
    for s in rest:
        names[f"image of the series {s.description!r}"].append(s.file.name)
    for f in faulty:
        if f.series != series:
            names["damaged image of another series"].append(f.file.name)
    if names:
        listed = ", ".join(
            f"{len(files)} × {what} ({files[0]}{', …' * (len(files) > 1)})" for what, files in names.items()
        )
        yield f"passed over beside the series: {listed}"


def _doubts(slices: Sequence[Slice]) -> Iterator[str]:
    rounding = max(s.rounding for s in slices)
    if rounding > ROUNDED:
        yield (
            f"the slices' directions are off from orthogonal unit vectors by {rounding:.3f}: the nearest ones were "
            "used"
        )


# ---- one pass over one patient


def _check_one_subject(source: DicomSource, slices: Sequence[Slice]) -> None:
    """Careless anonymization gives one SeriesInstanceUID to several patients; what they are called is not repeated."""
    for keyword, values in zip(SUBJECT_KEYWORDS, zip(*(s.subject for s in slices), strict=True), strict=True):
        first: dict[str, str] = {}
        for s, value in zip(slices, values, strict=True):
            first.setdefault(value, s.file.name)
        names = [name for value, name in first.items() if value]
        if len(names) > 1:
            raise VolumeError(
                f"{source.path}: {names[0]} and {names[1]} are of one series, but differ in {keyword}: put each patient "
                "and study in a folder of its own"
            )


def _check_one_pass(source: DicomSource, slices: Sequence[Slice]) -> None:
    """Two passes over the same region, such as two phases, must not be woven into one volume."""
    passes: dict[tuple[str, ...], list[Slice]] = defaultdict(list)
    for s in slices:
        passes[s.acquisition].append(s)
    if len(passes) == 1:
        passes = {(f"run {n}",): run for n, run in enumerate(_runs(slices), 1)}
    if not _overlap(list(passes.values())):
        return
    listed = "; ".join(
        f"{pluralise(len(p), 'image')} from {p[0].file.name} to {p[-1].file.name}" for p in passes.values()
    )
    raise VolumeError(
        f"{source.path}: the series holds {len(passes)} passes over the same region ({listed}): put each in a folder "
        "of its own"
    )


def _runs(slices: Sequence[Slice]) -> list[list[Slice]]:
    """Slices by number, cut where the position jumps back; one run where the numbers say nothing."""
    if any(s.instance is None for s in slices) or len({s.instance for s in slices}) < len(slices):
        return [list(slices)]
    numbered = sorted(slices, key=lambda s: s.instance or 0)
    steps_mm = np.diff([s.height_mm for s in numbered])
    back = np.flatnonzero(steps_mm * np.sign(np.median(steps_mm)) < 0) + 1
    if len(back) >= MAX_PASSES:
        return [list(slices)]
    ends = [0, *back.tolist(), len(numbered)]
    return [numbered[start:stop] for start, stop in itertools.pairwise(ends)]


def _overlap(passes: Sequence[Sequence[Slice]]) -> bool:
    spans = sorted((min(s.height_mm for s in p), max(s.height_mm for s in p)) for p in passes)
    return any(above[0] <= below[1] + SAME_MM for below, above in itertools.pairwise(spans))


# ---- geometry


def _check_geometry(source: DicomSource, slices: Sequence[Slice]) -> None:
    first = slices[0]
    for s in slices:
        if s.shape_ji != first.shape_ji or not np.allclose(s.pixel_mm, first.pixel_mm, rtol=1e-3):
            raise VolumeError(
                f"{source.path}: {s.file.name} has another size or spacing than {first.file.name}"
            )
        if not np.allclose(s.orientation, first.orientation, atol=1e-3):
            raise VolumeError(f"{source.path}: {s.file.name} lies in another plane than {first.file.name}")
        if s.frame_of_reference != first.frame_of_reference:
            raise VolumeError(
                f"{source.path}: {s.file.name} has another frame of reference than {first.file.name}: their "
                "positions cannot be compared"
            )
    faults = list(_spacing_faults(slices)) or list(_line_faults(slices))
    if faults:
        more = f" and {len(faults) - MAX_NAMED} more" if len(faults) > MAX_NAMED else ""
        raise VolumeError(f"{source.path}: {'; '.join(faults[:MAX_NAMED])}{more}")


def _spacing_faults(slices: Sequence[Slice]) -> Iterator[str]:
    steps_mm = np.diff([s.height_mm for s in slices])
    usual_mm = float(np.median(steps_mm[steps_mm > SAME_MM])) if (steps_mm > SAME_MM).any() else 0.0
    for below, above, step_mm in zip(slices, slices[1:], steps_mm, strict=False):
        names = f"{below.file.name} and {above.file.name}"
        if step_mm <= SAME_MM:
            yield f"{names} are at the same position: delete one of them"
        elif abs(step_mm - usual_mm) > UNEVEN * usual_mm:
            missing = round(float(step_mm) / usual_mm) - 1
            missed = f"{pluralise(missing, 'slice')} {'is' if missing == 1 else 'are'} missing"
            what = missed if missing > 0 else "the slices are not evenly spaced"
            yield f"{what} between {names}: {step_mm:.2f} mm apart, the others {usual_mm:.2f} mm"


def _line_faults(slices: Sequence[Slice]) -> Iterator[str]:
    """Each slice's position against the line that the affine draws from the first to the last."""
    positions_mm = np.array([s.position_mm for s in slices])
    line_mm = np.linspace(positions_mm[0], positions_mm[-1], len(slices))
    step_mm = float(np.linalg.norm(line_mm[1] - line_mm[0]))
    off_mm = np.linalg.norm(positions_mm - line_mm, axis=1)
    worst = int(np.argmax(off_mm))
    if off_mm[worst] > max(ROUNDED_MM, UNEVEN * step_mm):
        yield (
            f"{slices[worst].file.name} lies {off_mm[worst]:.1f} mm off the straight line of evenly spaced slices "
            f"from {slices[0].file.name} to {slices[-1].file.name} (did the table move, or the pitch change?): "
            "resample the series to an even spacing first"
        )
