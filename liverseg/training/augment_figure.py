"""A picture of what each strength of augmentation does to a case: strengths are chosen by eye."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from data_cache.schema import View
from liverseg.model.inputs import InputConfig, class_fractions, network_input
from liverseg.pictures.palette import TEXT
from liverseg.pictures.panel import draw_share_edges, show_values
from liverseg.pictures.sheet import TITLE_IN, new_figure
from liverseg.training.augment import (
    AugmentConfig,
    ContrastParams,
    SpatialParams,
    apply_contrast,
    apply_noise,
    apply_spatial,
    draw_noise,
    draw_spatial,
    sampling_grid,
)

CONTROLPOINTS = (5, 7, 9, 12, 16)
SIGMAS_VOXELS = (3.0, 6.0, 12.0)
NOISE_LEVELS = (0.05, 0.1, 0.2, 0.4, 0.8)
CONTRASTS = (-0.5, -0.25, 0.0, 0.25, 0.5)
WINDOW_HU = (-110.0, 190.0)
MESH_VOXELS = 8
STILL = AugmentConfig(elastic_probability=1.0, sigma=0.0, rotation_degrees=0.0, scale=0.0)
_PANEL_IN, _SEED = 2.35, 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Panel:
    """One slice after one strength.

    Attributes:
        image_yx: The network's input.
        foreground_cyx: Shares of liver and of tumour.
        mesh_2yx: From which y and x of the original each pixel is read; None where nothing has moved.
    """

    title: str
    image_yx: NDArray[np.float32]
    foreground_cyx: NDArray[np.float32]
    mesh_2yx: NDArray[np.float32] | None = None


def augment_figure(view: View, *, title: str) -> Figure:
    """A grid of one axial slice: ``num_controlpoints`` by ``sigma`` with the deformed mesh, noise, and contrast.

    Elastic draws of one number of control points differ in their strength alone. The mesh was square, of
    ``MESH_VOXELS``, before it was moved with the patient.

    Args:
        view: A cached view, with or without a label.
        title: First line bold, the others smaller below it.
    """
    panels = list(_panels(view))
    rows = len(panels) // len(CONTROLPOINTS)
    height_in = rows * _PANEL_IN * 1.08 + TITLE_IN
    figure = new_figure(title, width_in=len(CONTROLPOINTS) * _PANEL_IN, height_in=height_in)
    axes = figure.subplots(rows, len(CONTROLPOINTS))
    figure.subplots_adjust(
        left=0.01, right=0.99, bottom=0.008, top=1 - (TITLE_IN + 0.1) / height_in, wspace=0.03, hspace=0.12
    )
    for axis, panel in zip(axes.flat, panels, strict=True):
        _draw(axis, panel)
    return figure


def _panels(view: View) -> Iterator[_Panel]:
    image, foreground = _tensors(view)
    z = int(foreground.sum(dim=(0, 1, 3, 4)).argmax()) if foreground.any() else image.shape[2] // 2
    for sigma in SIGMAS_VOXELS:
        for points in CONTROLPOINTS:
            yield _elastic_panel(image, foreground, z, sigma=sigma, points=points)
    still = _planes(foreground, z)
    for level in NOISE_LEVELS:
        noise = draw_noise(1, STILL, generator=_generator())
        noisy = apply_noise(image, replace(noise, std_b=torch.tensor([level])))
        yield _Panel(title=f"noise {level:g}", image_yx=_planes(noisy, z)[0], foreground_cyx=still)
    for change in CONTRASTS:
        params = ContrastParams(gain_b=torch.tensor([1 + change]), offset_b=torch.zeros(1))
        changed = _planes(apply_contrast(image, params), z)[0]
        yield _Panel(
            title=f"contrast {change:+.0%}" if change else "unchanged", image_yx=changed, foreground_cyx=still
        )


def _elastic_panel(image: Tensor, foreground: Tensor, z: int, *, sigma: float, points: int) -> _Panel:
    config = replace(STILL, sigma=sigma, num_controlpoints=points)
    params = draw_spatial(1, config, generator=_generator())
    moved_image, moved_foreground = apply_spatial(image, foreground, params)
    return _Panel(
        title=f"{points} points, sigma {sigma:g}",
        image_yx=_planes(moved_image, z)[0],
        foreground_cyx=_planes(moved_foreground, z),
        mesh_2yx=_mesh(params, (image.shape[2], image.shape[3], image.shape[4]), z),
    )


def _mesh(params: SpatialParams, shape_zyx: tuple[int, int, int], z: int) -> NDArray[np.float32]:
    grid_yx3 = sampling_grid(shape_zyx, params, device=torch.device("cpu"))[0, z]
    _, size_y, size_x = shape_zyx
    y, x = (grid_yx3[..., 1] + 1) * size_y / 2, (grid_yx3[..., 0] + 1) * size_x / 2
    mesh: NDArray[np.float32] = torch.stack((y, x)).numpy()
    return mesh


def _tensors(view: View) -> tuple[Tensor, Tensor]:
    """The network's input and the shares of liver and tumour, a batch of one; zeros without a label."""
    image = network_input(torch.from_numpy(view.image_zyx)[None, None], InputConfig())
    if view.fractions_czyx is None:
        return image, torch.zeros(1, 2, *view.image_zyx.shape)
    return image, class_fractions(torch.from_numpy(view.fractions_czyx)[None])[:, 1:]


def _planes(volume_bczyx: Tensor, z: int) -> NDArray[np.float32]:
    planes: NDArray[np.float32] = volume_bczyx[0, :, z].numpy()
    return planes


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(_SEED)


def _draw(axis: Axes, panel: _Panel) -> None:
    """As a radiologist sees it: front up, the patient's right on the left."""
    shown = InputConfig()
    black, white = ((hu - shown.centre_hu) / shown.scale_hu for hu in WINDOW_HU)
    show_values(axis, panel.image_yx[::-1, ::-1], (1.0, 1.0), cmap="gray", limits=(black, white))
    if panel.mesh_2yx is not None:
        y, x = (np.arange(n) + 0.5 for n in panel.image_yx.shape)  # the centres of the pixels
        for coordinate_yx in panel.mesh_2yx[:, ::-1, ::-1]:
            levels = np.arange(MESH_VOXELS, coordinate_yx.max(), MESH_VOXELS)
            axis.contour(x, y, coordinate_yx, levels=levels, colors=TEXT, linewidths=0.4, alpha=0.55)
    liver, tumour = panel.foreground_cyx[:, ::-1, ::-1]
    draw_share_edges(axis, liver, tumour, (1.0, 1.0))
    axis.set_title(panel.title, color=TEXT, fontsize=9, pad=3)
