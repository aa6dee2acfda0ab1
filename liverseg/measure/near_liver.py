"""Where calibration and errors are counted: the liver and a little around it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

NEAR_MM = 10.0


def near_liver(liver_zyx: NDArray[np.bool_], spacing_zyx_mm: Sequence[float]) -> NDArray[np.bool_]:
    """The voxels of a mask and those within ``NEAR_MM`` of it, between centres; empty for an empty mask."""
    near_zyx = np.zeros_like(liver_zyx)
    found = ndimage.find_objects(liver_zyx.astype(np.uint8))
    if not found:
        return near_zyx
    reach = [int(np.ceil(NEAR_MM / mm)) for mm in spacing_zyx_mm]
    box = tuple(slice(max(0, part.start - n), part.stop + n) for part, n in zip(found[0], reach, strict=True))
    distance_mm = ndimage.distance_transform_edt(~liver_zyx[box], sampling=spacing_zyx_mm)
    near_zyx[box] = distance_mm <= NEAR_MM
    return near_zyx
