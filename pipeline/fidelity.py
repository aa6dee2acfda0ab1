"""What the grid allows: labels through the cache and back, against the truth, before anyone trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_cache.errors import CacheError
from data_cache.geometry import Box
from data_cache.reader import CacheStore
from data_cache.schema import FRACTION_ONE, CacheSchema, CaseMeta
from pipeline.labels import foreground_and_tumour
from pipeline.lesion_fidelity import LesionFidelity, TumourBox, by_diameter, lesion_fidelities
from pipeline.nifti import VolumeHeader, VolumeStream
from pipeline.nifti.stream import retry_with_stdlib_gzip
from pipeline.restore import native_labels
from pipeline.workers import Failure, run_parallel

Block = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseFidelity:
    """Dice, in native space, of a case's label after a round trip; None where the truth lacks the class.

    Attributes:
        liver, tumour: Through the cached fractions; liver is label ≥ 1.
        nearest_liver, nearest_tumour: Through ids sampled at the nearest voxel on the same grid.
        lesions: Each 26-connected tumour of the truth.
    """

    case: str
    liver: float | None
    tumour: float | None
    nearest_liver: float | None
    nearest_tumour: float | None
    lesions: tuple[LesionFidelity, ...]


def measure(
    raw: Path, store: CacheStore, *, jobs: int, report: Callable[[CaseFidelity | Failure[CaseMeta]], None]
) -> list[CaseFidelity]:
    """The fidelity of each labelled case of a store, in the store's order; one that fails is only reported.

    Args:
        raw: Folder of the data set that the store was built from.
        store: Its ``liver`` views are compared with the native labels.
        jobs: Worker processes; each holds a few blocks of slices, and a byte per voxel of the box around all tumours.
        report: Called with each result as it comes.

    Raises:
        CacheError: The store has no labelled case.
    """
    metas = [meta for meta in map(store.meta, store.case_ids) if meta.label is not None]
    if not metas:
        raise CacheError(f"{store.path}: has no labelled case: there is nothing to compare")
    task = partial(measure_case, raw=raw, store=store.path, schema=store.schema)
    found = {}
    for result in run_parallel(task, metas, jobs=jobs):
        report(result)
        if isinstance(result, CaseFidelity):
            found[result.case] = result
    return [found[case_id] for case_id in store.case_ids if case_id in found]


def measure_case(meta: CaseMeta, *, raw: Path, store: Path, schema: CacheSchema) -> CaseFidelity:
    """The fidelity of one case; raises LiversegError if its label or its cached views cannot be read."""
    assert meta.label is not None
    path, box = raw / meta.label.path, meta.boxes.get("liver", meta.boxes["scan"])
    shape_zyx = schema.spec.shape_zyx
    nearest = retry_with_stdlib_gzip(
        lambda use_stdlib: _nearest_ids(path, meta, box, shape_zyx, use_stdlib=use_stdlib)
    )
    if "liver" not in meta.boxes:
        return CaseFidelity(
            case=meta.case_id, liver=None, tumour=None, nearest_liver=None, nearest_tumour=None, lesions=()
        )
    fractions = CacheStore(store, schema, {meta.case_id: meta}).read(meta.case_id, "liver").fractions_czyx
    assert fractions is not None
    foreground = fractions.astype(np.float32) / np.float32(FRACTION_ONE)
    return retry_with_stdlib_gzip(
        lambda use_stdlib: _compare(path, meta.case_id, foreground, nearest, box, use_stdlib=use_stdlib)
    )


# ---- first pass: ids, the usual way


def _nearest_ids(
    path: Path, meta: CaseMeta, box: Box, shape_zyx: tuple[int, int, int], *, use_stdlib: bool
) -> Block:
    """Ids at the voxel nearest to each cached voxel's centre; axes in the file's order, canonical directions.

    Raises:
        CacheError: The file is not the one that the case was built from.
    """
    with VolumeStream.open(path, use_stdlib=use_stdlib) as stream:
        header = stream.header
        at_k, at_j, at_i = sampled_voxels(header, box, shape_zyx)
        ids_kji = np.zeros((len(at_k), len(at_j), len(at_i)), dtype=np.uint8)
        for first, block in _label_blocks(stream):
            inside = np.flatnonzero((at_k >= first) & (at_k < first + len(block)))
            if inside.size and block.any():
                ids_kji[inside] = block[np.ix_(at_k[inside] - first, at_j, at_i)]
        assert meta.label is not None
        meta.label.require_content(path, stream.sha256)
        return ids_kji


def sampled_voxels(header: VolumeHeader, box: Box, shape_zyx: tuple[int, int, int]) -> list[NDArray[np.intp]]:
    """For each axis of the file, the index of the voxel nearest to each cached voxel's centre.

    Target ``t`` has its centre at source edge coordinate ``(t + 0.5) * n_source / n_target``, in whole numbers;
    of two equally near voxels it takes the upper.
    """
    indices = []
    for axis in header.axes_kji:
        n_native, n_target = header.grid.shape_zyx[axis.canonical], shape_zyx[axis.canonical]
        start, n_source = box.start_zyx[axis.canonical], box.shape_zyx[axis.canonical]
        at = start + (2 * np.arange(n_target) + 1) * n_source // (2 * n_target)
        indices.append(n_native - 1 - at if axis.flipped else at)
    return indices


def nearest_labels(ids_kji: Block, box: Box, header: VolumeHeader) -> Iterator[Block]:
    """Labels of consecutive slices of the file, each voxel the id of the cached voxel that it lies in."""
    in_k, in_j, in_i = (
        _enclosing(header, axis, n_target, box)
        for axis, n_target in zip(range(3), ids_kji.shape, strict=True)
    )
    for k in in_k:
        if k < 0 or not ids_kji[k].any():
            yield np.zeros((1, len(in_j), len(in_i)), dtype=np.uint8)
            continue
        slice_ji = ids_kji[k][np.ix_(in_j, in_i)]
        slice_ji[in_j < 0] = 0
        slice_ji[:, in_i < 0] = 0
        yield slice_ji[None]


def _enclosing(header: VolumeHeader, axis: int, n_target: int, box: Box) -> NDArray[np.intp]:
    """For each voxel of a file's axis, the cached voxel that holds its centre; -1 outside of the box."""
    canonical, n_native = header.axes_kji[axis].canonical, header.shape_kji[axis]
    start, n_source = box.start_zyx[canonical], box.shape_zyx[canonical]
    native = np.arange(n_native) - start
    inside = (2 * native + 1) * n_target // (2 * n_source)
    inside[(native < 0) | (native >= n_source)] = -1
    return inside[::-1] if header.axes_kji[axis].flipped else inside


