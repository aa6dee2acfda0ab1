"""What is timed: each does one case's preprocessing, from two .nii.gz files to 64×128×128, in its own usual way.

Run as ``python -m liverseg.bench.contenders NAME IMAGE LABEL REPEATS`` it prints the seconds of each repeat, by the
clock and of the CPU, and the process's peak memory as JSON: a process of its own, so that one's memory is not another's.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_cache.geometry import Box, Grid
from data_cache.schema import PreprocessSpec

Contender = Callable[[Path, Path, Path], None]  # image, label, an empty folder to write into
SHAPE_XYZ = (128, 128, 64)


def inflate(image: Path, label: Path, _out: Path) -> None:
    """Only decompress both files: the physical limit, since nothing can be read without it."""
    from isal import igzip

    buffer = memoryview(bytearray(4 << 20))
    for path in (image, label):
        with igzip.open(path, "rb") as stream:
            while stream.readinto(buffer):
                pass


def liverseg(image: Path, label: Path, out: Path) -> None:
    """The whole of ``preprocess`` with one worker, which inflates in a second thread where there is a core for it."""
    from pipeline.build import physical_cores

    _preprocess(image, label, out, prefetch=physical_cores() > 1)


def one_thread(image: Path, label: Path, out: Path) -> None:
    """The same without that thread, as each worker has it where they fill the cores."""
    _preprocess(image, label, out, prefetch=False)


def _preprocess(image: Path, label: Path, out: Path, *, prefetch: bool) -> None:
    """Read, check, both views, compress, write, sync to disk."""
    from threadpoolctl import threadpool_limits

    from data_cache.writer import open_or_create
    from pipeline.build import build_case
    from pipeline.decathlon import CaseFiles

    store, spec = out / "cache.zarr", PreprocessSpec()
    open_or_create(store, spec)
    files = CaseFiles(case_id="case", image=image, label=label)
    with threadpool_limits(1):  # as its workers have it
        build_case(files, store=store, spec=spec, root=image.parent, prefetch=prefetch)


def torchio(image: Path, label: Path, _out: Path) -> None:
    """Load, canonical orientation, crop to the label's box, linear/nearest resize; nothing is written."""
    import torchio as tio

    subject = tio.Subject(image=tio.ScalarImage(image), label=tio.LabelMap(label))
    subject = tio.ToCanonical()(subject)
    start, stop = _box_xyz(np.asarray(subject.label.data[0]), subject.label.affine)
    ends = [n - end for n, end in zip(subject.label.shape[1:], stop, strict=True)]
    cropped = tio.Crop([v for pair in zip(start, ends, strict=True) for v in pair])(subject)
    for view in (cropped, subject):
        tio.Resize(SHAPE_XYZ)(view)


def monai(image: Path, label: Path, _out: Path) -> None:
    """Load, orientation RAS, crop to the label's box, area/nearest resize; nothing is written."""
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd, Resized, SpatialCropd

    keys = ("image", "label")
    load = Compose(
        [LoadImaged(keys), EnsureChannelFirstd(keys), Orientationd(keys, axcodes="RAS", labels=None)]
    )
    data: Any = load({"image": image, "label": label})
    start, stop = _box_xyz(np.asarray(data["label"][0]), np.asarray(data["label"].affine))
    crop = SpatialCropd(keys, roi_start=start, roi_end=stop)
    resize = Resized(keys, SHAPE_XYZ, mode=("area", "nearest"))
    for view in (crop(data), data):
        resize(view)


def _box_xyz(label_xyz: NDArray[Any], affine: NDArray[Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Start and stop of the box that liverseg crops to."""
    filled = [np.flatnonzero(label_xyz.any(axis=others)) for others in ((0, 1), (0, 2), (1, 2))]
    labelled = Box.from_slices([slice(at[0], at[-1] + 1) for at in filled])
    box = PreprocessSpec().close_box(labelled, Grid.from_array(label_xyz.shape[::-1], affine))
    return box.start_zyx[::-1], box.stop_zyx[::-1]


CONTENDERS: dict[str, Contender] = {
    "inflate": inflate,
    "liverseg": liverseg,
    "liverseg, one thread": one_thread,
    "torchio": torchio,
    "monai": monai,
}
PEERS = ("torchio", "monai")


def available() -> tuple[str, ...]:
    """Names of the contenders whose package is installed."""
    return tuple(n for n in CONTENDERS if n not in PEERS or importlib.util.find_spec(n) is not None)


def peak_bytes() -> int:
    """The most memory that this process has held.

    Linux hands ``ru_maxrss`` from a parent on to the program that its child executes, however large the parent was;
    VmHWM is of this program's own memory.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    # macOS counts in bytes, the BSDs in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _main() -> None:
    name, image, label, repeats = sys.argv[1:]
    seconds, cpu_seconds = [], []
    for _ in range(int(repeats)):
        with (
            tempfile.TemporaryDirectory() as out
        ):  # deleting it takes as long as a short scan, and is nobody's work
            start, cpu_start = time.perf_counter(), time.process_time()
            CONTENDERS[name](Path(image), Path(label), Path(out))
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    _main()
