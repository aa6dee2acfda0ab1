"""Any tool's label on any scan as one page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_cache.errors import LabelError, VolumeError
from data_cache.outputs import html_mark, require_replaceable
from data_cache.text import pluralise
from liverseg.inference.inputs import find_scans
from liverseg.pictures.page import Page, PageCase, PageFiles, write_page
from liverseg.pictures.palette import LIVER_TRUTH, TUMOUR_PRED
from liverseg.pictures.slices import CLASSES, Layer, labelled_volume
from pipeline.labels import look_swapped, read_values
from pipeline.nifti import read_canonical
from pipeline.prepare import check_same_grid

MAX_VALUES = 15
COLOURS = (
    "#56b4e9", "#f2452d", "#f0e442", "#b740ff", "#2ca02c", "#ff9da7", "#17becf", "#ff7f0e",
    "#9edae5", "#c49c94", "#98df8a", "#c5b0d5", "#bcbd22", "#e377c2", "#ffffff",
)  # fmt: skip


def view_label(scan: Path, label: Path, out: Path | None) -> tuple[PageFiles, tuple[str, ...]]:
    """Write a page of a label on its scan; returns what was written, and what was passed over or left out.

    Args:
        scan: A NIfTI file, or a folder or zip of one DICOM series.
        label: A NIfTI file on the scan's grid. With values up to 2 they are liver and tumour.
        out: The page; None for ``NAME_view.html`` in the working directory.

    Raises:
        VolumeError: A file cannot be read, or ``scan`` holds several scans.
        LabelError: The label lies on another grid or holds what no label does, or is a scan, and the scan a label.
        OutputError: ``out`` is a file that the command did not write.
    """
    source, *others = find_scans([scan])
    if others:
        raise VolumeError(f"{scan}: holds {1 + len(others)} scans: name one of them")
    out = out or Path(f"{source.name}_view.html")
    require_replaceable(out, html_mark("view"), command="view")
    with source.as_nifti() as image:
        image_zyx, header = read_canonical(image.path)
        try:
            values_zyx, label_header = read_values(label)
        except LabelError:
            if look_swapped(image.path, label):
                raise LabelError(
                    f"{scan} and {label} look swapped: expected SCAN first, then LABEL"
                ) from None
            raise
    check_same_grid(label_header, header)
    label_zyx, layer, notes = _layer(values_zyx)
    case = labelled_volume(image_zyx, label_zyx, header.grid, layer=layer)
    n_labelled = int(np.count_nonzero(label_zyx))
    volumes = [
        (name, float(np.count_nonzero(label_zyx == value)) * header.grid.voxel_volume_ml)
        for value, name in enumerate(layer.names, start=1)
    ]
    if layer.nested:
        volumes[0] = ("liver", n_labelled * header.grid.voxel_volume_ml)
    page = Page(
        title=f"label {label.name} on scan {source.path.absolute().name}",
        subtitle="; ".join(notes) or "The liver includes its tumours." * layer.nested,
        sections=(),
        order="",
        columns=tuple(f"{name} mL" for name, _ in volumes),
        digits=(1,) * len(volumes),
        cases=[
            PageCase(
                name=source.name,
                note="",
                cells=tuple(ml for _, ml in volumes),
                content=lambda: json.dumps(case),
            )
        ],
    )
    return write_page(page, out, command="view"), (*image.notes, *notes)


def _layer(values_zyx: NDArray[np.uint16]) -> tuple[NDArray[np.uint8], Layer, tuple[str, ...]]:
    """The label with values from 1 up, what they are called, and what is not shown."""
    highest = int(values_zyx.max())
    counts = np.bincount(values_zyx.ravel())
    counts[0] = 0
    if highest <= len(CLASSES):
        layer = Layer(
            name="label", kind="classes", shift=0, bits=2, names=CLASSES, colours=(LIVER_TRUTH, TUMOUR_PRED)
        )
        return values_zyx.astype(np.uint8), layer, () if highest else ("the label is empty",)
    present = np.flatnonzero(counts)
    shown = np.sort(present[np.argsort(-counts[present], kind="stable")][:MAX_VALUES])
    numbers = np.zeros(highest + 1, dtype=np.uint8)
    numbers[shown] = np.arange(1, len(shown) + 1)
    layer = Layer(
        name="label",
        kind="classes",
        shift=0,
        bits=4,
        names=tuple(map(str, shown)),
        colours=COLOURS[: len(shown)],
        nested=False,
    )
    left = len(present) - len(shown)
    notes = (f"{pluralise(left, 'smaller value')} not shown",) if left else ()
    return numbers[values_zyx], layer, notes
