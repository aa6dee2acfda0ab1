"""The one CT series of a folder or zip, and whether its slices make a volume."""

from __future__ import annotations

import itertools
import re
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
ROUNDED_MM = 0.1  # positions are written with one to six decimals: with one, a step may be off by so much
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
REPAIR = "repair these files, or take out what is not of the series"
MAX_NAMED = 3  # files in a message
MAX_PASSES = 4  # more turns of the table than that are an arbitrary order
MIN_PASS_SLICES = 5  # in fewer, an order may be chance
FEW = 0.25  # of the slices: so few may lack a value; of two woven passes, one would lack about half


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
    passes = _overlapping_passes(slices)
    if passes:
        listed = "; ".join(
            f"{pluralise(len(p), 'image')} from {p[0].file.name} to {p[-1].file.name}" for p in passes
        )
        raise VolumeError(
            f"{source.path}: the series holds {len(passes)} passes over the same region ({listed}): put each in a "
            "folder of its own, and name one folder"
        )


def _overlapping_passes(slices: Sequence[Slice]) -> list[list[Slice]]:
    """By what the scanner says of a pass, else by time, number, or, without these, name; empty for a single pass."""
    named = _named_passes(slices)
    if _overlap(named):
        return named
    timed = _runs(slices, [s.time for s in slices])
    if _interleaved(timed):
        return timed
    if len(timed) == 1 and len({s.time for s in slices}) == len(slices):
        return []  # slice after slice from end to end, whatever the numbers are
    numbered = _runs(slices, [s.instance for s in slices])
    if _interleaved(numbered):
        return numbered
    twice = _numbered_twice(slices)
    if twice or timed or numbered:
        return twice
    exported = _runs(slices, _name_ranks(slices))
    return exported if _interleaved(exported) else []


def _named_passes(slices: Sequence[Slice]) -> list[list[Slice]]:
    """Slices by their values of ``PASS_KEYWORDS``, without the few that lack one: they are of some pass, too."""
    lacking = [
        values.count("") / len(values) for values in zip(*(s.acquisition for s in slices), strict=True)
    ]
    passes: dict[tuple[str, ...], list[Slice]] = defaultdict(list)
    for s in slices:
        if all(value or not 0 < share < FEW for value, share in zip(s.acquisition, lacking, strict=True)):
            told = (v for v, share in zip(s.acquisition, lacking, strict=True) if share <= 1 - FEW)
            passes[tuple(told)].append(s)
    return list(passes.values())


def _runs(slices: Sequence[Slice], keys: Sequence[float | None]) -> list[list[Slice]]:
    """Slices in the order of their keys, cut where the position turns, jumps back, or is one that was passed already.

    Empty where the keys say nothing: too few slices have one, all have the same, or the order is arbitrary.

    Args:
        slices: Sorted by position. Those with the same key stay together: they lie side by side in a single pass.
        keys: A time or number per slice.
    """
    groups: dict[float, list[Slice]] = defaultdict(list)
    for s, key in zip(slices, keys, strict=True):
        if key is not None:
            groups[key].append(s)
    if len(groups) < 2 or keys.count(None) >= FEW * len(keys):
        return []
    runs: list[list[Slice]] = []
    direction, low_mm, high_mm = 0, 0.0, 0.0
    for _, group in sorted(groups.items()):
        step = int(group[0].height_mm > high_mm) - int(group[-1].height_mm < low_mm)
        if runs and step and step * direction >= 0:
            runs[-1] += group
            direction = step
        else:
            runs.append(list(group))
            direction = 0
        low_mm, high_mm = group[0].height_mm, group[-1].height_mm
    return runs if len(runs) <= MAX_PASSES else []


def _name_ranks(slices: Sequence[Slice]) -> list[int]:
    """Each slice's place in the order of the files' names, whose numbers need not have leading zeros."""

    def key(n: int) -> list[str | int]:
        return [
            int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", slices[n].file.name)
        ]

    ranks = dict(zip(sorted(range(len(slices)), key=key), range(len(slices)), strict=True))
    return [ranks[n] for n in range(len(slices))]


def _interleaved(runs: Sequence[Sequence[Slice]]) -> bool:
    """Whether the slices of one run mostly lie between those of another, as those of two slabs do not."""
    return any(
        _changes(one, other) > min(len(one), len(other)) >= MIN_PASS_SLICES
        for one, other in itertools.combinations(runs, 2)
    )


def _changes(one: Sequence[Slice], other: Sequence[Slice]) -> int:
    """How often the next slice in space is of the other run."""
    merged = sorted((round(s.height_mm / SAME_MM), n) for n, run in enumerate((one, other)) for s in run)
    return sum(a[1] != b[1] for a, b in itertools.pairwise(merged))


