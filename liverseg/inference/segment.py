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
from data_cache.schema import PreprocessSpec
from liverseg.inference.model_file import load_trained
from liverseg.model.inputs import InputConfig, network_input
from liverseg.model.network import UNet
from liverseg.training.devices import choose_device, computes_in_bf16
from pipeline.prepare import ThinScan
from pipeline.resample import box_weights, linear_weights

MOST_PASSES = 4  # of the close look, each with a window widened where the liver touched its end
SOFT_EDGE_VOXELS = 2  # around the liver's component: what interpolation needs of the probabilities' slope
WIDER_LOOKS = (0.0, 0.04, 0.08)  # of the window, at each end: what --tta averages
NO_LIVER_ML = 10.0  # a component smaller than this is no liver


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Member:
    """One network, and how its input is made."""

    network: UNet
    input: InputConfig


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Predictor:
    """One or more networks ready to be applied; the probabilities of several are averaged.

    Attributes:
        fast: Segment in the coarse pass over the whole scan alone.
        tta: Average the close look with looks through two wider windows.
    """

    members: tuple[Member, ...]
    spec: PreprocessSpec
    device: torch.device
    autocast: bool
    fast: bool = False
    tta: bool = False

    @torch.inference_mode()
    def foreground(self, image_zyx: NDArray[np.int16]) -> NDArray[np.float32]:
        """Probabilities (2, Z, Y, X) of liver and tumour for a view's HU."""
        image = torch.from_numpy(image_zyx)[None, None].to(self.device)
        total = sum(self._probabilities(member, image) for member in self.members)
        assert isinstance(total, torch.Tensor)
        foreground: NDArray[np.float32] = (total / len(self.members)).cpu().numpy()
        return foreground

    def _probabilities(self, member: Member, image: torch.Tensor) -> torch.Tensor:
        x = network_input(image, member.input).contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            logits = member.network(x)
        return torch.softmax(logits.float(), dim=1)[0, 1:]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Finding:
    """What was found in a scan, on a view of it.

    Attributes:
        foreground_czyx: Probabilities of liver and tumour on the view of ``window``; zero outside of the
            liver's component.
        window: Native slices that were looked at closely; None where no liver was found.
    """

    foreground_czyx: NDArray[np.float32]
    window: DepthWindow | None


def load_predictor(*paths: Path, device: str = "auto", fast: bool = False, tta: bool = False) -> Predictor:
    """The best networks of one or more runs, or of files that ``liverseg export`` wrote.

    Raises:
        RunError: One of ``paths`` has no checkpoint that can be read, or was trained with another spec.
    """
    models = [load_trained(path) for path in paths]
    chosen = choose_device(device)
    for path, model in zip(paths, models, strict=True):
        if model.spec != models[0].spec:
            raise RunError(f"{path}: trained with another preprocessing spec than {paths[0]}: no ensemble")
    return Predictor(
        members=tuple(
            Member(network=model.network.eval().to(chosen), input=model.config.input) for model in models
        ),
        spec=models[0].spec,
        device=chosen,
        autocast=all(computes_in_bf16(model.config.precision, chosen) for model in models),
        fast=fast,
        tta=tta,
    )


def segment(scan: ThinScan, predictor: Predictor) -> Finding:
    """Segment a scan without any label: a coarse pass over all slices, then close ones over the liver's.

    A close pass whose liver touches the end of its window is repeated with a wider one.
    """
    spec, depth = predictor.spec, scan.header.grid.shape_zyx[0]
    nothing = np.zeros((2, *spec.shape_zyx), dtype=np.float32)
    coarse_czyx = _look(scan, scan.scan_window, predictor)
    window = liver_window(coarse_czyx, depth=depth, spec=spec)
    if window is None:
        return Finding(foreground_czyx=nothing, window=None)
    if predictor.fast:
        return Finding(foreground_czyx=coarse_czyx, window=scan.scan_window)
    for _ in range(MOST_PASSES):
        foreground_czyx = _look(scan, window, predictor)
        wider = widened(window, foreground_czyx, depth=depth)
        if wider == window:
            break
        window = wider
    else:
        foreground_czyx = _look(scan, window, predictor)
    if predictor.tta:
        foreground_czyx = _look_again(scan, window, predictor)
    found = bool((foreground_czyx.sum(axis=0) >= 0.5).any())
    return Finding(foreground_czyx=foreground_czyx, window=window if found else None)


def _look_again(scan: ThinScan, window: DepthWindow, predictor: Predictor) -> NDArray[np.float32]:
    """The mean of looks through ``window`` and through wider ones, on the view of ``window``.

    A wider window puts other slices together into a voxel, which the network takes for another scan.
    """
    depth = scan.header.grid.shape_zyx[0]
    total_czyx = np.zeros((2, *predictor.spec.shape_zyx), dtype=np.float32)
    for share in WIDER_LOOKS:
        step = round(share * len(window))
        wider = DepthWindow(start=max(0, window.start - step), stop=min(depth, window.stop + step))
        seen_czyx = predictor.foreground(scan.view(wider, predictor.spec).image_zyx)
        total_czyx += moved(seen_czyx, wider, window)
    view = scan.view(window, predictor.spec)
    mean_czyx = total_czyx / np.float32(len(WIDER_LOOKS))
    return keep_liver(mean_czyx, voxel_volume_ml=view.grid.voxel_volume_ml)


def moved(
    foreground_czyx: NDArray[np.float32], source: DepthWindow, target: DepthWindow
) -> NDArray[np.float32]:
    """A view's probabilities on the view of another window inside its own: interpolated, then averaged down."""
    n_z = foreground_czyx.shape[1]
    up = linear_weights(n_z, len(source))
    down = box_weights(len(source), n_z, target.start - source.start, target.stop - source.start)
    moved_czyx: NDArray[np.float32] = np.einsum(
        "Zz,czyx->cZyx", (down @ up).astype(np.float32), foreground_czyx, optimize=True
    )
    return moved_czyx


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
