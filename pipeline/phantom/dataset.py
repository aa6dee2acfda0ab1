"""A synthetic Decathlon data set: patients painted slab by slab and written as Task03_Liver files."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from data_cache.errors import DataSetError
from data_cache.files import write_text
from data_cache.geometry import Grid
from data_cache.outputs import nifti_mark, require_replaceable
from data_cache.text import pluralise
from pipeline.nifti import write_volume
from pipeline.phantom.anatomy import Anatomy, DomainShift, PhantomSpec
from pipeline.phantom.implicit import Volume
from pipeline.phantom.painting import paint_slab
from pipeline.phantom.patient import draw_anatomy
from pipeline.workers import Failure, run_parallel

# The dozen float32 arrays of a slab then take about 100 MB, whatever the volume.
_SLAB_VOXELS = 1_500_000
DESCRIPTION = "liverseg phantom: not a patient"  # in each file's header; only such files are ever replaced


# --- The scan ----------------------------------------------------------------------------------------------------


def render(anatomy: Anatomy) -> tuple[NDArray[np.int16], NDArray[np.uint8], Grid]:
    """Paint and scan a patient.

    This goes slab by slab along z: 512×512×400 voxels need under 1 GB. Noise and fields are fixed in space and by
    slice, so slabs fit together whatever their height.

    Returns:
        Image (nz, ny, nx) in HU, label (nz, ny, nx) with 0 background, 1 liver, 2 cancer, and their grid, RAS+.
    """
    grid = anatomy.grid
    image = np.empty(grid.shape_zyx, dtype=np.int16)
    label = np.empty(grid.shape_zyx, dtype=np.uint8)
    depth, height, width = grid.shape_zyx
    slab = max(1, _SLAB_VOXELS // (height * width))
    for start in range(0, depth, slab):
        stop = min(depth, start + slab)
        hu, label[start:stop] = paint_slab(anatomy, _axes_mm(anatomy, start, stop))
        image[start:stop] = _scanned(anatomy, hu, start)
    return image, label, grid


def _axes_mm(anatomy: Anatomy, start: int, stop: int) -> tuple[Volume, Volume, Volume]:
    """Reference-frame coordinates of the voxel centres of slices ``start:stop``."""
    nx, ny, _ = anatomy.shape_xyz
    x, y, z = (
        ((origin + spacing * index) / scale).astype(np.float32)
        for origin, spacing, index, scale in zip(
            anatomy.origin_xyz_mm,
            anatomy.spacing_xyz_mm,
            (np.arange(nx), np.arange(ny), np.arange(start, stop)),
            anatomy.scale_xyz,
            strict=True,
        )
    )
    return x, y, z


def _scanned(anatomy: Anatomy, hu: Volume, first_slice: int) -> NDArray[np.int16]:
    """Add noise, round, and pad outside the field of view."""
    gain = _noise_gain(anatomy)
    noisy = [slice_hu + gain * _noise_slice(anatomy, first_slice + k) for k, slice_hu in enumerate(hu)]
    image: NDArray[np.int16] = np.clip(np.rint(np.stack(noisy)), -1024, 3071).astype(np.int16)
    if anatomy.padding_hu is not None:
        image[:, _outside_circle(anatomy)] = anatomy.padding_hu
    return image


def _noise_gain(anatomy: Anatomy) -> Volume:
    """Standard deviation of the noise (ny, nx) in HU: highest in the middle of the body, where the fewest photons arrive;
    half of that in air."""
    x_mm, y_mm, _ = _axes_mm(anatomy, 0, 1)
    body = np.exp(-((x_mm / 130.0) ** 2)[None, :] - ((y_mm / 110.0) ** 2)[:, None])
    return np.asarray(anatomy.noise_hu * (0.5 + 0.5 * body), dtype=np.float32)


def _noise_slice(anatomy: Anatomy, number: int) -> Volume:
    """Correlated noise (ny, nx) of unit standard deviation; neighbouring slices share some of it."""
    nx, ny, _ = anatomy.shape_xyz
    shared = 0.35
    raw = np.zeros((ny, nx), dtype=np.float32)
    for offset, weight in ((-1, shared), (0, 1.0), (1, shared)):
        # + 1: seeds cannot be negative, and the slice below the first one is drawn, too.
        seed = (anatomy.key, 4, number + offset + 1)
        raw += np.float32(weight) * np.random.default_rng(seed).standard_normal((ny, nx), dtype=np.float32)
    blurred = ndimage.gaussian_filter(raw, anatomy.noise_blur_px, mode="wrap")
    kernel = ndimage.gaussian_filter1d(np.eye(1, 31, 15)[0], anatomy.noise_blur_px)
    # Filtering white noise scales its variance by the sum of the squared weights, here along y and along x.
    return np.asarray(blurred / (float(kernel @ kernel) * np.sqrt(1 + 2 * shared**2)), dtype=np.float32)


def _outside_circle(anatomy: Anatomy) -> NDArray[np.bool_]:
    nx, ny, _ = anatomy.shape_xyz
    x, y = np.arange(nx) - (nx - 1) / 2, np.arange(ny) - (ny - 1) / 2
    return np.asarray(np.hypot(x[None, :], y[:, None]) > max(nx, ny) / 2)


# --- Files -------------------------------------------------------------------------------------------------------


def write_phantoms(
    raw: Path,
    *,
    cases: int,
    tests: int,
    shape_xyz: tuple[int, int, int] = PhantomSpec().shape_xyz,
    seed: int = 0,
    domain_shift: DomainShift | None = None,
    jobs: int = 1,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Path]:
    """Write a data set in the Decathlon's layout: labelled cases from ``liver_0`` on, then the unlabelled ones.

    Case ``i`` of a seed has the same bytes whatever the number of cases or jobs (on one machine: NumPy and zlib may
    round or compress differently elsewhere). Even cases are stored as LPS, odd ones as RAS.

    Args:
        raw: Folder for ``imagesTr``, ``labelsTr``, ``imagesTs`` and ``dataset.json``; created if missing.
        cases: Number of labelled cases.
        tests: Number of unlabelled cases, numbered after the labelled ones.
        shape_xyz: Voxels of each case.
        seed: Chooses the patients.
        domain_shift: How the scans differ from ordinary ones; the patients stay the same.
        jobs: Number of worker processes.
        progress: Called with the name of each case once its files are complete.

    Returns:
        The image files, in the order of their numbers.

    Raises:
        ValueError: A negative number of cases, or a shape below 8 voxels.
        DataSetError: ``raw`` holds another data set, or phantoms with other settings, and nothing is overwritten; or
            a case could not be written.
    """
    if cases < 0 or tests < 0:
        raise ValueError(f"the numbers of cases and tests cannot be negative, got {cases} and {tests}")
    spec = PhantomSpec(shape_xyz=shape_xyz, domain_shift=domain_shift)
    dataset = json.dumps(_dataset(cases, tests, spec=spec, seed=seed), indent=4) + "\n"
    _refuse_other_data(raw, dataset, cases=cases, tests=tests)
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (raw / folder).mkdir(parents=True, exist_ok=True)
    task = partial(_write_case, raw=raw, spec=spec, seed=seed, labelled=cases)
    failures = []
    for outcome in run_parallel(task, range(cases + tests), jobs=jobs):
        if isinstance(outcome, Failure):
            failures.append(f"liver_{outcome.item}: {outcome.reason}")
        else:
            progress(outcome)
    if failures:
        raise DataSetError(f"{raw}: {pluralise(len(failures), 'case')} could not be written: {failures[0]}")
    # Last, since its presence means that all files are there.
    write_text(raw / "dataset.json", dataset)
    return [_files(raw, number, labelled=cases)[0] for number in range(cases + tests)]


def _write_case(number: int, *, raw: Path, spec: PhantomSpec, seed: int, labelled: int) -> str:
    image, label, grid = render(draw_anatomy(spec, rng=np.random.default_rng((seed, number))))
    axes = "LPS" if number % 2 == 0 else "RAS"
    image_path, *label_path = _files(raw, number, labelled=labelled)
    for path in label_path:
        write_volume(path, label, grid, file_axes=axes, description=DESCRIPTION)
    write_volume(image_path, image, grid, file_axes=axes, description=DESCRIPTION)
    return f"liver_{number}"


def _files(raw: Path, number: int, *, labelled: int) -> tuple[Path, ...]:
    """The image of a case and, if it is a labelled one, its label."""
    name = f"liver_{number}.nii.gz"
    return (
        (raw / "imagesTr" / name, raw / "labelsTr" / name)
        if number < labelled
        else (raw / "imagesTs" / name,)
    )


def _refuse_other_data(raw: Path, dataset: str, *, cases: int, tests: int) -> None:
    """Only the same phantoms may be written again: a phantom must never replace a patient's scan."""
    path = raw / "dataset.json"
    if path.exists():
        if path.read_text(encoding="utf-8", errors="replace") == dataset:
            return
        raise DataSetError(
            f"{raw}: holds another data set, or phantoms with other settings: name another folder"
        )
    for number in range(cases + tests):  # a killed run leaves files without dataset.json
        for file in _files(raw, number, labelled=cases):
            require_replaceable(file, nifti_mark(DESCRIPTION), command="phantom")


def _dataset(cases: int, tests: int, *, spec: PhantomSpec, seed: int) -> dict[str, object]:
    shape = "×".join(map(str, spec.shape_xyz))
    domain_shift = "" if spec.domain_shift is None else f", domain shift in {spec.domain_shift}"
    names = [f"liver_{n}.nii.gz" for n in range(cases)]
    return {
        "name": "LIVER",
        "description": f"Liver and cancer segmentation: synthetic phantoms of {shape}, seed {seed}{domain_shift}, not patients",
        "reference": "liverseg",
        "licence": "CC0 1.0",
        "release": "1.0",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver", "2": "cancer"},
        "numTraining": cases,
        "numTest": tests,
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names],
        "test": [f"./imagesTs/liver_{n}.nii.gz" for n in range(cases, cases + tests)],
    }