def _numbered_twice(slices: Sequence[Slice]) -> list[list[Slice]]:
    """The passes where most image numbers occur twice or more; empty for slabs that are each numbered anew."""
    numbers = [s.instance for s in slices if s.instance is not None]
    n_passes = max(Counter(numbers).values(), default=1)
    # Equal passes, of which one may lack a slice: others are not spaced evenly when they are woven.
    often = 1 < len(set(numbers)) <= (len(numbers) + 1) / 2
    steps = np.sign(np.diff(numbers))
    slabs = np.count_nonzero(np.diff(steps)) <= 2 * (n_passes - 1)  # two changes at the boundary of two slabs
    copies = any(above.height_mm - below.height_mm <= SAME_MM for below, above in itertools.pairwise(slices))
    if not often or n_passes > MAX_PASSES or slabs or copies:
        return []
    return [list(slices[n::n_passes]) for n in range(n_passes)]


def _overlap(passes: Sequence[Sequence[Slice]]) -> bool:
    spans = sorted((min(s.height_mm for s in p), max(s.height_mm for s in p)) for p in passes)
    return any(above[0] <= below[1] + SAME_MM for below, above in itertools.pairwise(spans))


# ---- geometry


def _check_one_frame(source: DicomSource, slices: Sequence[Slice]) -> None:
    framed = [s for s in slices if s.frame_of_reference]
    for s in framed:
        if s.frame_of_reference != framed[0].frame_of_reference:
            raise VolumeError(
                f"{source.path}: {s.file.name} has another frame of reference than {framed[0].file.name}: their "
                "positions cannot be compared"
            )


def _check_geometry(source: DicomSource, slices: Sequence[Slice]) -> None:
    first = slices[0]
    for s in slices:
        if s.shape_ji != first.shape_ji or not np.allclose(s.pixel_mm, first.pixel_mm, rtol=1e-3):
            raise VolumeError(
                f"{source.path}: {s.file.name} has another size or spacing than {first.file.name}"
            )
        if not np.allclose(s.orientation, first.orientation, atol=1e-3):
            raise VolumeError(f"{source.path}: {s.file.name} lies in another plane than {first.file.name}")
    _check_one_frame(source, slices)
    faults = list(_spacing_faults(slices)) or list(_line_faults(slices))
    if faults:
        more = f" and {len(faults) - MAX_NAMED} more" if len(faults) > MAX_NAMED else ""
        raise VolumeError(f"{source.path}: {'; '.join(faults[:MAX_NAMED])}{more}")


def _spacing_faults(slices: Sequence[Slice]) -> Iterator[str]:
    steps_mm = np.diff([s.height_mm for s in slices])
    usual_mm = float(np.median(steps_mm[steps_mm > SAME_MM])) if (steps_mm > SAME_MM).any() else 0.0
    rounded_mm = _rounded_mm(slices) + SAME_MM
    for below, above, step_mm in zip(slices, slices[1:], steps_mm, strict=False):
        names = f"{below.file.name} and {above.file.name}"
        if step_mm <= SAME_MM:
            yield f"{names} are at the same position: delete one of them"
        elif abs(step_mm - usual_mm) > max(UNEVEN * usual_mm, rounded_mm):
            missing = round(float(step_mm) / usual_mm) - 1
            missed = f"{pluralise(missing, 'slice')} {'is' if missing == 1 else 'are'} missing"
            what = missed if missing > 0 else "the slices are not evenly spaced"
            yield f"{what} between {names}: {step_mm:.2f} mm apart, the others {usual_mm:.2f} mm"


def _rounded_mm(slices: Sequence[Slice]) -> float:
    """How far rounding may put a step off: by a tenth along each coordinate that has one decimal in all slices."""
    tenths = np.array([s.position_mm for s in slices]) / ROUNDED_MM
    coarse = (np.abs(tenths - np.rint(tenths)) < 1e-6).all(axis=0)
    return ROUNDED_MM * float(np.abs(slices[0].normal) @ coarse)


def _line_faults(slices: Sequence[Slice]) -> Iterator[str]:
    """Each slice's position against the line that the affine draws from the first to the last."""
    positions_mm = np.array([s.position_mm for s in slices])
    line_mm = np.linspace(positions_mm[0], positions_mm[-1], len(slices))
    step_mm = float(np.linalg.norm(line_mm[1] - line_mm[0]))
    off_mm = np.linalg.norm(positions_mm - line_mm, axis=1)
    worst = int(np.argmax(off_mm))
    rounded_mm = ROUNDED_MM + SAME_MM
    if off_mm[worst] > UNEVEN * step_mm and (np.abs(positions_mm - line_mm) > rounded_mm).any():
        yield (
            f"{slices[worst].file.name} lies {off_mm[worst]:.1f} mm off the straight line of evenly spaced slices "
            f"from {slices[0].file.name} to {slices[-1].file.name} (did the table move, or the pitch change?): "
            "resample the series to an even spacing first"
        )
