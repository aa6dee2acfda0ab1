"""A cache says in OME-Zarr 0.5 where its arrays are, so that other viewers open it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny import TinyWorld


def test_the_metadata_is_valid_ome_zarr(tiny_world: TinyWorld) -> None:
    models = pytest.importorskip("ome_zarr_models.v05.image")
    for case_id in tiny_world.store.case_ids:
        attributes = json.loads((tiny_world.cache / case_id / "zarr.json").read_text())["attributes"]
        image = models.ImageAttrs.model_validate(attributes["ome"])
        assert {m.name for m in image.multiscales} == {
            f"{view}/{array}" for view in ("liver", "scan") for array in ("image", "fractions")
        }
        for multiscale in image.multiscales:
            assert len(multiscale.axes) == multiscale.ndim


def test_scale_and_translation_are_where_the_voxels_are(tiny_world: TinyWorld) -> None:
    store = tiny_world.store
    for case_id in store.case_ids:
        attributes = json.loads((tiny_world.cache / case_id / "zarr.json").read_text())["attributes"]
        for multiscale in attributes["ome"]["multiscales"]:
            (dataset,) = multiscale["datasets"]
            grid = store.read(case_id, dataset["path"].split("/")[0]).grid
            scale, translation = (t[t["type"]][-3:] for t in dataset["coordinateTransformations"])
            last = np.array(grid.shape_zyx) - 1
            expected = (grid.affine @ [*last[::-1], 1])[:3][::-1]
            np.testing.assert_allclose(np.array(scale) * last + translation, expected, atol=1e-3)
