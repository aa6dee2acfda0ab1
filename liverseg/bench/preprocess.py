"""``liverseg bench preprocess``: time and peak memory of one case, as ratios to inflating its files."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_cache.errors import LiversegError
from liverseg.bench.contenders import available
from pipeline.nifti import write_volume
from pipeline.phantom import PhantomSpec, draw_anatomy, render


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One contender: the fastest of its repeats, and the most memory that its process ever held.

    Attributes:
        seconds: By the clock.
        cpu_seconds: Of all its threads together, the least of the repeats: neighbours disturb it less.
    """

    name: str
    seconds: float
    cpu_seconds: float
    peak_mib: float


def write_case(folder: Path, shape_xyz: tuple[int, int, int]) -> tuple[Path, Path]:
    """A phantom's image and label, gzip level 6 as published data has it."""
    anatomy = draw_anatomy(PhantomSpec(shape_xyz=shape_xyz), rng=np.random.default_rng(0))
    image_zyx, label_zyx, grid = render(anatomy)
    image, label = folder / "image.nii.gz", folder / "label.nii.gz"
    write_volume(image, image_zyx, grid, file_axes="LPS")
    write_volume(label, label_zyx, grid, file_axes="LPS")
    return image, label


def measure(image: Path, label: Path, *, repeats: int) -> list[Measurement]:
    """Run every contender that is installed, each in a process of its own; the fastest repeat counts.

    The fastest, since on a shared machine everything else only measures the neighbours.

    Raises:
        LiversegError: A contender failed; its last line is in the message.
    """
    return [_measure(name, image, label, repeats) for name in available()]


def _measure(name: str, image: Path, label: Path, repeats: int) -> Measurement:
    command = [sys.executable, "-m", "liverseg.bench.contenders", name, str(image), str(label), str(repeats)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise LiversegError(f"bench {name}: failed ({reason})")
    values = json.loads(result.stdout.splitlines()[-1])
    return Measurement(
        name=name,
        seconds=min(values["seconds"]),
        cpu_seconds=min(values["cpu_seconds"]),
        peak_mib=values["peak_bytes"] / 2**20,
    )
