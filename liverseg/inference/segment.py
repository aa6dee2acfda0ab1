"""A trained network applied to one scan: find the liver in the whole scan, then look closer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from data_cache.errors import ConfigError, RunError
from data_cache.geometry import DepthWindow, window_with_margin
from data_cache.schema import PreprocessSpec
from liverseg.device import choose_device, computes_in_bf16
from liverseg.inference.model_file import load_trained
from liverseg.measure.uncertainty import mean_foreground
from liverseg.model.inputs import InputConfig, network_input
from liverseg.model.network import UNet
from liverseg.model.stochastic import sample, shares
from pipeline.prepare import InPlaneScan
from pipeline.resample import box_weights, linear_weights

MAX_PASSES = 4  # of the close look, each with a window widened where the liver touched its end
SOFT_EDGE_VOXELS = 2  # around the liver's component: what interpolation needs of the probabilities' slope
WIDER_LOOKS = (0.0, 0.04, 0.08)  # of the window, at each end: what --tta averages
SAMPLING_SEED = 0
NO_LIVER_ML = 10.0  # a component smaller than this is no liver


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Member:
    """One network, how its input is made, and where it came from."""

    network: UNet
    input: InputConfig
    source: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Predictor:
    """One or more networks ready to be applied; the probabilities of several are averaged.

    Attributes:
        fast: Segment in the coarse pass over the whole scan alone.
        tta: Average the close look with looks through two wider windows.
        samples: How many segmentations to draw in the last look, whose mean is then the answer; 0 for none.
    """

    members: tuple[Member, ...]
    spec: PreprocessSpec
    device: torch.device
    autocast: bool
    fast: bool = False
    tta: bool = False
    samples: int = 0

    def __post_init__(self) -> None:
        if self.samples < 0 or (self.tta and (self.fast or self.samples)):
            raise ConfigError(
                "tta excludes fast and samples, and samples must not be negative, got "
                f"tta {self.tta}, fast {self.fast}, samples {self.samples}"
            )

    @property
    def sources(self) -> tuple[str, ...]:
        """Where the members came from."""
        return tuple(member.source for member in self.members)

    @property
    def n_drawn(self) -> int:
        """How many samples there will be: fewer than asked for where no member is stochastic; see ``shares``."""
        return sum(self._counts()) if self.samples else 0

    @torch.inference_mode()
    def foreground(self, image_zyx: NDArray[np.int16]) -> NDArray[np.float32]:
        """Probabilities (2, Z, Y, X) of liver and tumour for a view's HU."""
        image = torch.from_numpy(image_zyx)[None, None].to(self.device)
        total = sum(self._probabilities(member, image) for member in self.members)
        assert isinstance(total, torch.Tensor)
        foreground: NDArray[np.float32] = (total / len(self.members)).cpu().numpy()
        return foreground

    @torch.inference_mode()
    def draw(self, image_zyx: NDArray[np.int16]) -> NDArray[np.float32]:
        """The same of each of the ``samples``, dealt to the members: (n, 2, Z, Y, X); equal for equal images."""
        image = torch.from_numpy(image_zyx)[None, None].to(self.device)
        generator = torch.Generator(self.device).manual_seed(SAMPLING_SEED)
        counts = self._counts()
        drawn = np.empty((sum(counts), 2, *image_zyx.shape), dtype=np.float32)
        every = (self._samples(m, image, n, generator) for m, n in zip(self.members, counts, strict=True))
        for sample_czyx, foreground in zip(drawn, itertools.chain.from_iterable(every), strict=True):
            sample_czyx[:] = foreground.cpu().numpy()
        return drawn

    def _counts(self) -> tuple[int, ...]:
        return shares([member.network for member in self.members], self.samples)

    def _probabilities(self, member: Member, image: torch.Tensor) -> torch.Tensor:
        with self._autocast():
            logits = member.network(self._input(member, image))
        return _foreground(logits)

    def _samples(
        self, member: Member, image: torch.Tensor, n: int, generator: torch.Generator
    ) -> Iterator[torch.Tensor]:
        with self._autocast():
            for logits in sample(member.network, self._input(member, image), n, generator=generator):
                yield _foreground(logits)

    def _input(self, member: Member, image: torch.Tensor) -> torch.Tensor:
        return network_input(image, member.input).contiguous(memory_format=torch.channels_last_3d)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)


def _foreground(logits_bczyx: torch.Tensor) -> torch.Tensor:
    return torch.softmax(logits_bczyx.float(), dim=1)[0, 1:]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScanSegmentation:
    """What was found in a scan, on a view of it.

    Attributes:
        foreground_czyx: Probabilities of liver and tumour on the view of ``window``; zero outside of the
            liver's component.
        window: Native slices that were looked at closely; None where no liver was found.
        samples_nczyx: Of each sample, all of what the network said, on the view of ``window`` or else of the whole
            scan; None where none were drawn.
    """

    foreground_czyx: NDArray[np.float32]
    window: DepthWindow | None
    samples_nczyx: NDArray[np.float32] | None = None


