"""Records: exact through JSON, every fault named, no NaN and no NumPy inside."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import oriented_affine, random_case
from hypothesis import given
from hypothesis import strategies as st

from data_cache.errors import CacheError, ConfigError, SchemaError
from data_cache.geometry import Box, Grid
from data_cache.records import parse, to_json
from data_cache.schema import CacheSchema, CaseMeta, HuStatistics, PreprocessSpec, SourceFile, multiscales

finite = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 10**12)
rows = st.tuples(finite, finite, finite, finite)
grids = st.builds(
    Grid, shape_zyx=st.tuples(*[st.integers(1, 10**6)] * 3), affine_xyz=st.tuples(rows, rows, rows, rows)
)
sources = st.builds(SourceFile, path=st.text(), size_bytes=counts, mtime_ns=counts, sha256=st.text())
boxes = st.builds(
    lambda starts, lengths: Box.from_slices([slice(a, a + n) for a, n in zip(starts, lengths, strict=True)]),
    st.tuples(counts, counts, counts),
    st.tuples(*[st.integers(1, 10**6)] * 3),
)
metas = st.builds(
    CaseMeta,
    case_id=st.text(),
    spec_fingerprint=st.text(),
    image=sources,
    label=st.none() | sources,
    grid=grids,
    file_axes=st.text(),
    boxes=st.dictionaries(st.text(), boxes, max_size=3),
    voxel_counts=st.none() | st.tuples(counts, counts, counts),
    hu=st.builds(HuStatistics, minimum=finite, maximum=finite, mean=finite, standard_deviation=finite),
    notes=st.lists(st.text()).map(tuple),
)
specs = st.builds(
    PreprocessSpec,
    shape_zyx=st.tuples(*[st.integers(1, 512)] * 3),
    crop=st.sampled_from(["box", "depth"]),
    margin_mm=st.floats(0, 100),
    margin_fraction=st.floats(0, 1),
    air_hu=st.integers(-4000, 4000),
    resampling=st.text(),
)


def meta_json() -> Any:
    return to_json(random_case().meta)


# --- round trips


@given(meta=metas)
def test_a_case_comes_back_from_json_exactly(meta: CaseMeta) -> None:
    text = json.dumps(to_json(meta), allow_nan=False)
    assert CaseMeta.from_json(json.loads(text), source="test") == meta


@given(spec=specs)
def test_a_schema_comes_back_from_json_exactly(spec: PreprocessSpec) -> None:
    schema = CacheSchema.of(spec)
    text = json.dumps(to_json(schema), allow_nan=False)
    assert CacheSchema.from_json(json.loads(text), source="test") == schema


# --- faults


def test_every_fault_is_listed() -> None:
    data = meta_json()
    del data["file_axes"]
    data["hu"]["mean"] = "12"
    data["image"]["colour"] = "red"
    data["voxel_counts"] = [1, 2]
    data["boxes"]["scan"] = {"start_zyx": [5, 0, 0], "stop_zyx": [5, 9, 9]}
    data["grid"]["shape_zyx"][1] = 2.5
    with pytest.raises(SchemaError) as caught:
        CaseMeta.from_json(data, source="liver_0/zarr.json")
    message = str(caught.value)
    assert message.startswith("liver_0/zarr.json: ")
    for fault in (
        "file_axes: missing",
        "hu.mean: ",
        "found '12'",
        "image.colour: unknown key",
        "voxel_counts",
        "boxes.scan: a box needs 0 <= start < stop along each axis, got 5:5, 0:9, 0:9",
        "grid.shape_zyx.1: ",
        "found 2.5",
    ):
        assert fault in message
    assert "\n" not in message


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "place",
    [
        lambda data: data["hu"].__setitem__("mean", ...),
        lambda data: data["grid"]["affine_xyz"][0].__setitem__(3, ...),
    ],
    ids=["hu", "affine"],
)
def test_numbers_that_json_lacks_are_refused(place: Callable[[Any], None], number: float) -> None:
    data = meta_json()
    place(data)
    text = json.dumps(data, default=lambda _: number)
    with pytest.raises(SchemaError, match="finite"):
        CaseMeta.from_json(json.loads(text), source="test")


@pytest.mark.parametrize("data", [None, 3, "text", [], {}])
def test_what_is_no_record_at_all_is_a_schema_error(data: object) -> None:
    with pytest.raises(SchemaError, match="^test: "):
        CaseMeta.from_json(data, source="test")


def test_the_error_is_the_one_asked_for() -> None:
    with pytest.raises(ConfigError, match="margin_fraction"):
        parse(PreprocessSpec, {"margin_fraction": "much"}, source="test", error=ConfigError)


def test_another_format_version_is_refused_by_number() -> None:
    data = to_json(CacheSchema.of(PreprocessSpec()))
    data["format_version"] = 99
    with pytest.raises(
        SchemaError, match=r"expected cache format 2, found 99: build a new cache with liverseg preprocess"
    ):
        CacheSchema.from_json(data, source="test")


def test_a_store_of_format_1_is_refused_in_one_line_that_says_what_to_do() -> None:
    # As version 1 wrote it: without the crop, and its cases with depth windows.
    old = {
        "format_version": 1,
        "spec": {
            "shape_zyx": [64, 128, 128],
            "margin_fraction": 0.02,
            "air_hu": -1024,
            "resampling": "box-average-1",
        },
        "fingerprint": "8badbb7531417541",
        "label_names": ["background", "liver", "tumour"],
        "software": "liverseg 0.1.0",
    }
    with pytest.raises(SchemaError) as failure:
        CacheSchema.from_json(old, source="old.zarr/zarr.json")
    assert str(failure.value) == (
        "old.zarr/zarr.json: expected cache format 2, found 1: "
        "build a new cache with liverseg preprocess RAW NEW_CACHE"
    )


def test_a_spec_that_was_edited_by_hand_is_refused() -> None:
    data = to_json(CacheSchema.of(PreprocessSpec()))
    data["spec"]["air_hu"] = -1000
    with pytest.raises(SchemaError, match="is not the one of the spec beside it"):
        CacheSchema.from_json(data, source="test")


# --- fingerprints


def changed(spec: PreprocessSpec, field: str) -> PreprocessSpec:
    data = to_json(spec)
    match data[field]:
        case [first, *others]:
            data[field] = [first + 1, *others]
        case "box":
            data[field] = "depth"
        case str(text):
            data[field] = text + "x"
        case number:
            data[field] = number + 1
    return parse(PreprocessSpec, data, source="test", error=SchemaError)


@pytest.mark.parametrize("field", [f.name for f in fields(PreprocessSpec)])
def test_every_field_of_a_spec_changes_its_fingerprint(field: str) -> None:
    spec = PreprocessSpec()
    assert changed(spec, field).fingerprint() != spec.fingerprint()
    assert replace(spec).fingerprint() == spec.fingerprint()


def test_the_fingerprint_of_the_default_spec_is_pinned() -> None:
    # Every store on disk carries it: when this changes, all of them are refused.
    assert PreprocessSpec().fingerprint() == "cda8f950bef7ce11"


def test_a_whole_number_for_a_float_has_the_same_fingerprint() -> None:
    # Equal specs, and what JSON gives back: 0 is read as 0.0.
    assert PreprocessSpec(margin_fraction=0) == PreprocessSpec(margin_fraction=0.0)
    assert (
        PreprocessSpec(margin_fraction=0).fingerprint() == PreprocessSpec(margin_fraction=0.0).fingerprint()
    )


# --- what goes out


def test_only_plain_values_go_to_json() -> None:
    grid = Grid.from_array(
        list(np.array((3, 4, 5), dtype=np.int32)), oriented_affine("LPS").astype(np.float32)
    )
    meta = replace(random_case().meta, grid=grid)

    def leaves(value: Any) -> list[Any]:
        if isinstance(value, dict):
            return [leaf for item in value.items() for part in item for leaf in leaves(part)]
        if isinstance(value, list):
            return [leaf for item in value for leaf in leaves(item)]
        return [value]

    written = [to_json(meta), multiscales(meta, PreprocessSpec())]
    assert {type(leaf) for leaf in leaves(written)} <= {str, int, float, bool, type(None)}


def test_parsing_does_not_edit_its_argument() -> None:
    data = meta_json()
    before = copy.deepcopy(data)
    CaseMeta.from_json(data, source="test")
    assert data == before


def test_volumes_by_hand() -> None:
    # 0.8 · 0.9 · 2.5 = 1.8 mm³ a voxel: 140 voxels of tumour are 252 mm³.
    meta = random_case().meta
    assert meta.volume_ml(2) == pytest.approx(0.252)
    assert random_case(labelled=False).meta.volume_ml(2) is None


# ---- source files


def test_a_source_file_knows_what_is_not_it(tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    path.write_bytes(b"voxels")
    status = path.stat()
    source = SourceFile(
        path="a.nii", size_bytes=6, mtime_ns=status.st_mtime_ns, sha256=hashlib.sha256(b"voxels").hexdigest()
    )
    assert source.fault(path, by_content=False) is None
    assert source.fault(path, by_content=True) is None
    path.write_bytes(b"VOXELS")
    os.utime(path, ns=(source.mtime_ns, source.mtime_ns))
    assert source.fault(path, by_content=False) is None
    assert source.fault(path, by_content=True) == "not the file that the case was built from (another sha256)"
    os.utime(path, ns=(1, 1))
    assert (
        source.fault(path, by_content=False) == "not the file that the case was built from (modified since)"
    )
    path.write_bytes(b"more voxels")
    for by_content in (False, True):
        assert "(11 bytes instead of 6)" in str(source.fault(path, by_content=by_content))
    path.unlink()
    assert source.fault(path, by_content=True) == "cannot be read: No such file or directory"


def test_a_copied_file_is_the_same_by_content(tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    path.write_bytes(b"voxels")
    source = SourceFile(path="a.nii", size_bytes=6, mtime_ns=1, sha256=hashlib.sha256(b"voxels").hexdigest())
    assert source.fault(path, by_content=True) is None
    source.require_content(path, source.sha256)
    with pytest.raises(CacheError, match="a.nii: not the file .* or run liverseg preprocess again"):
        source.require_content(path, "0" * 64)
