"""The page: what it encodes comes back, it stays small, it says what the scores say, and strange names are harmless."""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
import os
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import random_case, tree_bytes
from numpy.typing import NDArray
from PIL import Image
from tiny import SPEC, TinyWorld, change_weights

from data_cache.errors import RunError
from data_cache.files import write_csv
from data_cache.geometry import Box, Grid
from data_cache.outputs import SEAL, write_sealed_json
from liverseg.cli import main
from liverseg.evaluation.evaluate import evaluate
from liverseg.evaluation.report import write_report
from liverseg.evaluation.tables import rows_checksum, write_tables
from liverseg.inference.model_file import export_model
from liverseg.inference.segment import load_predictor
from liverseg.measure.lesion_list import list_lesions
from liverseg.measure.summary import CLASSES, ROWS
from liverseg.pictures.curves import LOSS, chart, read_history, training_charts
from liverseg.pictures.histogram import intensity_histogram
from liverseg.pictures.page import Page, PageCase, write_page
from liverseg.pictures.slices import (
    AROUND_BYTES,
    CLOSE_BYTES,
    PREDICTION,
    SHOWN_HU,
    TRUTH,
    UNCERTAINTY,
    Layer,
    _shown_shape,
    cached_case,
    encoded,
    evaluation_volume,
)
from liverseg.training.config import load_config, save_config
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


def seal_again(scores: Path) -> None:
    """Make the rows that a test has changed those of an evaluation."""
    summary = json.loads((scores / "summary.json").read_text())
    summary.pop(SEAL, None)
    write_sealed_json(scores / "summary.json", summary | {ROWS: rows_checksum(scores)}, command="evaluate")


def ball(radius: float) -> NDArray[np.bool_]:
    z, y, x = np.ogrid[:20, :24, :28]
    return np.asarray(((z - 10) * 3) ** 2 + ((y - 12) * 1.5) ** 2 + ((x - 14) * 1.5) ** 2 <= radius**2)


# ---- volumes

WHOLE = Box.whole(GRID.shape_zyx)


def test_an_overlay_comes_back_exactly_and_an_image_nearly() -> None:
    rng = np.random.default_rng(0)
    image = np.cumsum(rng.normal(0, 8, (5, 30, 40)), axis=2)
    overlay = rng.integers(0, 256, image.shape).astype(np.uint8)
    volume = encoded("x", image, overlay, WHOLE, layers=(), max_bytes=400_000)
    np.testing.assert_array_equal(decoded(volume["overlay"], volume), overlay)
    low, high = SHOWN_HU
    hu = low + decoded(volume["image"], volume) * ((high - low) / 255)
    assert np.abs(hu - np.clip(image, low, high)).mean() < 6