# ---- second pass: both ways against the truth


@dataclass(slots=True, kw_only=True)
class _Overlap:
    """Voxel counts of one class that add up over blocks."""

    truth: int = 0
    predicted: int = 0
    shared: int = 0

    def add(self, truth: NDArray[np.bool_], predicted: NDArray[np.bool_]) -> None:
        self.truth += int(np.count_nonzero(truth))
        self.predicted += int(np.count_nonzero(predicted))
        self.shared += int(np.count_nonzero(truth & predicted))

    @property
    def dice(self) -> float | None:
        return 2 * self.shared / (self.truth + self.predicted) if self.truth else None


def _compare(
    path: Path,
    case_id: str,
    foreground_czyx: NDArray[np.float32],
    nearest_kji: Block,
    box: Box,
    *,
    use_stdlib: bool,
) -> CaseFidelity:
    with VolumeStream.open(path, use_stdlib=use_stdlib) as stream:
        header, spacing_mm = stream.header, stream.header.grid.spacing_zyx_mm
        restored = (
            native_labels(foreground_czyx, box, header),
            nearest_labels(nearest_kji, box, header),
        )
        counts = [(_Overlap(), _Overlap()) for _ in restored]
        runs = [Runs(blocks) for blocks in restored]
        tumours = TumourBox()
        for first, truth in _label_blocks(stream):
            predictions = [run.take(len(truth)) for run in runs]
            for predicted, (liver, tumour) in zip(predictions, counts, strict=True):
                if truth.any() or predicted.any():
                    liver.add(truth > 0, predicted > 0)
                    tumour.add(truth == 2, predicted == 2)
            tumours.add(first, truth == 2, predictions[0] == 2)
    (liver, tumour), (nearest_liver, nearest_tumour) = counts
    return CaseFidelity(
        case=case_id,
        liver=liver.dice,
        tumour=tumour.dice,
        nearest_liver=nearest_liver.dice,
        nearest_tumour=nearest_tumour.dice,
        lesions=lesion_fidelities(
            *tumours.masks(), tuple(spacing_mm[axis.canonical] for axis in header.axes_kji)
        ),
    )


def _label_blocks(stream: VolumeStream) -> Iterator[tuple[int, Block]]:
    """Blocks of ids 0, 1 and 2, in the file's order."""
    for first, stored in stream.blocks():
        parts = foreground_and_tumour(stored, stream.header)
        if parts is None:
            yield first, np.zeros(stored.shape, dtype=np.uint8)
        else:
            yield first, (parts[0] + parts[1]).view(np.uint8)


class Runs:
    """Consecutive slices in blocks of one size, taken in runs of another."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        self._blocks = iter(blocks)
        self._rest: list[Block] = []

    def take(self, n_slices: int) -> Block:
        """The next ``n_slices`` slices; raises StopIteration where there are fewer."""
        while sum(map(len, self._rest)) < n_slices:
            self._rest.append(next(self._blocks))
        joined = self._rest[0] if len(self._rest) == 1 else np.concatenate(self._rest)
        self._rest = [joined[n_slices:]]
        return joined[:n_slices]


# ---- results


def to_json(results: Sequence[CaseFidelity]) -> dict[str, Any]:
    """The fields of each ``CaseFidelity`` as ``cases`` and of each ``SizeFidelity`` as ``by_diameter``."""
    return {
        "cases": [asdict(result) for result in results],
        "by_diameter": [
            asdict(size) for size in by_diameter([lesion for result in results for lesion in result.lesions])
        ],
    }
