"""``liverseg fingerprint``: hand-sized numbers, the same ones from a cache and from raw files, and a page of plots."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import random_case
from matplotlib.image import imread
from numpy.typing import NDArray
from scipy import ndimage

from data_cache.geometry import Grid
from data_cache.reader import CacheStore
from data_cache.schema import PreprocessSpec, View
from liverseg.cli import main
from liverseg.pictures.fingerprint_figure import fingerprint_figure
from liverseg.pictures.sheet import save
from pipeline import fingerprint as fp
from pipeline.build import build
from pipeline.decathlon import CaseFiles, read_data_set
from pipeline.fingerprint import CaseFingerprint, Moments
from pipeline.lesions import equivalent_diameters_mm
from pipeline.nifti import read_canonical
from pipeline.workers import Failure

SPEC = PreprocessSpec()
GRID = Grid.from_array((1, 2, 2), np.diag([10.0, 10.0, 10.0, 1.0]))  # voxels of 1 mL


def view(image: list[int], liver: list[int], tumour: list[int]) -> View:
    """A slice of 2×2 voxels of 1 mL."""
    return View(
        image_zyx=np.array(image, dtype=np.int16).reshape(1, 2, 2),
        fractions_czyx=np.array([liver, tumour], dtype=np.uint8).reshape(2, 1, 2, 2),
        grid=GRID,
    )


def case(
    case_id: str = "a",
    *,
    image: Moments | None = None,
    tumours: tuple[float, ...] = (),
    weights: NDArray[np.int64] | None = None,
) -> CaseFingerprint:
    moments = Moments(mean=0.0, sd=1.0) if image is None else image
    return CaseFingerprint(
        case_id=case_id,
        grid=GRID,
        voxel_counts=(10, 4, 2),
        histogram_ch=np.zeros((3, fp.N_HU), dtype=np.int64) if weights is None else weights,
        image=moments,
        image_no_padding=moments,
        tumour_volumes_ml=tumours,
    )


@pytest.fixture(scope="module")
def store(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> CacheStore:
    path = tmp_path_factory.mktemp("store") / "cache.zarr"
    build(read_data_set(phantoms), path, SPEC, jobs=1, report=lambda _: None)
    return CacheStore.open(path)


def of_cache(store: CacheStore) -> list[CaseFingerprint]:
    return fp.fingerprint_cache(store, report=lambda _: None)


# --- Intensities


def test_a_voxel_is_shared_out_among_its_classes() -> None:
    # 100 HU: 155 of 255 liver, 50 tumour, so 50 background; the others are all background.
    weights = fp.class_histograms(view([100, -1000, -1000, 7], [155, 0, 0, 0], [50, 0, 0, 0]))
    at = {hu: weights[:, hu - fp.HU_FIRST].tolist() for hu in (100, -1000, 7)}
    assert at == {100: [50, 155, 50], -1000: [510, 0, 0], 7: [255, 0, 0]}
    assert weights.sum() == 4 * 255


def test_statistics_of_a_histogram_are_those_of_its_voxels() -> None:
    values = np.random.default_rng(0).integers(-1024, 1500, 1001)
    weights = np.bincount(values - fp.HU_FIRST, minlength=fp.N_HU)
    found = fp.hu_statistics(weights)
    assert found["mean"] == pytest.approx(values.mean())
    assert found["sd"] == pytest.approx(values.std())
    expected = np.percentile(values, fp.PERCENTILES, method="inverted_cdf")
    assert list(found["percentiles"].values()) == expected.tolist()
    assert list(found["percentiles"]) == ["0.5", "5", "25", "50", "75", "95", "99.5"]


def test_a_class_that_is_nowhere_has_no_statistics() -> None:
    assert fp.hu_statistics(np.zeros(fp.N_HU, dtype=np.int64)) == {
        "mean": None,
        "sd": None,
        "percentiles": None,
    }


# --- Augmentation levels


def test_moments_are_in_the_units_of_the_network() -> None:
    # -150, 50, 50, 250 HU are -1, 0, 0, 1: mean 0, variance 2/4.
    moments = Moments.of(np.array([[[-150, 50], [50, 250]]], dtype=np.int16))
    assert moments.mean == 0
    assert moments.sd == pytest.approx(math.sqrt(0.5))


def test_levels_by_hand() -> None:
    # means 1, 3: population SD 1. SDs 1, 3: SD 1 over mean 2.
    levels = fp.augmentation_levels([Moments(mean=1, sd=1), Moments(mean=3, sd=3)])
    assert (levels.brightness, levels.contrast) == (1.0, 0.5)
    one = fp.augmentation_levels([Moments(mean=1, sd=1)])
    assert (one.brightness, one.contrast) == (None, None)


def test_padding_is_told_from_air() -> None:
    data = random_case(spec=PreprocessSpec(shape_zyx=(4, 4, 4)))
    image = np.full((4, 4, 4), -1024, dtype=np.int16)
    image[0] = -3024
    measured = fp.fingerprint_case(
        data.meta, View(image_zyx=image, fractions_czyx=None, grid=data.views["liver"].grid)
    )
    assert measured.image_no_padding == Moments(mean=-1074 / 200, sd=0.0)
    assert measured.image.mean == (-1024 * 0.75 - 3024 * 0.25 - 50) / 200


def test_twenty_images_are_drawn_once_each_and_the_seed_decides() -> None:
    cases = [case(str(i)) for i in range(50)]

    def drawn(seed: int) -> list[str]:
        return [c.case_id for c in fp.draw_images(cases, rng=np.random.default_rng(seed))]

    assert len(set(drawn(0))) == len(drawn(0)) == 20
    assert drawn(0) == drawn(0) != drawn(1)
    assert len(fp.draw_images(cases[:7], rng=np.random.default_rng(0))) == 7


# --- Tumours and ratios


def test_tumours_are_connected_over_corners_and_weighed_by_their_fractions() -> None:
    # The first and the last voxel touch at a corner: one tumour of (255 + 51) / 255 mL.
    assert list(fp.tumour_volumes_ml(view([0] * 4, [0] * 4, [255, 0, 0, 51]))) == pytest.approx([1.2])
    assert fp.tumour_volumes_ml(view([0] * 4, [255] * 4, [0] * 4)) == ()


def test_diameter_of_a_sphere() -> None:
    volumes_ml = np.array([4 / 3 * math.pi * 10**3 / 1000, 0])
    assert equivalent_diameters_mm(volumes_ml) == pytest.approx([20.0, 0.0])


def test_ratios_are_scaled_to_the_rarest_class() -> None:
    assert fp.voxel_ratios([case("a"), case("b")])["native"] == [5.0, 2.0, 1.0]
    assert fp.voxel_ratios([case()])["view"] is None


def test_tumours_of_phantoms_are_those_of_their_labels(phantoms: Path, store: CacheStore) -> None:
    for found in of_cache(store):
        label, _ = read_canonical(phantoms / "labelsTr" / f"{found.case_id}.nii.gz")
        _, n_tumours = ndimage.label(label == 2, structure=np.ones((3, 3, 3)))
        assert len(found.tumour_volumes_ml) == n_tumours
        assert sum(found.tumour_volumes_ml) == pytest.approx(found.volume_ml(2), rel=0.01, abs=0.01)


# --- Sources


def test_raw_files_give_the_same_numbers_as_their_cache(phantoms: Path, store: CacheStore) -> None:
    raw = fp.fingerprint_raw(read_data_set(phantoms), SPEC, jobs=1, report=lambda _: None)
    assert fp.fingerprint(raw, seed=1) == fp.fingerprint(of_cache(store), seed=1)


def test_a_case_that_fails_is_reported_and_stops_no_other(phantoms: Path, tmp_path: Path) -> None:
    shutil.copytree(phantoms, tmp_path, dirs_exist_ok=True)
    (tmp_path / "imagesTr" / "liver_2.nii.gz").write_bytes(b"no NIfTI")
    told: list[CaseFingerprint | Failure[CaseFiles]] = []
    cases = fp.fingerprint_raw(read_data_set(tmp_path), SPEC, jobs=1, report=told.append)
    assert [c.case_id for c in cases] == [f"liver_{i}" for i in (0, 1, 3, 4, 5)]
    (failure,) = (result for result in told if isinstance(result, Failure))
    assert (failure.item.case_id, "NIfTI" in failure.reason) == ("liver_2", True)


def test_what_is_native_comes_from_the_native_grid(phantoms: Path, store: CacheStore) -> None:
    content = fp.fingerprint(of_cache(store), seed=0)
    assert (content["shape"]["z"]["min"], content["shape"]["x"]["max"]) == (40, 40)
    counts = np.zeros(3)
    for path in (phantoms / "labelsTr").iterdir():
        counts += np.bincount(read_canonical(path)[0].ravel(), minlength=3)
    assert content["voxel_ratio"]["native"] == pytest.approx(list(counts / counts[2]))


# --- The command and the page


def run(*args: Any) -> Any:
    return CliRunner().invoke(main, ["fingerprint", *map(str, args)])


def test_command(store: CacheStore, phantoms: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "new" / "fingerprint.json", tmp_path / "new" / "page.png"
    result = run(store.path, "--json", out, "--png", page)
    assert result.exit_code == 0, result.output
    content = json.loads(out.read_text())
    assert content["augmentation"]["images"] == [f"liver_{i}" for i in range(6)]
    assert f"{content['augmentation']['brightness']:.3f}" in result.output
    assert imread(page).shape[:2] == (946, 1650)
    again = tmp_path / "raw.json"
    assert run(phantoms, "--json", again, "--jobs", 1).exit_code == 0
    assert again.read_text() == out.read_text()


def test_command_needs_a_cache_or_a_data_set(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.exit_code == 1


def with_weights(*, tumour: bool) -> NDArray[np.int64]:
    weights = np.zeros((3, fp.N_HU), dtype=np.int64)
    weights[0, -1000 - fp.HU_FIRST] = 100
    weights[1, 60 - fp.HU_FIRST] = 100
    weights[2, 40 - fp.HU_FIRST] = 100 * tumour
    return weights


@pytest.mark.parametrize(
    "cases",
    [
        [case()],
        [case(weights=with_weights(tumour=False))],
        [case(str(i), weights=with_weights(tumour=True), tumours=(0.1 + i,) * i) for i in range(40)],
    ],
    ids=["one case without anything", "no tumour", "forty"],
)
def test_the_page_bears_anything(cases: list[CaseFingerprint], tmp_path: Path) -> None:
    content = fp.fingerprint(cases, seed=0)
    json.dumps(content, allow_nan=False)
    figure = fingerprint_figure(cases, content, name="a$b$c[bold]")
    save(figure, tmp_path / "page.png")
    assert imread(tmp_path / "page.png").std() > 0.02
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles[0] == "intensity of each class"
    assert len(titles) == 6


def test_the_curves_of_the_page_are_densities() -> None:
    # 100 HU wide tophats at known places: the area under a curve is 100 %.
    weights = np.zeros((3, fp.N_HU), dtype=np.int64)
    weights[1, 0 - fp.HU_FIRST : 100 - fp.HU_FIRST] = 5
    cases = [case(weights=weights)]
    figure = fingerprint_figure(cases, fp.fingerprint(cases, seed=0), name="x")
    (curve, *_) = figure.axes[0].patches
    values, edges, _ = curve.get_data()  # type: ignore[attr-defined]
    assert (values * np.diff(edges)).sum() == pytest.approx(100)
    assert values.max() == pytest.approx(1.0)
    assert edges[values.argmax()] == 0
