"""One scan in, one label file out, on the scan's own grid; volumes and a picture beside it where asked for."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from data_cache.errors import VolumeError
from data_cache.files import write_text
from liverseg.inference.inputs import ScanInput
from liverseg.inference.segment import Finding, Predictor, segment
from pipeline.nifti import write_labels
from pipeline.prepare import ThinScan, read_scan
from pipeline.restore import native_labels


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What was written for one image.

    Attributes:
        found: False where no liver was found; the label is then empty.
        liver_ml, tumour_ml: Native volumes; the liver's includes its tumours.
        liver_slices: First and past-the-last native slice that was looked at closely, from the feet up.
        read_s, network_s, write_s: Where the time went.
        notes: What was assumed or replaced while reading.
    """

    image: Path
    label: Path
    found: bool
    liver_ml: float
    tumour_ml: float
    liver_slices: tuple[int, int] | None
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


def predict_scan(
    scan: ScanInput, out: Path, predictor: Predictor, *, preview: bool = False, statistics: bool = False
) -> Prediction:
    """Segment a scan and write ``out/<its name>.nii.gz``; with the options, a ``.png`` and a ``.json`` beside it.

    Raises:
        VolumeError: The scan cannot be read, or its label would overwrite it.
    """
    label = out / f"{scan.name}.nii.gz"
    if label.resolve() == scan.path.resolve():
        raise VolumeError(f"{scan.path}: its label would overwrite it: name another --out")
    times = [time.perf_counter()]
    with scan.as_nifti() as image, _one_thread():
        thin = read_scan(image, predictor.spec)
    times.append(time.perf_counter())
    found = segment(thin, predictor)
    times.append(time.perf_counter())
    counts = np.zeros(3, dtype=np.int64)
    out.mkdir(parents=True, exist_ok=True)
    blocks = native_labels(found.foreground_czyx, found.window or thin.scan_window, thin.header)
    with _one_thread():
        write_labels(label, thin.header, _counted(blocks, counts))
    times.append(time.perf_counter())
    voxel_ml = thin.header.grid.voxel_volume_ml
    read_s, network_s, write_s = np.diff(times).tolist()
    prediction = Prediction(
        image=scan.path,
        label=label,
        found=found.window is not None,
        liver_ml=float(counts[1] + counts[2]) * voxel_ml,
        tumour_ml=float(counts[2]) * voxel_ml,
        liver_slices=None if found.window is None else (found.window.start, found.window.stop),
        read_s=read_s,
        network_s=network_s,
        write_s=write_s,
        notes=thin.notes,
    )
    if statistics:
        _write_statistics(out / f"{scan.name}.json", prediction)
    if preview:
        _draw_preview(out / f"{scan.name}.png", thin, found, predictor, prediction)
    return prediction


def _one_thread() -> threadpool_limits:
    # A thousand small products: with two threads that wait for each other, writing 512×512×1000 took 1.7 to 8.5 s
    # on a busy machine, and with one 0.3 to 0.5 s.
    return threadpool_limits(limits=1, user_api="blas")


def _write_statistics(path: Path, prediction: Prediction) -> None:
    content = asdict(prediction) | {"image": str(prediction.image), "label": str(prediction.label)}
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _draw_preview(
    path: Path, thin: ThinScan, found: Finding, predictor: Predictor, prediction: Prediction
) -> None:
    from liverseg.inference.figures import overlay_figure, save

    # What the network saw, and no second pass over a file that may have 500 MB.
    view = thin.view(found.window or thin.scan_window, predictor.spec)
    liver_zyx, tumour_zyx = found.foreground_czyx
    label_zyx = (liver_zyx + tumour_zyx >= 0.5).astype(np.uint8)
    label_zyx[(label_zyx == 1) & (tumour_zyx > liver_zyx)] = 2
    name, _, words = prediction.line().partition(": ")
    title = f"{Path(name).name}\n{words.partition(' (')[0]}"
    save(overlay_figure(view.image_zyx, None, label_zyx, view.grid.spacing_zyx_mm, title=title), path)


def _counted(blocks: Iterable[NDArray[np.uint8]], counts: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
    """The same blocks; the voxels of each label are added to ``counts`` as they pass."""
    for block in blocks:
        labelled = int(np.count_nonzero(block))
        tumour = int(np.count_nonzero(block == 2)) if labelled else 0
        counts += np.array([block.size - labelled, labelled - tumour, tumour])  # bincount is ten times slower
        yield block
