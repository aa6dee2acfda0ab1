"""One image file in, one label file out, on the image's own grid."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_cache.errors import VolumeError
from liverseg.inference.segment import Predictor, segment
from pipeline.decathlon import volume_stem
from pipeline.nifti import write_labels
from pipeline.prepare import read_scan
from pipeline.restore import native_labels


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What was written for one image.

    Attributes:
        found: False where no liver was found; the label is then empty.
        liver_ml, tumour_ml: Native volumes; the liver's includes its tumours.
        read_s, network_s, write_s: Where the time went.
        notes: What was assumed or replaced while reading.
    """

    image: Path
    label: Path
    found: bool
    liver_ml: float
    tumour_ml: float
    read_s: float
    network_s: float
    write_s: float
    notes: tuple[str, ...]

    def line(self) -> str:
        """What was found, where it was written and how long each part took."""
        volumes = (
            f"liver {self.liver_ml:.0f} mL, tumour {self.tumour_ml:.1f} mL"
            if self.found
            else "no liver found"
        )
        times = f"read {self.read_s:.2f} s, network {self.network_s:.2f} s, write {self.write_s:.2f} s"
        return f"{self.label}: {volumes} ({times})"


def predict_file(image: Path, out: Path, predictor: Predictor) -> Prediction:
    """Segment ``image`` and write ``out/<its name>.nii.gz``.

    Raises:
        VolumeError: The image cannot be read, or its label would overwrite it.
    """
    label = out / f"{volume_stem(image) or image.name}.nii.gz"
    if label.resolve() == image.resolve():
        raise VolumeError(f"{image}: its label would overwrite it: name another --out")
    times = [time.perf_counter()]
    scan = read_scan(image, predictor.spec)
    times.append(time.perf_counter())
    found = segment(scan, predictor)
    times.append(time.perf_counter())
    counts = np.zeros(3, dtype=np.int64)

    window = found.window or scan.scan_window
    blocks = native_labels(found.foreground_czyx, window, scan.header)
    out.mkdir(parents=True, exist_ok=True)
    write_labels(label, scan.header, _counted(blocks, counts))
    times.append(time.perf_counter())
    voxel_ml = scan.header.grid.voxel_volume_ml
    read_s, network_s, write_s = np.diff(times).tolist()
    return Prediction(
        image=image,
        label=label,
        found=found.window is not None,
        liver_ml=float(counts[1] + counts[2]) * voxel_ml,
        tumour_ml=float(counts[2]) * voxel_ml,
        read_s=read_s,
        network_s=network_s,
        write_s=write_s,
        notes=scan.notes,
    )


def _counted(blocks: Iterable[NDArray[np.uint8]], counts: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
    """The same blocks; the voxels of each label are added to ``counts`` as they pass."""
    for block in blocks:
        counts += np.bincount(block.ravel(), minlength=3)
        yield block
