"""A model and what it finds, as Python objects: the same steps as ``liverseg predict``, kept in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_cache.errors import VolumeError
from data_cache.geometry import DepthWindow, Grid
from liverseg.inference.inputs import find_scans, scan_notes
from liverseg.inference.segment import Predictor, segment
from liverseg.inference.uncertainty_files import UncertaintySummary, summarise_uncertainty
from pipeline.nifti import VolumeHeader, to_canonical, write_labels
from pipeline.prepare import read_scan
from pipeline.restore import native_labels


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Segmentation:
    """A segmented scan.

    Attributes:
        label_zyx: 0 background, 1 liver, 2 tumour, on ``grid``: all zero where no liver was found.
        grid: The scan's voxels, its axes flipped and permuted to RAS+.
        foreground_czyx: Probabilities of liver and tumour as the network gave them, on its own coarser grid.
        window: The slices of ``grid`` that ``foreground_czyx`` covers; None where no liver was found.
        liver_ml, tumour_ml: The liver's includes its tumours.
        notes: What was assumed or replaced while reading.
        header: Of the scan's file, for ``save``.
        samples_nczyx: Of each sample, all that the network said, on the grid of ``foreground_czyx``, or of the whole
            scan where no liver was found; None where none were drawn.
        doubts: What the samples disagree on: volumes with intervals, possible lesions, one number for the scan.
    """

    label_zyx: NDArray[np.uint8]
    grid: Grid
    foreground_czyx: NDArray[np.float32]
    window: DepthWindow | None
    notes: tuple[str, ...]
    header: VolumeHeader
    samples_nczyx: NDArray[np.float32] | None
    uncertainty: UncertaintySummary | None

    @property
    def liver_ml(self) -> float:
        """Volume of the liver with its tumours."""
        return int(np.count_nonzero(self.label_zyx)) * self.grid.voxel_volume_ml

    @property
    def tumour_ml(self) -> float:
        """Volume of the tumours."""
        return int(np.count_nonzero(self.label_zyx == 2)) * self.grid.voxel_volume_ml

    def save(self, path: str | Path) -> Path:
        """Write the label in the file's own orientation, as ``liverseg predict`` does; returns the path."""
        target = Path(path)
        write_labels(target, self.header, self._blocks())
        return target

    def _blocks(self) -> list[NDArray[np.uint8]]:
        window = self.window or DepthWindow(start=0, stop=self.grid.shape_zyx[0])
        return list(native_labels(self.foreground_czyx, window, self.header))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Model:
    """One or more trained networks."""

    predictor: Predictor

    def segment(self, image: str | Path) -> Segmentation:
        """Segment a NIfTI file, or a folder or zip of one DICOM series.

        Raises:
            VolumeError: It cannot be read, or is a folder of several scans.
        """
        scan, *others = find_scans([Path(image)])
        if others:
            raise VolumeError(f"{image}: holds {1 + len(others)} scans: name one of them")
        with scan.as_nifti() as path:
            thin = read_scan(path, self.predictor.spec)
        found = segment(thin, self.predictor)
        window = found.window or thin.scan_window
        blocks = native_labels(found.foreground_czyx, window, thin.header)
        samples = found.samples_nczyx
        label_kji = np.concatenate(list(blocks))
        return Segmentation(
            label_zyx=to_canonical(label_kji, thin.header.axes_kji),
            grid=thin.header.grid,
            foreground_czyx=found.foreground_czyx,
            window=found.window,
            notes=scan_notes(thin),
            header=thin.header,
            samples_nczyx=samples,
            uncertainty=None if samples is None else summarise_uncertainty(samples, window, thin.header),
        )