def test_noise_stays_under_the_size_of_a_volume() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(-350, 450, (64, 128, 128))
    overlay = rng.integers(0, 2, noise.shape).astype(np.uint8)  # 170 KB as a picture
    volume = encoded("x", noise, overlay, WHOLE, layers=(TRUTH,), max_bytes=AROUND_BYTES)
    assert len(json.dumps(volume)) < 1.8 * AROUND_BYTES  # noise at the worst quality; scans fit
    smooth = encoded("x", noise // 8, None, WHOLE, layers=(), max_bytes=AROUND_BYTES)
    assert len(json.dumps(smooth)) <= AROUND_BYTES


def scored(truth: NDArray[np.uint8], predicted: NDArray[np.uint8], grid: Grid = GRID) -> dict[str, Any]:
    """A case of these labels whose network was as uncertain as can be in the middle of its depth."""
    image = np.where(truth > 0, 100, 0).astype(np.int16)
    foreground = np.zeros((2, 10, 12, 14), dtype=np.float32)
    foreground[0, 3:6] = 0.5
    box = Box.whole(grid.shape_zyx)
    return evaluation_volume(image, truth, predicted, grid, foreground_czyx=foreground, box=box)


@pytest.mark.parametrize(
    ("diameter_mm", "shown"),
    [(9.46, 9.4), (9.96, 9.9), (9.9999, 9.9), (10.001, 10.0), (12.46, 12.4), (19.99, 19.9)],
)
def test_a_lesion_is_shown_on_the_side_of_10_mm_on_which_it_is_counted(
    diameter_mm: float, shown: float
) -> None:
    side_mm = diameter_mm * (np.pi / 6) ** (1 / 3) / 2  # of each of its eight voxels
    truth = np.zeros((10, 12, 14), np.uint8)
    truth[4:6, 4:6, 4:6] = 2
    case = scored(truth, truth, Grid.from_array(truth.shape, np.diag([side_mm, side_mm, side_mm, 1.0])))
    assert [lesion["mm"] for lesion in case["lesions"]] == [shown]


def test_a_scored_case_shows_truth_and_prediction_where_they_are() -> None:
    truth, predicted = ball(20.0).astype(np.uint8), ball(17.0).astype(np.uint8)
    truth[ball(8.0)] = 2
    case = scored(truth, predicted)
    assert case["shape"] == [20, 24, 28]
    (volume,) = case["volumes"]  # with 12 mm around it, the liver's box is the scan
    # Small enough to be shown voxel by voxel.
    assert volume["shape"] == [20, 24, 28]
    assert volume["box"] == [[0, 20], [0, 24], [0, 28]]
    bytes_zyx = decoded(volume["overlay"], volume)
    np.testing.assert_array_equal(layer_values(bytes_zyx, TRUTH), truth)
    np.testing.assert_array_equal(layer_values(bytes_zyx, PREDICTION), predicted)
    uncertain = layer_values(bytes_zyx, UNCERTAINTY)
    assert uncertain[8].min() == uncertain[8].max() == round(15 * np.log(2) / np.log(3))
    assert not uncertain[18].any()
    (lesion,) = case["lesions"]
    assert lesion["status"] == "missed"
    assert lesion["at"] == [10, 12, 14]
    assert lesion["ml"] == pytest.approx((truth == 2).sum() * GRID.voxel_volume_ml, abs=0.01)


def test_a_long_scan_has_a_close_view_of_the_liver_and_one_around_it() -> None:
    grid = Grid.from_array((300, 64, 64), np.diag([5.0, 5.0, 2.0, 1.0]))
    truth = np.zeros(grid.shape_zyx, dtype=np.uint8)
    truth[100:150, 20:40, 20:40] = 1
    close, around = scored(truth, truth, grid)["volumes"]
    assert close["box"] == [[94, 156], [17, 43], [17, 43]]  # 12 mm are 6 slices and 3 voxels
    assert close["shape"] == [62, 26, 26]  # voxel by voxel
    assert around["box"] == [[80, 170], [0, 64], [0, 64]]  # 40 mm are 20 slices
    for volume in (close, around):
        shown = layer_values(decoded(volume["overlay"], volume), TRUTH) > 0
        shares = [(b - a) / n for (a, b), n in zip(volume["box"], volume["shape"], strict=True)]
        assert shown.sum() * np.prod(shares) == pytest.approx(truth.astype(bool).sum(), rel=0.05)


def test_shown_voxels_are_as_many_as_a_page_bears_and_never_finer_than_the_scan() -> None:
    for spacing_mm in ((0.7, 0.7, 5.0), (0.7, 0.7, 1.0), (2.0, 2.0, 2.0)):
        grid = Grid.from_array((200, 400, 400), np.diag([*spacing_mm, 1.0]))
        shape = _shown_shape(Box.whole(grid.shape_zyx), grid, 1_000_000)
        assert 0.9e6 < np.prod(shape) <= 1_000_000
        assert all(n <= whole for n, whole in zip(shape, grid.shape_zyx, strict=True))
    thick = Grid.from_array((40, 400, 400), np.diag([0.7, 0.7, 5.0, 1.0]))
    assert _shown_shape(Box.whole(thick.shape_zyx), thick, 1_000_000)[0] == 40


def test_no_label_shows_the_whole_scan() -> None:
    nothing = np.zeros(GRID.shape_zyx, dtype=np.uint8)
    case = scored(nothing, nothing)
    assert [volume["box"] for volume in case["volumes"]] == [[[0, 20], [0, 24], [0, 28]]]
    assert case["lesions"] == []


def test_cached_fractions_come_in_fifteenths_and_the_liver_includes_its_tumours() -> None:
    case = random_case()
    view = case.views["liver"]
    assert view.fractions_czyx is not None
    box = case.meta.boxes["liver"]
    (volume,) = cached_case(case.meta.grid, [("liver", view, box)])["volumes"]
    bytes_zyx = decoded(volume["overlay"], volume)
    liver, tumour = view.fractions_czyx.astype(float)
    np.testing.assert_allclose(bytes_zyx >> 4, np.minimum(liver + tumour, 255) / 17, atol=0.5)
    np.testing.assert_allclose(bytes_zyx & 15, tumour / 17, atol=0.5)
    (alone,) = cached_case(case.meta.grid, [("x", replace(view, fractions_czyx=None), box)])["volumes"]
    assert alone["overlay"] is None


def test_lesions_are_listed_with_what_was_missed_first() -> None:
    truth, predicted = (np.zeros((20, 20, 20), dtype=bool) for _ in range(2))
    truth[2:4, 2:4, 2:4] = truth[10:14, 10:14, 10:14] = True
    predicted[10:13, 10:14, 10:14] = predicted[17:19, 2:4, 15:18] = True
    lesions = list_lesions(predicted, truth, (2.0, 1.0, 1.0))
    assert [lesion.status for lesion in lesions] == ["missed", "false positive", "found"]
    assert [round(1000 * lesion.volume_ml) for lesion in lesions] == [16, 24, 128]
    assert all((truth | predicted)[lesion.at_zyx] for lesion in lesions)
    alone = list_lesions(predicted, None, (2.0, 1.0, 1.0))
    assert [round(1000 * lesion.volume_ml) for lesion in alone] == [96, 24]
    assert {lesion.status for lesion in alone} == {"lesion"}
    crescent = np.zeros((1, 9, 9), dtype=bool)
    crescent[0, 1:8, 1] = crescent[0, 1, 1:8] = crescent[0, 7, 1:8] = True
    (lesion,) = list_lesions(crescent, None, (1.0, 1.0, 1.0))
    assert crescent[lesion.at_zyx]


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
    case = PageCase(name=name, note="a < b", cells=(None, 0.5), content=lambda: '{"a": "<"}')
    page = Page(
        title=name,
        subtitle="&",
        sections=("<p>kept</p>",),
        order="worst & first",
        columns=("a", "b"),
        digits=(0, 2),
        cases=[case],
    )
    text = write_page(page, tmp_path / "new" / "page.html").path.read_text()
    assert data_of(text, "cases") == [{"name": name, "note": "a < b"}]
    assert data_of(text, "case-0") == {"a": "<"}
    assert "worst &amp; first" in text
    assert "<img" not in text
    assert "<p>kept</p>" in text
    assert '<td data-value="">–</td><td data-value="0.5">0.50</td>' in text
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)  # nothing is fetched


