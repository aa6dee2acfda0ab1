"""Grey volumes as one picture, and pictures as text that a page holds."""

from __future__ import annotations

import base64
import io

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

# Noise takes three times the bytes of a smooth scan: the quality falls until it fits.
QUALITIES = (88, 80, 70, 60, 45, 30, 15)


def tiled(volume_zyx: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """All slices in one picture, row by row, black where the last row is short."""
    n_z, n_y, n_x = volume_zyx.shape
    rows = -(-n_z // columns)
    padded = np.zeros((rows * columns, n_y, n_x), dtype=np.uint8)
    padded[:n_z] = volume_zyx
    return padded.reshape(rows, columns, n_y, n_x).swapaxes(1, 2).reshape(rows * n_y, columns * n_x)


def jpeg_uri(grey_yx: NDArray[np.uint8], *, max_bytes: int) -> str:
    """A JPEG of the best quality whose text fits in ``max_bytes``, or else of the worst."""
    for quality in QUALITIES:
        file = io.BytesIO()
        Image.fromarray(grey_yx).save(file, "JPEG", quality=quality, optimize=True)
        uri = _data_uri("image/jpeg", file)
        if len(uri) <= max_bytes:
            break
    return uri


def png_uri(bytes_yx: NDArray[np.uint8]) -> str:
    """A PNG, which keeps each byte."""
    file = io.BytesIO()
    Image.fromarray(bytes_yx).save(
        file, "PNG", compress_level=6
    )  # optimised, it takes 7 s for four million voxels
    return _data_uri("image/png", file)


def figure_uri(figure: Figure) -> str:
    """A matplotlib figure as PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return _data_uri("image/png", file)


def _data_uri(kind: str, file: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
