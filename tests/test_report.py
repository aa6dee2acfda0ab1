"""The page: what it encodes comes back, it stays small, it says what the scores say, and strange names are harmless."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import random_case, slab
from numpy.typing import NDArray
from PIL import Image
from tiny import SPEC, TinyWorld

from data_cache.errors import RunError
from data_cache.geometry import Grid
from liverseg.cli import main
from liverseg.evaluation.evaluate import evaluate
from liverseg.evaluation.report import write_report
from liverseg.inference.segment import load_predictor
from liverseg.measure.summary import CLASSES
from liverseg.pictures.curves import LOSS, chart, read_history, training_charts
from liverseg.pictures.histogram import intensity_histogram
from liverseg.pictures.page import Page, PageCase, write_page
from liverseg.pictures.slices import (
    MAX_CASE_BYTES,
    PREDICTION,
    SHOWN_HU,
    TRUTH,
    UNCERTAINTY,
    Layer,
    cached_volume,
    encoded,
    evaluation_volume,
)
from liverseg.training.split import load_split

GRID = Grid.from_array((20, 24, 28), np.diag([1.5, 1.5, 3.0, 1.0]))


def decoded(uri: str, volume: dict[str, Any]) -> NDArray[np.uint8]:
    """The tiles of a picture as a volume again, written out slice by slice."""
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))
    n_z, n_y, n_x = volume["shape"]
    slices = []
    for z in range(n_z):
        row, column = divmod(z, volume["columns"])
        slices.append(picture[row * n_y : (row + 1) * n_y, column * n_x : (column + 1) * n_x])
    return np.stack(slices)


def layer_values(bytes_zyx: NDArray[np.uint8], layer: Layer) -> NDArray[np.signedinteger[Any]]:
    return (bytes_zyx >> layer.shift) & ((1 << layer.bits) - 1)


def ball(radius: float) -> NDArray[np.bool_]:
    z, y, x = np.ogrid[:20, :24, :28]
    return np.asarray(((z - 10) * 3) ** 2 + ((y - 12) * 1.5) ** 2 + ((x - 14) * 1.5) ** 2 <= radius**2)


# ---- volumes


def test_an_overlay_comes_back_exactly_and_an_image_nearly() -> None:
    rng = np.random.default_rng(0)
    image = np.cumsum(rng.normal(0, 8, (5, 30, 40)), axis=2)
    overlay = rng.integers(0, 256, image.shape).astype(np.uint8)
    volume = encoded(
        "x", image, overlay, GRID, layers=(), native=slab(0, 5, GRID.shape_zyx), max_bytes=400_000
    )
    np.testing.assert_array_equal(decoded(volume["overlay"], volume), overlay)
    low, high = SHOWN_HU
    hu = low + decoded(volume["image"], volume) * ((high - low) / 255)
    assert np.abs(hu - np.clip(image, low, high)).mean() < 6


def test_noise_stays_under_the_size_of_a_case() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(-350, 450, (64, 128, 128))
    overlay = rng.integers(0, 2, noise.shape).astype(np.uint8)  # 170 KB as a picture
    volume = encoded(
        "x",
        noise,
        overlay,
        GRID,
        layers=(TRUTH,),
        native=slab(0, 64, GRID.shape_zyx),
        max_bytes=MAX_CASE_BYTES,
    )
    assert len(json.dumps(volume)) < 1.6 * MAX_CASE_BYTES  # noise at the worst quality; scans fit
    smooth = encoded(
        "x",
        noise // 8,
        None,
        GRID,
        layers=(),
        native=slab(0, 64, GRID.shape_zyx),
        max_bytes=MAX_CASE_BYTES,
    )
    assert len(json.dumps(smooth)) <= MAX_CASE_BYTES


def test_a_scored_case_shows_truth_and_prediction_where_they_are() -> None:
    truth, predicted = ball(20.0).astype(np.uint8), ball(17.0).astype(np.uint8)
    truth[ball(8.0)] = 2
    image = np.where(truth > 0, 100, 0).astype(np.int16)
    foreground = np.zeros((2, 10, 12, 14), dtype=np.float32)
    foreground[0, 3:6] = 0.5
    box = slab(0, 20, GRID.shape_zyx)
    volume = evaluation_volume(image, truth, predicted, GRID, foreground_czyx=foreground, box=box)
    # Small enough to be shown voxel by voxel, all of its depth being within 40 mm of the liver.
    assert volume["shape"] == [20, 24, 28]
    assert volume["native"] == [0, 20]
    bytes_zyx = decoded(volume["overlay"], volume)
    np.testing.assert_array_equal(layer_values(bytes_zyx, TRUTH), truth)
    np.testing.assert_array_equal(layer_values(bytes_zyx, PREDICTION), predicted)
    uncertain = layer_values(bytes_zyx, UNCERTAINTY)
    assert uncertain[8].min() == uncertain[8].max() == round(15 * np.log(2) / np.log(3))
    assert not uncertain[18].any()


def test_a_long_scan_is_cut_to_the_liver_and_thinned() -> None:
    grid = Grid.from_array((300, 64, 64), np.diag([5.0, 5.0, 2.0, 1.0]))
    truth = np.zeros(grid.shape_zyx, dtype=np.uint8)
    truth[100:150, 20:40, 20:40] = 1
    volume = evaluation_volume(
        np.zeros(grid.shape_zyx, dtype=np.int16),
        truth,
        truth,
        grid,
        foreground_czyx=np.zeros((2, 4, 4, 4), dtype=np.float32),
        box=slab(90, 160, grid.shape_zyx),
    )
    assert volume["native"] == [80, 170]  # 40 mm are 20 slices
    shown = layer_values(decoded(volume["overlay"], volume), TRUTH) > 0
    voxel_ml = np.prod(volume["spacing"]) / 1000
    assert shown.sum() * voxel_ml == pytest.approx(truth.sum() * grid.voxel_volume_ml, rel=0.1)


def test_no_label_shows_the_whole_scan() -> None:
    nothing = np.zeros(GRID.shape_zyx, dtype=np.uint8)
    volume = evaluation_volume(
        nothing.astype(np.int16),
        nothing,
        nothing,
        GRID,
        foreground_czyx=np.zeros((2, 4, 4, 4), np.float32),
        box=slab(0, 20, GRID.shape_zyx),
    )
    assert volume["native"] == [0, 20]


def test_cached_fractions_come_in_fifteenths() -> None:
    case = random_case()
    view = case.views["liver"]
    assert view.fractions_czyx is not None
    volume = cached_volume("liver", view, case.meta.boxes["liver"])
    bytes_zyx = decoded(volume["overlay"], volume)
    np.testing.assert_allclose(bytes_zyx >> 4, view.fractions_czyx[0] / 17, atol=0.5)
    np.testing.assert_allclose(bytes_zyx & 15, view.fractions_czyx[1] / 17, atol=0.5)
    assert cached_volume("x", replace(view, fractions_czyx=None), case.meta.boxes["liver"])["overlay"] is None


def test_a_histogram_counts_each_class_by_its_fraction() -> None:
    view = random_case().views["liver"]
    image = np.full_like(view.image_zyx, 60)
    image.flat[0] = -2000
    fractions = np.zeros((2, *image.shape), dtype=np.uint8)
    fractions[0].flat[:2] = 255, 85  # 1 of air and a third at 60 HU: 3/4 and 1/4
    bins = {
        b.low_hu: b for b in intensity_histogram(replace(view, image_zyx=image, fractions_czyx=fractions))
    }
    assert bins[-1100].liver == pytest.approx(3 / 4)
    assert bins[50].liver == pytest.approx(1 / 4)
    assert bins[50].everything == pytest.approx(1 - 1 / image.size)
    assert sum(b.tumour for b in bins.values()) == 0


# ---- pages


def data_of(page: str, name: str) -> Any:
    match = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.DOTALL)
    assert match is not None, name
    return json.loads(match.group(1))


def test_strange_names_are_shown_and_do_nothing(tmp_path: Path) -> None:
    name = '</script><img src=x onerror="alert(1)">{{css}}'
    case = PageCase(name=name, note="a < b", cells=(None, 0.5), volumes=iter(["{}"]))
    page = Page(
        title=name, subtitle="&", sections=("<p>kept</p>",), columns=("a", "b"), digits=(0, 2), cases=[case]
    )
    text = write_page(page, tmp_path / "new" / "page.html").read_text()
    assert data_of(text, "cases") == [{"name": name, "note": "a < b"}]
    assert data_of(text, "volumes-0") == [{}]
    assert "<img" not in text
    assert "<p>kept</p>" in text
    assert '<td data-value="">–</td><td data-value="0.5">0.50</td>' in text
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)  # nothing is fetched


def test_curves_leave_out_what_is_not_there(tmp_path: Path) -> None:
    history = {"epoch": [1.0, 2.0, 3.0], "val_dice_liver": [0.5, float("nan"), 1.0]}
    svg = training_charts(history)
    (line,) = re.findall(r'<polyline[^>]*points="([^"]+,[^"]*)"', svg)
    (x1, y1), (x2, y2) = (map(float, pair.split(",")) for pair in line.split())
    assert x1 < x2
    assert y1 > y2
    assert training_charts({}) == ""
    one = [replace(LOSS[0], key="a")]
    assert "circle" in chart("one", {"epoch": [1.0], "a": [2.0]}, one, top=None)
    (tmp_path / "history.csv").write_text("epoch,val_loss\n1,\n2,0.5\n")
    read = read_history(tmp_path / "history.csv")
    assert read["epoch"] == [1, 2]
    assert np.isnan(read["val_loss"][0])
    assert read_history(tmp_path / "none.csv") == {}


def test_one_first_value_does_not_flatten_a_curve() -> None:
    history = {"epoch": [float(e) for e in range(1, 21)], "train_loss": [50.0, *[0.5] * 18, 0.4]}
    svg = chart("Loss", history, LOSS[:1], top=None)
    assert "▲ 1 above 1, up to 50" in svg
    (line,) = re.findall(r'<polyline[^>]*points="([^"]+)"', svg)
    heights = [float(pair.split(",")[1]) for pair in line.split()]
    assert heights[-1] - heights[-2] > 10  # of 166: 0.4 and 0.5 are told apart
    assert "▲" not in chart("Loss", {**history, "train_loss": [1.0] * 20}, LOSS[:1], top=None)


@pytest.fixture(scope="module")
def evaluated(tiny_world: TinyWorld, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation of the tiny run."""
    out = tmp_path_factory.mktemp("evaluated")
    split = load_split(tiny_run)
    evaluate(
        load_predictor(tiny_run, device="cpu"),
        tiny_world.store,
        split,
        case_ids=split.val,
        raw=tiny_world.raw,
        out=out,
        report=lambda *_: None,
    )
    return out