def load_predictor(
    *paths: Path, device: str = "auto", fast: bool = False, tta: bool = False, samples: int = 0
) -> Predictor:
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
            Member(network=model.network.eval().to(chosen), input=model.config.input, source=str(path))
            for path, model in zip(paths, models, strict=True)
        ),
        spec=models[0].spec,
        device=chosen,
        autocast=all(computes_in_bf16(model.config.precision, chosen) for model in models),
        fast=fast,
        tta=tta,
        samples=samples,
    )


def segment(scan: InPlaneScan, predictor: Predictor) -> ScanSegmentation:
    """Segment a scan without any label: a coarse pass over all slices, then close ones over the liver's.

    A close pass whose liver touches the end of its window is repeated with a wider one.
    """
    spec, depth = predictor.spec, scan.header.grid.shape_zyx[0]
    foreground_czyx = _predict_window(scan, scan.scan_window, predictor)
    window = liver_window(foreground_czyx, depth=depth, spec=spec)
    if window is None:
        return _no_liver(scan, predictor)
    if predictor.fast:
        window = scan.scan_window
    else:
        window, foreground_czyx = _refine_window(scan, window, predictor)
    if predictor.tta:
        foreground_czyx = _predict_tta(scan, window, predictor)
    samples = _draw(scan, window, predictor)
    if samples is not None:
        foreground_czyx = _kept(mean_foreground(samples), scan, window, predictor)
    if not (foreground_czyx.sum(axis=0) >= 0.5).any():
        return _no_liver(scan, predictor)
    return ScanSegmentation(foreground_czyx=foreground_czyx, window=window, samples_nczyx=samples)


def _no_liver(scan: InPlaneScan, predictor: Predictor) -> ScanSegmentation:
    nothing = np.zeros((2, *predictor.spec.shape_zyx), dtype=np.float32)
    samples = _draw(scan, scan.scan_window, predictor)
    return ScanSegmentation(foreground_czyx=nothing, window=None, samples_nczyx=samples)


def _refine_window(
    scan: InPlaneScan, window: DepthWindow, predictor: Predictor
) -> tuple[DepthWindow, NDArray[np.float32]]:
    """What is in the window; where the liver touches an end of it, in a wider one."""
    depth = scan.header.grid.shape_zyx[0]
    for _ in range(MAX_PASSES):
        foreground_czyx = _predict_window(scan, window, predictor)
        wider = extend_window(window, foreground_czyx, depth=depth)
        if wider == window:
            return window, foreground_czyx
        window = wider
    return window, _predict_window(scan, window, predictor)


def _draw(scan: InPlaneScan, window: DepthWindow, predictor: Predictor) -> NDArray[np.float32] | None:
    if not predictor.samples:
        return None
    return predictor.draw(scan.view(window, predictor.spec).image_zyx)


def _predict_tta(scan: InPlaneScan, window: DepthWindow, predictor: Predictor) -> NDArray[np.float32]:
    """The mean of looks through ``window`` and through wider ones, on the view of ``window``.

    A wider window puts other slices together into a voxel, which the network takes for another scan.
    """
    depth = scan.header.grid.shape_zyx[0]
    total_czyx = np.zeros((2, *predictor.spec.shape_zyx), dtype=np.float32)
    for share in WIDER_LOOKS:
        step = round(share * len(window))
        wider = DepthWindow(start=max(0, window.start - step), stop=min(depth, window.stop + step))
        seen_czyx = predictor.foreground(scan.view(wider, predictor.spec).image_zyx)
        total_czyx += resample_to_window(seen_czyx, wider, window)
    return _kept(total_czyx / np.float32(len(WIDER_LOOKS)), scan, window, predictor)


def _kept(
    foreground_czyx: NDArray[np.float32], scan: InPlaneScan, window: DepthWindow, predictor: Predictor
) -> NDArray[np.float32]:
    grid = scan.view(window, predictor.spec).grid
    return keep_largest_component(foreground_czyx, voxel_volume_ml=grid.voxel_volume_ml)


def resample_to_window(
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


def _predict_window(scan: InPlaneScan, window: DepthWindow, predictor: Predictor) -> NDArray[np.float32]:
    view = scan.view(window, predictor.spec)
    return keep_largest_component(
        predictor.foreground(view.image_zyx), voxel_volume_ml=view.grid.voxel_volume_ml
    )


def keep_largest_component(
    foreground_czyx: NDArray[np.float32], *, voxel_volume_ml: float
) -> NDArray[np.float32]:
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


def extend_window(window: DepthWindow, foreground_czyx: NDArray[np.float32], *, depth: int) -> DepthWindow:
    """The window, longer by an eighth at each end that the liver touches and the scan goes on beyond."""
    liver_z = (foreground_czyx.sum(axis=0) >= 0.5).any(axis=(1, 2))
    step = max(1, len(window) // 8)
    return DepthWindow(
        start=max(0, window.start - step) if liver_z[0] else window.start,
        stop=min(depth, window.stop + step) if liver_z[-1] else window.stop,
    )
