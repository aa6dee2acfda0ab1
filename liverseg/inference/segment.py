"""A trained network applied to one scan: find the liver in the whole scan, then look closer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from data_cache.errors import RunError
from data_cache.geometry import DepthWindow, window_with_margin
from data_cache.records import parse
from data_cache.schema import PreprocessSpec
from liverseg.model.inputs import InputConfig, network_input
from liverseg.model.network import UNet
from liverseg.training.checkpoint import BEST, load_checkpoint
from liverseg.training.config import config_from_json
from liverseg.training.train import choose_device, computes_in_bf16
from pipeline.prepare import ThinScan

MOST_PASSES = 4  # of the close look, each with a window widened where the liver touched its end
SOFT_EDGE_VOXELS = 2  # around the liver's component: what interpolation needs of the probabilities' slope
NO_LIVER_ML = 10.0  # a component smaller than this is no liver


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Predictor:
    """A network ready to be applied, and how its input is made."""

    network: UNet
    input: InputConfig
    spec: PreprocessSpec
    device: torch.device
    autocast: bool

    @torch.inference_mode()
    def foreground(self, image_zyx: NDArray[np.int16]) -> NDArray[np.float32]:
        """Probabilities (2, Z, Y, X) of liver and tumour for a view's HU."""
        image = torch.from_numpy(image_zyx)[None, None].to(self.device)
        x = network_input(image, self.input).contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            logits = self.network(x)
        foreground: NDArray[np.float32] = torch.softmax(logits.float(), dim=1)[0, 1:].cpu().numpy()
        return foreground


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Segmentation:
    """What was found in a scan.

    Attributes:
        foreground_czyx: Probabilities of liver and tumour on the view of ``window``; zero outside of the
            liver's component.
        window: Native slices that were looked at closely; None where no liver was found.
    """

    foreground_czyx: NDArray[np.float32]
    window: DepthWindow | None


def load_predictor(run: Path, *, device: str = "auto") -> Predictor:
    """The best network of a run.

    Raises:
        RunError: ``run`` has no checkpoint that can be read.
    """
    path = run / BEST
    if not run.is_dir():
        raise RunError(f"{run}: no such folder: name the folder of a training run")
    content = load_checkpoint(path)
    config = config_from_json(content["config"], source=str(path))
    network = UNet(config.model)
    network.load_state_dict(content["average"])
    chosen = choose_device(device)
    return Predictor(
        network=network.eval().to(chosen),
        input=config.input,
        spec=parse(PreprocessSpec, content["spec"], source=str(path), error=RunError),
        device=chosen,
        autocast=computes_in_bf16(config.precision, chosen),
    )


def segment(scan: ThinScan, predictor: Predictor) -> Segmentation:
    """Segment a scan without any label: a coarse pass over all slices, then close ones over the liver's.

    A close pass whose liver touches the end of its window is repeated with a wider one.
    """
    spec, depth = predictor.spec, scan.header.grid.shape_zyx[0]
    nothing = np.zeros((2, *spec.shape_zyx), dtype=np.float32)
    coarse_czyx = _look(scan, scan.scan_window, predictor)
    window = liver_window(coarse_czyx, depth=depth, spec=spec)
    if window is None:
        return Segmentation(foreground_czyx=nothing, window=None)
    for _ in range(MOST_PASSES):
        foreground_czyx = _look(scan, window, predictor)
        wider = widened(window, foreground_czyx, depth=depth)
        if wider == window:
            break
        window = wider
    else:
        foreground_czyx = _look(scan, window, predictor)
    found = bool((foreground_czyx.sum(axis=0) >= 0.5).any())
    return Segmentation(foreground_czyx=foreground_czyx, window=window if found else None)


def _look(scan: ThinScan, window: DepthWindow, predictor: Predictor) -> NDArray[np.float32]:
    view = scan.view(window, predictor.spec)
    return keep_liver(predictor.foreground(view.image_zyx), voxel_volume_ml=view.grid.voxel_volume_ml)


def keep_liver(foreground_czyx: NDArray[np.float32], *, voxel_volume_ml: float) -> NDArray[np.float32]:
    """Probabilities inside the largest component of liver and tumour together; zero elsewhere.

    All zero where that component has less than ``NO_LIVER_ML``.
    """
    components, count = ndimage.label(foreground_czyx.sum(axis=0) >= 0.5)
    sizes = np.bincount(components.ravel(), minlength=count + 1)[1:]
    if not sizes.size or sizes.max() * voxel_volume_ml < NO_LIVER_ML:
        return np.zeros_like(foreground_czyx)
    liver = components == 1 + int(sizes.argmax())
    # The soft edge stays, since it is interpolated; other components stay away even where they are near.
    near = ndimage.binary_dilation(liver, iterations=SOFT_EDGE_VOXELS) & ((components == 0) | liver)
    return np.where(near, foreground_czyx, np.float32(0))


def liver_window(
    foreground_czyx: NDArray[np.float32], *, depth: int, spec: PreprocessSpec
) -> DepthWindow | None:
    """The native slices of the liver in a view of the whole scan, with the margin that training had."""
    slices = np.flatnonzero((foreground_czyx.sum(axis=0) >= 0.5).any(axis=(1, 2)))
    if not slices.size:
        return None
    scale = depth / spec.shape_zyx[0]
    first, last = int(slices[0] * scale), min(depth, int(np.ceil((slices[-1] + 1) * scale))) - 1
    return window_with_margin(first, last, depth=depth, margin_fraction=spec.margin_fraction)


def widened(window: DepthWindow, foreground_czyx: NDArray[np.float32], *, depth: int) -> DepthWindow:
    """The window, longer by an eighth at each end that the liver touches and the scan goes on beyond."""
    liver_z = (foreground_czyx.sum(axis=0) >= 0.5).any(axis=(1, 2))
    step = max(1, len(window) // 8)
    return DepthWindow(
        start=max(0, window.start - step) if liver_z[0] else window.start,
        stop=min(depth, window.stop + step) if liver_z[-1] else window.stop,
    )
