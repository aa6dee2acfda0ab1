"""A trained network applied to one scan: find the liver in the whole scan, then look closer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from data_cache.errors import ConfigError, RunError
from data_cache.geometry import Box, resampled_grid
from data_cache.schema import PreprocessSpec
from liverseg.device import autocast, autocast_dtype, choose_device
from liverseg.inference.model_file import load_trained
from liverseg.measure.uncertainty import mean_foreground
from liverseg.model.inputs import InputConfig, network_input
from liverseg.model.network import UNet, to_channels_last
from liverseg.model.stochastic import sample, shares
from liverseg.training.checkpoint import content_checksum
from liverseg.training.training_data import TrainingData
from pipeline.labels import decide, is_foreground
from pipeline.lesions import CUBE
from pipeline.prepare import HeldScan
from pipeline.resample import box_weights, linear_weights

MAX_PASSES = 4  # of the close look after the first, each in a better box
SOFT_EDGE_VOXELS = 2  # around the liver's components: what interpolation needs of the probabilities' slope
TTA_MARGINS = (0.0, 0.04, 0.08)  # of the box's size, at each face: what --tta averages
TIGHTEN_BELOW = 0.6  # a box is cut again where the liver's own has less than this share of its volume
MIN_COMPONENT_SHARE = 0.15  # of the largest component: the left lateral section has about a sixth of a liver
SAMPLING_SEED = 0
NO_LIVER_ML = 10.0  # a component smaller than this is not a liver
# Five networks, 90 phantom and real lesions: 63 invented lesions become 19, and 53 found ones 46, the smallest.
SURE_TUMOUR = 0.7


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Member:
    """One network, how its input is made, where it came from, and what it learned from where that is recorded."""

    network: UNet
    input: InputConfig
    source: str
    training: TrainingData | None = None


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
    dtype: torch.dtype | None
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
    def training(self) -> tuple[TrainingData | None, ...]:
        """What the members learned from."""
        return tuple(member.training for member in self.members)

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
        return autocast(self.device, self.dtype)


def _foreground(logits_bczyx: torch.Tensor) -> torch.Tensor:
    return torch.softmax(logits_bczyx.float(), dim=1)[0, 1:]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScanSegmentation:
    """What was found in a scan, on a view of it.

    Attributes:
        foreground_czyx: Probabilities of liver and tumour on the view of ``box``; zero outside of the liver's
            components, and no tumour where there is only a doubtful one.
        box: Native voxels that were looked at closely; None where no liver was found.
        coarse_czyx: All that the coarse pass said of the whole scan, on its view.
        n_doubtful: Tumours that were left out: see ``leave_out_doubtful_tumours``.
        samples_nczyx: All of what the network said in each sample, on the view of ``box`` or else of the whole
            scan; None where none were drawn.
    """

    foreground_czyx: NDArray[np.float32]
    box: Box | None
    coarse_czyx: NDArray[np.float32]
    n_doubtful: int = 0
    samples_nczyx: NDArray[np.float32] | None = None

    @property
    def largest_share(self) -> float:
        """Share of the coarse pass's liver that its largest component has; 0 where it found none."""
        components, _ = ndimage.label(is_foreground(self.coarse_czyx.sum(axis=0)))
        sizes = np.bincount(components.ravel())[1:]
        return float(sizes.max() / sizes.sum()) if sizes.size else 0.0


def load_predictor(
    *paths: Path, device: str = "auto", fast: bool = False, tta: bool = False, samples: int = 0
) -> Predictor:
    """The best networks of one or more runs, or of files that ``liverseg export`` wrote.

    Raises:
        RunError: One of ``paths`` has no checkpoint that can be read, or was trained with another spec.
        ConfigError: Samples are asked for of a single network that always gives the same answer.
    """
    models = [load_trained(path) for path in paths]
    chosen = choose_device(device)
    for path, model in zip(paths, models, strict=True):
        if model.spec != models[0].spec:
            raise RunError(f"{path}: trained with another preprocessing spec than {paths[0]}: no ensemble")
    _check_different(paths, [model.network for model in models])
    if samples and len(models) == 1 and models[0].config.model.stochastic == "none":
        raise ConfigError(
            f"{paths[0]}: cannot be sampled, since it gives the same answer each time: leave out --samples, train with "
            "model.stochastic=ssn or dropout, or add other runs with --with"
        )
    dtypes = {autocast_dtype(model.config.precision, chosen) for model in models}
    return Predictor(
        members=tuple(
            Member(
                network=to_channels_last(model.network.eval().to(chosen)),
                input=model.config.input,
                source=str(path),
                training=model.training,
            )
            for path, model in zip(paths, models, strict=True)
        ),
        spec=models[0].spec,
        device=chosen,
        dtype=dtypes.pop() if len(dtypes) == 1 else None,
        fast=fast,
        tta=tta,
        samples=samples,
    )