def test_many_cases_are_an_index_and_a_file_each(tmp_path: Path) -> None:
    names = ["liver_0", "../up", "liver_2"]
    cases = [
        PageCase(name=name, note="", cells=(0.5,), content=partial(json.dumps, {"n": n}))
        for n, name in enumerate(names)
    ]
    page = Page(title="t", subtitle="", sections=(), order="", columns=("a",), digits=(2,), cases=cases)
    written = write_page(page, tmp_path / "r.html", max_cases=2)
    folder = tmp_path / "r_cases"
    assert sorted(p.name for p in folder.iterdir()) == ["case_1.html", "liver_0.html", "liver_2.html"]
    assert written.case_bytes == tuple(
        (folder / f).stat().st_size for f in ("liver_0.html", "case_1.html", "liver_2.html")
    )
    assert "an index of 3 files in" in written.line()
    index = written.path.read_text()
    assert re.findall(r'class="open" href="([^"]+)"', index) == [
        f"r_cases/{f}.html" for f in ("liver_0", "case_1", "liver_2")
    ]
    assert "3 files, 0.1 MB together" in index
    assert "<canvas" not in index
    middle = (folder / "case_1.html").read_text()
    assert data_of(middle, "nav") == {
        "previous": "liver_0.html",
        "next": "liver_2.html",
        "index": "../r.html",
    }
    assert data_of(middle, "case-0") == {"n": 1}
    assert write_page(page, tmp_path / "one.html").case_bytes == ()


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
    text = write_report(tiny_run, evaluated, tmp_path / "report.html").path.read_text()
    rows = {row["case"]: row for row in csv.DictReader((evaluated / "scores.csv").read_text().splitlines())}
    names = [case["name"] for case in data_of(text, "cases")]
    assert set(names) == set(rows)

    def badness(name: str) -> tuple[bool, float, float]:
        row = {
            key: float(value or 0)  # empty where no lesion was found
            for key, value in rows[name].items()
            if key.endswith(("_dice", "_ml", "_missed", "_false_positives"))
        }
        wrong = row["lesions_iou0_missed"] + row["lesions_iou0_false_positives"]
        both = row["tumour_volume_truth_ml"] or row["tumour_volume_ml"]
        return (
            row["liver_dice"] >= 0.5,
            -wrong,
            float(np.mean([row[f"{c}_dice"] for c in (CLASSES if both else CLASSES[:1])])),
        )

    assert names == sorted(names, key=badness)
    turned = shutil.copytree(evaluated, tmp_path / "turned")
    head, *lines = (turned / "scores.csv").read_text().splitlines()
    (turned / "scores.csv").write_text("\n".join([head, *lines[::-1]]))
    seal_again(turned)
    again = write_report(tiny_run, turned, tmp_path / "again.html").path.read_text()
    assert [case["name"] for case in data_of(again, "cases")] == names
    summary = json.loads((evaluated / "summary.json").read_text())
    assert f"{summary['liver']['dice']['mean']:.3f} [" in text
    for index, name in enumerate(names):
        case = data_of(text, f"case-{index}")
        for volume in case["volumes"]:
            assert [layer["name"] for layer in volume["layers"]] == ["truth", "prediction", "uncertainty"]
        lesions = [lesion["status"] for lesion in case["lesions"]]
        for status, column in (
            ("missed", "missed"),
            ("found", "found"),
            ("false positive", "false_positives"),
        ):
            assert lesions.count(status) == int(rows[name][f"lesions_iou0_{column}"])
        assert f'data-index="{index}">{name}<' in text
        assert len(json.dumps(case)) <= CLOSE_BYTES + AROUND_BYTES
    assert "polyline" in text
    assert "optim.epochs = 6" in text  # what is not the default
    assert "trained</dt>" in text


