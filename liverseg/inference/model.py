"""A model and its segmentations as Python objects: the same steps as ``liverseg predict``, kept in memory."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_cache.errors import OutputError, VolumeError
from data_cache.geometry import Box, Grid
from data_cache.outputs import nifti_mark, require_replaceable
from liverseg.inference.inputs import NiftiScan, find_scans
from liverseg.inference.plausible import judge_segmentation, measure_segmentation
from liverseg.inference.segment import Predictor, segment
from liverseg.inference.uncertainty_files import UncertaintySummary, summarise_segmentation
from liverseg.measure.plausibility import Plausibility
from pipeline.names import volume_stem
from pipeline.nifti import (
    NiftiImage,
    VolumeHeader,
    from_canonical,
    label_image,
    temporary_nifti,
    to_canonical,
    write_labels,
)
from pipeline.nifti.write import LABEL_DESCRIPTION
from pipeline.prepare import read_scan
from pipeline.restore import native_labels
from pipeline.sanity import require_plausible


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Segmentation:
    """A segmented scan.

    Attributes:
        label_zyx: 0 background, 1 liver, 2 tumour, on ``grid``; all zero if no liver was found.
        grid: The scan's grid, with its axes flipped and permuted to RAS+.
        foreground_czyx: The network's probabilities of liver and tumour, on its own coarser grid.
        box: The part of ``grid`` that ``foreground_czyx`` covers; None if no liver was found.
        liver_ml, tumour_ml: Volumes; the liver's includes its tumours.
        notes: What was assumed or replaced while reading.
        header: Header of the scan's file, for ``save``.
        open_scan: Opens the scan as a NIfTI file, for pictures.
        samples_nczyx: All outputs of the network for each sample, on the grid of ``foreground_czyx``, or of the whole
            scan if no liver was found; None if no samples were drawn.
        uncertainty: What the samples disagree on: volume intervals, possible lesions, one number for the scan.
        plausibility: Whether it can be a liver, and why not.
    """

    label_zyx: NDArray[np.uint8]
    grid: Grid
    foreground_czyx: NDArray[np.float32]
    box: Box | None
    notes: tuple[str, ...]
    header: VolumeHeader
    open_scan: Callable[[], AbstractContextManager[NiftiScan]]
    samples_nczyx: NDArray[np.float32] | None
    uncertainty: UncertaintySummary | None
    plausibility: Plausibility

    @property
    def liver_ml(self) -> float:
        """Volume of the liver with its tumours."""
        return int(np.count_nonzero(self.label_zyx)) * self.grid.voxel_volume_ml

    @property
    def tumour_ml(self) -> float:
        """Volume of the tumours."""
        return int(np.count_nonzero(self.label_zyx == 2)) * self.grid.voxel_volume_ml

    def save(self, path: str | Path) -> Path:
        """Write the label in the file's own orientation, as ``liverseg predict`` does; returns the path.

        Args:
            path: Ends in .nii.gz or .nii; its folder is made if it is missing.

        Raises:
            OutputError: The file exists and is not a label written by liverseg, or its name has another ending.
        """
        target = Path(path)
        if volume_stem(target) is None:
            raise OutputError(f"{target}: expected a name that ends in .nii.gz or .nii")
        require_replaceable(target, nifti_mark(LABEL_DESCRIPTION), command="predict")
        target.parent.mkdir(parents=True, exist_ok=True)
        write_labels(target, self.header, self._blocks())
        return target

    @property
    def plausible(self) -> bool:
        """Whether it can be a liver; ``plausibility.reasons`` says why not."""
        return self.plausibility.plausible

    @property
    def label(self) -> NiftiImage:
        """The label as nibabel's image, on the scan's own axes and grid; ``label_zyx`` is canonical."""
        return label_image(from_canonical(self.label_zyx, self.header.axes_kji), self.header)

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.grid.shape_zyx[::-1]))
        found = f"liver {self.liver_ml:.0f} mL, tumour {self.tumour_ml:.1f} mL"
        sure = "" if self.uncertainty is None else f"; {self.uncertainty.line()}"
        doubt = "" if self.plausible else "NOT PLAUSIBLE: "
        return f"Segmentation({shape}, {doubt}{'no liver found' if self.box is None else found}{sure})"

    def _repr_html_(self) -> str:
        """Three slices of the scan with the label's contours, where the scan can still be read."""
        from data_cache.errors import LiversegError
        from liverseg.pictures.data_uri import figure_uri
        from liverseg.pictures.figures import three_plane_figure

        text = f"<p>{html.escape(repr(self))}</p>"
        try:
            with self.open_scan() as nifti:
                figure = three_plane_figure(nifti.path, self.label_zyx, self.grid.spacing_zyx_mm)
        except LiversegError as failure:
            return f"{text}<p>{html.escape(str(failure))}</p>"
        return f'{text}<img alt="three slices with contours" src="{figure_uri(figure)}">'

    def _blocks(self) -> list[NDArray[np.uint8]]:
        box = self.box or Box.whole(self.grid.shape_zyx)
        return list(native_labels(self.foreground_czyx, box, self.header))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Model:
    """One or more trained networks."""

    predictor: Predictor

    def __repr__(self) -> str:
        members = ", ".join(
            m.source if m.training is None else f"{m.source} trained on {m.training.line()}"
            for m in self.predictor.members
        )
        return f"Model({members}, on {self.predictor.device})"

    def segment(
        self,
        image: str | os.PathLike[str] | NiftiImage | NDArray[Any],
        *,
        affine: NDArray[Any] | None = None,
        force: bool = False,
    ) -> Segmentation:
        """Segment a scan.

        Args:
            image: A NIfTI file, a folder or zip of one DICOM series, a nibabel image, or an array (x, y, z) in HU.
            affine: Of an array: 4×4, from its voxels to RAS+ mm, as nibabel has it.
            force: Segment what is not a CT in HU, or has an impossible grid, too.

        Raises:
            VolumeError: It cannot be read, is a folder of several scans, or an array without affine.
            ImplausibleScanError: It is not a CT in HU on a believable grid, and ``force`` is not set.
        """
        open_scan = _opener(image, affine, force=force)
        with open_scan() as nifti:
            held = read_scan(nifti.path, self.predictor.spec)
        require_plausible(
            image if isinstance(image, str | os.PathLike) else "image", held.doubts, force=force
        )
        found = segment(held, self.predictor)
        box = found.box or held.scan_box
        samples = found.samples_nczyx
        label_kji = np.empty(held.header.shape_kji, dtype=np.uint8)
        first = 0
        for block_kji in native_labels(found.foreground_czyx, box, held.header):
            label_kji[first : first + len(block_kji)] = block_kji
            first += len(block_kji)
        voxel_ml = held.header.grid.voxel_volume_ml
        return Segmentation(
            label_zyx=to_canonical(label_kji, held.header.axes_kji),
            grid=held.header.grid,
            foreground_czyx=found.foreground_czyx,
            box=found.box,
            notes=(*nifti.notes, *held.notes, *map(str, held.doubts)),
            header=held.header,
            open_scan=open_scan,
            samples_nczyx=samples,
            plausibility=judge_segmentation(
                measure_segmentation(found, held),
                self.predictor.training,
                liver_ml=int(np.count_nonzero(label_kji)) * voxel_ml,
                tumour_ml=int(np.count_nonzero(label_kji == 2)) * voxel_ml,
            ),
            uncertainty=None
            if samples is None
            else summarise_segmentation(found, held, self.predictor.training),
        )


def _opener(
    image: object, affine: NDArray[Any] | None, *, force: bool
) -> Callable[[], AbstractContextManager[NiftiScan]]:
    if not isinstance(image, str | os.PathLike):
        return partial(_written, image, affine)
    if affine is not None:
        raise VolumeError(f"{image}: a file has an affine of its own: give affine with an array only")
    if not os.fspath(image):  # which Path would take for the working directory
        raise VolumeError(
            "the image is an empty path: name a NIfTI file, or a folder or zip of one DICOM series"
        )
    scan, *others = find_scans([Path(image)])
    if others:
        raise VolumeError(f"{image}: holds {1 + len(others)} scans: name one of them")
    # Absolute: a segmentation opens its scan again for pictures, wherever the process has gone by then.
    return partial(replace(scan, path=scan.path.absolute()).as_nifti, force=force)


@contextmanager
def _written(image: object, affine: NDArray[Any] | None) -> Iterator[NiftiScan]:
    with temporary_nifti(image, affine) as path:
        yield NiftiScan(path=path)