def test_a_report_has_the_scores_and_the_worst_case_first(
    evaluated: Path, tiny_run: Path, tmp_path: Path
) -> None:
    text = write_report(tiny_run, evaluated, tmp_path / "report.html").read_text()
    rows = {row["case"]: row for row in csv.DictReader((evaluated / "scores.csv").read_text().splitlines())}
    names = [case["name"] for case in data_of(text, "cases")]
    assert set(names) == set(rows)

    def badness(name: str) -> float:
        liver, tumour = (float(rows[name][f"{c}_dice"]) for c in CLASSES)
        return (liver + tumour) / 2 if float(rows[name]["tumour_volume_truth_ml"]) else liver

    assert names == sorted(names, key=badness)
    turned = shutil.copytree(evaluated, tmp_path / "turned")
    head, *lines = (turned / "scores.csv").read_text().splitlines()
    (turned / "scores.csv").write_text("\n".join([head, *lines[::-1]]))
    again = write_report(tiny_run, turned, tmp_path / "again.html").read_text()
    assert [case["name"] for case in data_of(again, "cases")] == names
    summary = json.loads((evaluated / "summary.json").read_text())
    assert f"{summary['liver']['dice']['mean']:.3f} [" in text
    for index, name in enumerate(names):
        (volume,) = data_of(text, f"volumes-{index}")
        assert [layer["name"] for layer in volume["layers"]] == ["truth", "prediction", "uncertainty"]
        assert f'data-index="{index}">{name}<' in text
        assert len(json.dumps(volume)) <= MAX_CASE_BYTES
    assert "polyline" in text