def test_a_liver_that_was_missed_comes_before_any_lesion(
    evaluated: Path, tiny_run: Path, tmp_path: Path
) -> None:
    scores = Path(shutil.copytree(evaluated, tmp_path / "scores"))
    rows = list(csv.DictReader((scores / "scores.csv").read_text().splitlines()))
    no_lesions = {"lesions_iou0_missed": "0", "lesions_iou0_false_positives": "0"}
    rows[0] |= no_lesions | {"liver_dice": "0.0", "tumour_volume_ml": "0", "tumour_volume_truth_ml": "0"}
    rows[1] |= {"liver_dice": "0.9", "lesions_iou0_missed": "7"}
    write_csv(scores / "scores.csv", rows)
    seal_again(scores)
    text = write_report(tiny_run, scores, tmp_path / "r.html").path.read_text()
    names = [case["name"] for case in data_of(text, "cases")]
    assert names.index(rows[0]["case"]) < names.index(rows[1]["case"])
    assert "Worst first: livers with a Dice below 0.5" in text


def test_rows_that_were_changed_since_are_refused(evaluated: Path, tiny_run: Path, tmp_path: Path) -> None:
    scores = Path(shutil.copytree(evaluated, tmp_path / "scores"))
    rows = scores / "scores.csv"
    rows.write_bytes(rows.read_bytes().replace(b"0.", b"1.", 1))
    with pytest.raises(RunError, match=r"scores\.csv: was changed since summary\.json was written"):
        write_report(tiny_run, scores, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_a_summary_that_was_changed_since_is_refused(evaluated: Path, tiny_run: Path, tmp_path: Path) -> None:
    scores = Path(shutil.copytree(evaluated, tmp_path / "scores"))
    summary = json.loads((scores / "summary.json").read_text())
    summary["liver"]["dice"]["mean"] = 0.999
    (scores / "summary.json").write_text(json.dumps(summary, indent=1))
    with pytest.raises(RunError, match=r"summary\.json: was changed since it was written"):
        write_report(tiny_run, scores, tmp_path / "r.html")
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    shutil.copytree(scores, run / "evaluation")
    with pytest.raises(RunError, match=r"summary\.json: was changed since it was written"):
        export_model(run, tmp_path / "m.safetensors")
    # The same content in another layout is the same summary.
    (scores / "summary.json").write_bytes((evaluated / "summary.json").read_bytes().replace(b"\n ", b"\n   "))
    write_report(tiny_run, scores, tmp_path / "r.html")


def test_cases_that_could_not_be_scored_are_on_the_page(
    tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path
) -> None:
    split = load_split(tiny_run)
    raw = Path(shutil.copytree(tiny_world.raw, tmp_path / "raw"))
    (raw / "imagesTr" / f"{split.val[0]}.nii.gz").write_bytes(b"damaged")
    evaluate(
        load_predictor(tiny_run, device="cpu"),
        tiny_world.store,
        split,
        case_ids=split.val,
        raw=raw,
        out=tmp_path / "scores",
        report=lambda *_: None,
    )
    assert json.loads((tmp_path / "scores" / "summary.json").read_text())["failed"] == [split.val[0]]
    text = write_report(tiny_run, tmp_path / "scores", tmp_path / "r.html").path.read_text()
    assert f"1 case could not be scored: {split.val[0]}" in text


def test_scores_of_earlier_weights_are_called_outdated(
    evaluated: Path, tiny_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    assert "outdated" not in write_report(run, evaluated, tmp_path / "1.html").path.read_text()
    change_weights(run)
    text = write_report(run, evaluated, tmp_path / "2.html").path.read_text()
    assert (
        '<dt>outdated</dt><dd class="bad">best.pt has other weights now: run liverseg evaluate again' in text
    )
    (run / "best.pt").write_bytes(b"damaged")
    text = write_report(run, evaluated, tmp_path / "3.html").path.read_text()
    assert "best.pt cannot be read" in text
    (run / "best.pt").unlink()
    assert "outdated" not in write_report(run, evaluated, tmp_path / "4.html").path.read_text()


def test_a_page_names_no_folder(evaluated: Path, tiny_run: Path, tmp_path: Path) -> None:
    """The run, the cache and the data set are in someone's home folder, which the page must not show."""
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    config = load_config(run / "config.toml")
    data = replace(config.data, split="/home/jane/nnunet/splits_final.json")
    save_config(
        replace(config, data=data, watch=replace(config.watch, raw="/home/jane/raw")), run / "config.toml"
    )
    starts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps([*starts[:-1], starts[-1] | {"cache": "/home/jane/liver.zarr"}]))
    scores = Path(shutil.copytree(evaluated, tmp_path / "scores"))
    summary = json.loads((scores / "summary.json").read_text())
    (scores / "summary.json").write_text(
        json.dumps(summary | {"models": ["/home/jane/runs/liver"]}, indent=1)
    )
    seal_again(scores)
    text = write_report(run, scores, tmp_path / "r.html").path.read_text()
    assert "jane" not in text
    for name in ("splits_final.json", "watch.raw = raw", "liver.zarr", "<dt>network</dt><dd>liver</dd>"):
        assert name in text


def test_what_is_not_plausible_is_on_top_and_in_the_table(
    evaluated: Path, tiny_run: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(evaluated, tmp_path / "scores"))
    summary = json.loads((folder / "summary.json").read_text())
    rows = list(csv.DictReader((folder / "scores.csv").read_text().splitlines()))
    names = [row["case"] for row in rows]
    for doubtful, words in (
        ([], f"<dd>{len(names)} of {len(names)} cases</dd>"),
        (
            names[:1],
            f'<dd class="bad">{len(names) - 1} of {len(names)} cases; not plausible: {names[0]}</dd>',
        ),
    ):
        (folder / "summary.json").write_text(json.dumps(summary | {"not_plausible": doubtful}, indent=1))
        for row in rows:
            row["plausible"] = str(row["case"] not in doubtful)
        with open(folder / "scores.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        seal_again(folder)
        text = write_report(tiny_run, folder, tmp_path / "r.html").path.read_text()
        assert f"<dt>plausible</dt>{words}" in text
        assert text.count("<td>NO</td>") == len(doubtful)
        assert text.count("<td>yes</td>") == len(names) - len(doubtful)


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


def spoil(scores: Path, run: Path, how: str) -> str:
    """Damage a file of an evaluation or of its run, and return its name."""
    table = scores / "scores.csv"
    match how:
        case "no number":
            table.write_text(re.sub(r",0\.[0-9]+", ",abc", table.read_text()))
        case "no column":
            table.write_text(table.read_text().replace("lesions_iou0_missed", "lesions"))
        case "no key":
            (scores / "summary.json").write_text('{"written_by": "liverseg evaluate"}')
        case "no start" | "cut short":
            (run / "run.json").write_text("[]" if how == "no start" else "[")
            return "run.json"
    return "scores.csv or summary.json"


@pytest.mark.parametrize("how", ["no number", "no column", "no key", "no start", "cut short"])
def test_a_damaged_file_is_named(evaluated: Path, tiny_run: Path, tmp_path: Path, how: str) -> None:
    scores, run = shutil.copytree(evaluated, tmp_path / "scores"), shutil.copytree(tiny_run, tmp_path / "run")
    name = spoil(scores, run, how)
    seal_again(scores)
    with pytest.raises(RunError, match=name):
        write_report(run, scores, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


class Killed(BaseException):
    """Raised in place of a kill."""


def die_before_rename(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Make the file system refuse all renames from the given one on, counted from 0."""
    renamed = itertools.count()
    rename = os.replace

    def replace_or_die(source: Path, target: Path) -> None:
        if next(renamed) >= number:
            raise Killed
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace_or_die)


def test_a_killed_evaluation_is_never_shown_beside_the_scores_of_another(
    evaluated: Path, tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split, predictor = load_split(tiny_run), load_predictor(tiny_run, device="cpu")
    for number in itertools.count():
        out = Path(shutil.copytree(evaluated, tmp_path / str(number)))
        before = tree_bytes(out)
        with monkeypatch.context() as patch:
            die_before_rename(patch, number)
            try:
                evaluate(
                    predictor,
                    tiny_world.store,
                    split,
                    case_ids=split.val[:1],
                    raw=tiny_world.raw,
                    out=out,
                    report=lambda *_: None,
                )
            except Killed:
                killed = True
            else:
                killed = False
        if not killed:
            break
        assert tree_bytes(out).keys() == before.keys() - {"summary.json"}
        with pytest.raises(
            RunError, match=f"{out}: an evaluation that was not finished: run liverseg evaluate"
        ):
            write_report(tiny_run, out, tmp_path / "r.html")
    assert number == 4  # an overlay, a volume, the scores, the summary
    assert write_report(tiny_run, out, tmp_path / "r.html").path.exists()


@pytest.mark.parametrize("number", [0, 1])
def test_killed_between_two_tables_no_summary_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    write_tables(tmp_path, [{"case": "a"}], {"n_cases": 1}, command="score")
    die_before_rename(monkeypatch, number)
    with pytest.raises(Killed):
        write_tables(tmp_path, [{"case": "b"}], {"n_cases": 1}, command="score")
    assert tree_bytes(tmp_path) == {"scores.csv": b"case\r\nb\r\n" if number else b"case\r\na\r\n"}


def test_the_tables_of_another_command_are_not_an_evaluation(
    evaluated: Path, tiny_run: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(evaluated, tmp_path / "folds"))
    summary = (out / "summary.json").read_text()
    (out / "summary.json").write_text(summary.replace("liverseg evaluate", "liverseg pool"))
    with pytest.raises(
        RunError, match=r"summary.json: expected a file of liverseg evaluate, found one of another"
    ):
        write_report(tiny_run, out, tmp_path / "r.html")


def test_the_page_of_a_cache_shows_both_views(tiny_world: TinyWorld, tmp_path: Path) -> None:
    page = tmp_path / "cache.html"
    arguments = ["inspect", str(tiny_world.cache), "liver_1", "liver_0", "--html", str(page)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    text = page.read_text()
    assert [case["name"] for case in data_of(text, "cases")] == ["liver_1", "liver_0"]
    volumes = data_of(text, "case-0")["volumes"]
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