def _check_different(paths: Sequence[Path], networks: Sequence[UNet]) -> None:
    """An ensemble of one network with itself agrees with itself, and would be sure of everything."""
    first: dict[str, Path] = {}
    for path, network in zip(paths, networks, strict=True) if len(paths) > 1 else ():
        same = first.setdefault(content_checksum(network.state_dict()), path)
        if same is not path:
            raise RunError(f"{path}: the same network as {same}: name different ones for an ensemble")


def segment(scan: HeldScan, predictor: Predictor) -> ScanSegmentation:
    """Segment a scan without any label: a coarse pass over the whole scan, then close ones over the liver's box."""
    coarse_czyx = predictor.foreground(scan.view(scan.scan_box).image_zyx)
    foreground_czyx = _kept(coarse_czyx, scan, scan.scan_box)
    labelled = labelled_box(foreground_czyx, scan.scan_box)
    if labelled is None:
        return _no_liver(scan, coarse_czyx, predictor)
    box = scan.scan_box
    if not predictor.fast:
        start = predictor.spec.close_box(labelled, scan.header.grid)
        box, foreground_czyx = _refine_box(scan, start, predictor)
    if predictor.tta:
        foreground_czyx = _predict_tta(scan, box, predictor)
    samples = _draw(scan, box, predictor)
    if samples is not None:
        foreground_czyx = _kept(mean_foreground(samples), scan, box)
    if labelled_box(foreground_czyx, box) is None:
        return _no_liver(scan, coarse_czyx, predictor)
    foreground_czyx, n_doubtful = leave_out_doubtful_tumours(foreground_czyx)
    return ScanSegmentation(
        foreground_czyx=foreground_czyx,
        box=box,
        coarse_czyx=coarse_czyx,
        n_doubtful=n_doubtful,
        samples_nczyx=samples,
    )


def _no_liver(scan: HeldScan, coarse_czyx: NDArray[np.float32], predictor: Predictor) -> ScanSegmentation:
    nothing = np.zeros((2, *predictor.spec.shape_zyx), dtype=np.float32)
    samples = _draw(scan, scan.scan_box, predictor)
    return ScanSegmentation(foreground_czyx=nothing, box=None, coarse_czyx=coarse_czyx, samples_nczyx=samples)


def _refine_box(scan: HeldScan, box: Box, predictor: Predictor) -> tuple[Box, NDArray[np.float32]]:
    """What is in the box, or in a better one: wider where the liver touches a face, tighter where most of it is not liver."""
    foreground_czyx = _predict_box(scan, box, predictor)
    for _ in range(MAX_PASSES):
        better = _better_box(box, foreground_czyx, scan, predictor)
        if better == box:
            break
        box, foreground_czyx = better, _predict_box(scan, better, predictor)
    return box, foreground_czyx


def _better_box(box: Box, foreground_czyx: NDArray[np.float32], scan: HeldScan, predictor: Predictor) -> Box:
    wider = extend_box(box, foreground_czyx, scan.scan_box)
    labelled = labelled_box(foreground_czyx, box)
    if wider != box or labelled is None:
        return wider
    tighter = predictor.spec.close_box(labelled, scan.header.grid)
    is_much_smaller = math.prod(tighter.shape_zyx) < TIGHTEN_BELOW * math.prod(box.shape_zyx)
    return tighter if is_much_smaller else box


def _draw(scan: HeldScan, box: Box, predictor: Predictor) -> NDArray[np.float32] | None:
    if not predictor.samples:
        return None
    return predictor.draw(scan.view(box).image_zyx)


def _predict_tta(scan: HeldScan, box: Box, predictor: Predictor) -> NDArray[np.float32]:
    """The mean of the predictions in ``box`` and in wider boxes, on the view of ``box``.

    In a wider box other voxels fall together, which the network takes for another scan.
    """
    whole = scan.scan_box.shape_zyx
    total_czyx = np.zeros((2, *predictor.spec.shape_zyx), dtype=np.float32)
    for share in TTA_MARGINS:
        wider = box.with_margin([round(share * n) for n in box.shape_zyx], whole)
        seen_czyx = predictor.foreground(scan.view(wider).image_zyx)
        total_czyx += resample_to_box(seen_czyx, wider, box)
    return _kept(total_czyx / np.float32(len(TTA_MARGINS)), scan, box)


def _kept(foreground_czyx: NDArray[np.float32], scan: HeldScan, box: Box) -> NDArray[np.float32]:
    grid = resampled_grid(scan.header.grid, box, scan.scan_view.grid.shape_zyx)
    return keep_large_components(foreground_czyx, voxel_volume_ml=grid.voxel_volume_ml)


