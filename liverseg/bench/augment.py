"""``liverseg bench augment``: elastic, noise and contrast of one sample, beside the libraries that are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from liverseg.bench.timing import Timing, fastest
from liverseg.training.augment import AugmentConfig, augment

SHAPE_ZYX = (64, 128, 128)
# The control points' displacement in voxels of a strong elastic deformation, in each library's own terms.
POINTS, SIGMA = 7, 6.0
NOISE, CONTRAST = 0.1, 0.25

Run = Callable[[], object]


def measure(device: torch.device, *, seconds: float) -> list[Timing]:
    """Seconds per sample of 64×128×128, image and label, on the CPU for peers and on ``device`` for liverseg.

    Each in its usual way: peers deform a label of ids by nearest neighbours, liverseg two fractions and background.
    """
    timings = [Timing(name=f"liverseg, {device}", seconds=_own(device, seconds))]
    if device.type != "cpu":
        cpu = torch.device("cpu")
        timings.append(Timing(name="liverseg, cpu", seconds=_own(cpu, seconds)))
    for name, make in PEERS.items():
        if importlib.util.find_spec(name) is not None:
            timings.append(
                Timing(name=name, seconds=fastest(make(), torch.device("cpu"), seconds=seconds), note="cpu")
            )
    return timings


def _own(device: torch.device, seconds: float) -> float:
    """A batch of two, as training has it; per sample."""
    config = AugmentConfig(elastic_probability=1.0, rotation_degrees=0.0, scale=0.0)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 1, *SHAPE_ZYX, device=device)
    fractions = torch.rand(2, 3, *SHAPE_ZYX, device=device)
    return (
        fastest(lambda: augment(image, fractions, config, generator=generator), device, seconds=seconds) / 2
    )


def _volumes() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    image = rng.normal(size=SHAPE_ZYX).astype(np.float32)
    return image, rng.integers(0, 3, SHAPE_ZYX).astype(np.uint8)


def _simpleitk() -> Run:
    """As the original notebook did: a B-spline transform, linear and nearest, noise and contrast."""
    import SimpleITK as sitk

    image, label = (sitk.GetImageFromArray(v) for v in _volumes())
    rng = np.random.default_rng(0)

    def run() -> object:
        # SimpleITK counts cells; a cubic spline has three control points more.
        transform = sitk.BSplineTransformInitializer(image, [POINTS - 3] * 3)
        count = len(transform.GetParameters())
        transform.SetParameters(rng.normal(scale=SIGMA, size=count).tolist())
        moved = sitk.Resample(image, image, transform, sitk.sitkLinear, 0.0)
        ids = sitk.Resample(label, image, transform, sitk.sitkNearestNeighbor, 0)
        noisy = sitk.AdditiveGaussianNoise(moved, NOISE)
        return sitk.GetArrayFromImage(noisy) * (1 + CONTRAST), sitk.GetArrayFromImage(ids)

    return run


def _torchio() -> Run:
    import torchio as tio

    image, label = (torch.from_numpy(v)[None] for v in _volumes())
    subject = tio.Subject(image=tio.ScalarImage(tensor=image), label=tio.LabelMap(tensor=label))
    transform = tio.Compose(
        [
            tio.RandomElasticDeformation(num_control_points=POINTS, max_displacement=SIGMA),
            tio.RandomNoise(std=(0, NOISE)),
            tio.RandomGamma(log_gamma=(-CONTRAST, CONTRAST)),
        ]
    )
    return lambda: transform(subject)


def _monai() -> Run:
    from monai import transforms as mt

    image, label = (torch.from_numpy(v)[None] for v in _volumes())
    keys = ("image", "label")
    transform = mt.Compose(
        [
            mt.Rand3DElasticd(
                keys,
                sigma_range=(5, 7),
                magnitude_range=(50, 150),
                prob=1.0,
                mode=("bilinear", "nearest"),
                padding_mode="border",
            ),
            mt.RandGaussianNoised("image", prob=1.0, std=NOISE),
            mt.RandScaleIntensityd("image", prob=1.0, factors=CONTRAST),
        ]
    )
    return lambda: transform({"image": image, "label": label})


def _batchgenerators() -> Run:
    from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
    from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

    image, label = (torch.from_numpy(v)[None] for v in _volumes())
    moved = SpatialTransform(SHAPE_ZYX, 0, False, p_elastic_deform=1.0, p_rotation=0.0, p_scaling=0.0)
    noise = GaussianNoiseTransform(noise_variance=(0, NOISE**2))
    contrast = ContrastTransform(
        (1 - CONTRAST, 1 + CONTRAST), preserve_range=False, synchronize_channels=True
    )

    def run() -> object:
        sample = moved(image=image, segmentation=label.to(torch.int16))
        return contrast(image=noise(image=sample["image"])["image"])

    return run


# Under the names that they are imported by.
PEERS: dict[str, Callable[[], Run]] = {
    "SimpleITK": _simpleitk,
    "torchio": _torchio,
    "monai": _monai,
    "batchgeneratorsv2": _batchgenerators,
}
