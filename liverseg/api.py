"""liverseg from Python: load a model, segment a scan; torch is loaded when that is asked for, and not before."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from liverseg.inference.model import Model


def load(
    *paths: str | Path, device: str = "auto", fast: bool = False, tta: bool = False, samples: int = 0
) -> Model:
    """A model ready to be applied::

        model = liverseg.load("runs/liver")
        found = model.segment("scan.nii.gz")
        found.label_zyx, found.grid, found.liver_ml, found.tumour_ml
        found.save("segmentation.nii.gz")

    Args:
        paths: Folders of runs, or files of ``liverseg export``; the probabilities of several are averaged.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, …
        fast: Segment in the coarse pass alone.
        tta: Average looks through several windows.
        samples: Segmentations to draw, whose mean is the answer and whose differences are ``found.doubts``.

    Raises:
        RunError: A path holds no model, or the models were trained with different specs.
    """
    from liverseg.inference.model import Model
    from liverseg.inference.segment import load_predictor

    predictor = load_predictor(*map(Path, paths), device=device, fast=fast, tta=tta, samples=samples)
    return Model(predictor=predictor)