def _predict_box(scan: HeldScan, box: Box, predictor: Predictor) -> NDArray[np.float32]:
    return _kept(predictor.foreground(scan.view(box).image_zyx), scan, box)


def resample_to_box(foreground_czyx: NDArray[np.float32], source: Box, target: Box) -> NDArray[np.float32]:
    """The probabilities of a view on the view of another box inside its own: interpolated, then averaged down."""
    weights = [
        (box_weights(n, n_view, start, stop) @ linear_weights(n_view, n)).astype(np.float32)
        for n, n_view, start, stop in zip(
            source.shape_zyx,
            foreground_czyx.shape[1:],
            np.subtract(target.start_zyx, source.start_zyx).tolist(),
            np.subtract(target.stop_zyx, source.start_zyx).tolist(),
            strict=True,
        )
    ]
    resampled_czyx: NDArray[np.float32] = np.einsum(
        "czyx,Zz,Yy,Xx->cZYX", foreground_czyx, *weights, optimize=True
    )
    return resampled_czyx


def keep_large_components(
    foreground_czyx: NDArray[np.float32], *, voxel_volume_ml: float
) -> NDArray[np.float32]:
    """Probabilities inside the large components of liver and tumour together; zero elsewhere.

    Large is ``MIN_COMPONENT_SHARE`` of the largest: a liver that was split or resected keeps its pieces. All zero where
    the largest has less than ``NO_LIVER_ML``.
    """
    components, count = ndimage.label(is_foreground(foreground_czyx.sum(axis=0)))
    sizes = np.bincount(components.ravel(), minlength=count + 1)
    sizes[0] = 0
    if sizes.max() * voxel_volume_ml < NO_LIVER_ML:
        return np.zeros_like(foreground_czyx)
    liver = (sizes >= MIN_COMPONENT_SHARE * sizes.max())[components]
    # The soft edge stays, since it is interpolated; other components stay away even where they are near.
    near = ndimage.binary_dilation(liver, iterations=SOFT_EDGE_VOXELS) & ((components == 0) | liver)
    return np.where(near, foreground_czyx, np.float32(0))


def leave_out_doubtful_tumours(foreground_czyx: NDArray[np.float32]) -> tuple[NDArray[np.float32], int]:
    """Tumours that are nowhere more probable than ``SURE_TUMOUR`` become liver; also returns how many these are.

    A threshold with hysteresis, as Canny has for edges: a tumour is outlined at one half, and believed by its peak.
    """
    tumours_zyx, count = ndimage.label(decide(foreground_czyx) == 2, structure=CUBE)
    peaks, in_tumour = np.zeros(count + 1, dtype=np.float32), tumours_zyx > 0
    np.maximum.at(peaks, tumours_zyx[in_tumour], foreground_czyx[1][in_tumour])
    peaks[0] = 1  # not a tumour
    doubtful = peaks < SURE_TUMOUR
    if not doubtful.any():
        return foreground_czyx, 0
    is_doubtful = doubtful[tumours_zyx]
    liver_zyx, tumour_zyx = foreground_czyx
    tumour_left_zyx = np.where(is_doubtful, np.float32(0), tumour_zyx)
    return np.stack([liver_zyx + (tumour_zyx - tumour_left_zyx), tumour_left_zyx]), int(doubtful.sum())


def labelled_box(foreground_czyx: NDArray[np.float32], box: Box) -> Box | None:
    """The native voxels of the liver in the view of ``box``; None where it has none."""
    liver_zyx = is_foreground(foreground_czyx.sum(axis=0))
    filled = [np.flatnonzero(liver_zyx.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
    if not filled[0].size:
        return None
    return Box.from_slices(
        [
            slice(start + int(at[0] * n / n_view), start + min(n, math.ceil((at[-1] + 1) * n / n_view)))
            for at, start, n, n_view in zip(
                filled, box.start_zyx, box.shape_zyx, foreground_czyx.shape[1:], strict=True
            )
        ]
    )


def extend_box(box: Box, foreground_czyx: NDArray[np.float32], scan_box: Box) -> Box:
    """The box, longer by an eighth at each face that the liver touches and the scan goes on beyond."""
    liver_zyx, slices = is_foreground(foreground_czyx.sum(axis=0)), list[slice]()
    for axis, others in enumerate(((1, 2), (0, 2), (0, 1))):
        touched: NDArray[np.bool_] = np.asarray(liver_zyx.any(axis=others))
        start, stop, end = box.start_zyx[axis], box.stop_zyx[axis], scan_box.stop_zyx[axis]
        step = max(1, (stop - start) // 8)
        slices.append(
            slice(
                max(0, start - step) if touched[0] else start, min(end, stop + step) if touched[-1] else stop
            )
        )
    return Box.from_slices(slices)