def test_a_report_without_an_evaluation_says_what_to_do(
    evaluated: Path, tiny_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="run liverseg evaluate first"):
        write_report(tiny_run, tmp_path, tmp_path / "r.html")
    for name in ("scores.csv", "summary.json"):
        (tmp_path / name).write_bytes((evaluated / name).read_bytes())
    with pytest.raises(RunError, match="volumes.*run liverseg evaluate again"):
        write_report(tiny_run, tmp_path, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()  # whole or not at all


def test_the_page_of_a_cache_shows_both_views(tiny_world: TinyWorld, tmp_path: Path) -> None:
    page = tmp_path / "cache.html"
    arguments = ["inspect", str(tiny_world.cache), "liver_1", "liver_0", "--html", str(page)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    text = page.read_text()
    assert [case["name"] for case in data_of(text, "cases")] == ["liver_1", "liver_0"]
    volumes = data_of(text, "volumes-0")
    assert [volume["name"] for volume in volumes] == ["liver view", "scan view"]
    assert all(volume["shape"] == list(SPEC.shape_zyx) for volume in volumes)
    everything = CliRunner().invoke(main, ["inspect", str(tiny_world.cache), "--html", str(page)])
    assert everything.exit_code == 0
    assert len(data_of(page.read_text(), "cases")) == 6


def test_a_histogram_is_printed(tiny_world: TinyWorld) -> None:
    result = CliRunner().invoke(main, ["inspect", str(tiny_world.cache), "liver_0", "--histogram"])
    assert result.exit_code == 0
    assert "500 to 3100" in result.output
    assert CliRunner().invoke(main, ["inspect", str(tiny_world.cache), "--histogram"]).exit_code == 2
