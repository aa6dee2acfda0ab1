"""One ruler: label files of any tool, pooled folds and paired runs, by hand and at the empty edges."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import oriented_affine, write_nifti
from numpy.typing import NDArray
from scipy import stats
from tiny import TinyWorld, copy_folds

from data_cache.errors import DataSetError, LabelError
from liverseg.cli import main
from liverseg.evaluation.compare import paired_differences, shared_cases, write_folds
from liverseg.evaluation.evaluate import _dice_interval
from liverseg.evaluation.label_files import LabelPair, pair_labels, score_files
from liverseg.measure.summary import (
    LabelScores,
    pooled_lesions,
    score_columns,
    score_labels,
    summarise_scores,
)

Label = NDArray[np.uint8]
ONE_MM = (1.0, 1.0, 1.0)


def a_label(*, tumour: bool = True, shift: int = 0) -> Label:
    """A liver of 8×8×8 with a tumour of 3×3×3, (z, y, x)."""
    label = np.zeros((16, 16, 16), dtype=np.uint8)
    label[4:12, 4:12, 4 + shift : 12 + shift] = 1
    if tumour:
        label[6:9, 6:9, 6 + shift : 9 + shift] = 2
    return label


def scores(*, shift: int = 0, tumour: bool = True) -> LabelScores:
    return score_labels(a_label(shift=shift), a_label(tumour=tumour), ONE_MM)


# ---- one case and their sum


def test_a_hand_example() -> None:
    # Shifted by 2 of 8: 6/8 of the liver is shared; by 2 of 3: 1/3 of the tumour, an IoU of 9 / 45.
    found = scores(shift=2)
    row = score_columns(found)
    assert row["liver_dice"] == pytest.approx(0.75)
    assert row["tumour_dice"] == pytest.approx(1 / 3)
    assert row["liver_hd_mm"] == pytest.approx(2)
    assert (row["lesions_iou0_found"], row["lesions_iou0_missed"], row["lesions_iou0_false_positives"]) == (
        1,
        0,
        0,
    )
    assert (row["lesions_iou0.5_found"], row["lesions_iou0.5_missed"]) == (0, 1)
    assert (row["lesions_lits_found"], row["lesions_lits_missed"], row["lesions_split"]) == (0, 1, 0)
    assert row["lesions_dice"] == pytest.approx(1 / 3)
    assert row["burden"] == row["burden_truth"] == pytest.approx(27 / 512)


@pytest.mark.parametrize("pred_empty", [True, False])
@pytest.mark.parametrize("truth_empty", [True, False])
def test_empty_labels_have_scores_that_are_json(pred_empty: bool, truth_empty: bool) -> None:
    nothing = np.zeros((16, 16, 16), dtype=np.uint8)
    found = score_labels(nothing if pred_empty else a_label(), nothing if truth_empty else a_label(), ONE_MM)
    json.dumps([score_columns(found), summarise_scores([found])], allow_nan=False)
    assert found.liver.dice == (1.0 if pred_empty == truth_empty else 0.0)
    assert (found.liver.hd95_mm is None) == (pred_empty != truth_empty)


def test_a_summary_pools_lesions_and_leaves_out_who_lacks_the_class() -> None:
    cases = [scores(shift=2), scores(), scores(tumour=False)]
    summary = summarise_scores(cases)
    assert summary["tumour"]["n_cases_with_it"] == 2
    assert summary["tumour"]["dice"]["mean"] == pytest.approx((1 / 3 + 1) / 2)
    at_half = summary["lesions"][1]["overall"]
    assert at_half == {
        "true_positives": 1,
        "false_positives": 2,
        "false_negatives": 1,
        "precision": pytest.approx(1 / 3),
        "recall": 0.5,
        "f1": pytest.approx(2 / 5),
    }
    # 27 / 512 claimed where nothing was: one error of three cases.
    assert summary["burden"]["max_error"] == pytest.approx(27 / 512)
    assert summary["burden"]["rmse"] == pytest.approx(27 / 512 / np.sqrt(3))
    assert pooled_lesions([]) == ()
    json.dumps(summarise_scores([]), allow_nan=False)


@pytest.mark.parametrize("crop", ["label_crop", "ceiling"])
def test_intervals_of_the_other_crops_end_where_dice_does(crop: str) -> None:
    # Means of 0.67 whose t-interval would end at 2.1; a case without the crop counts as undefined.
    cases = [SimpleNamespace(**{crop: scores(tumour=tumour).overlap}) for tumour in (True, True, False)]
    found = _dice_interval([*cases, SimpleNamespace(**{crop: None})], crop, "tumour")  # type: ignore[list-item]
    assert (found["low95"], found["high95"], found["n_undefined"]) == (0.0, 1.0, 1)


# ---- files


def write_label(path: Path, label_zyx: Label, *, axes: str = "RAS") -> Path:
    image = nib.Nifti1Image(label_zyx.transpose(2, 1, 0), oriented_affine("RAS"))
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image.as_reoriented(turn), path)
    return path


@pytest.fixture
def run() -> Callable[..., Result]:
    return lambda *arguments: CliRunner().invoke(main, [str(a) for a in arguments])


def test_orientation_of_the_files_does_not_matter(tmp_path: Path) -> None:
    truth = write_label(tmp_path / "t.nii.gz", a_label())
    straight = write_label(tmp_path / "p.nii.gz", a_label(shift=2))
    turned = write_label(tmp_path / "q.nii", a_label(shift=2), axes="SLP")
    first, second = (score_files(LabelPair(name="x", predicted=p, truth=truth)) for p in (straight, turned))
    assert score_columns(first) == pytest.approx(score_columns(second), rel=1e-5)
    # The files' spacing is 0.8 × 0.9 × 2.5 mm: two voxels along x are 1.6 mm.
    assert first.liver.hd_mm == pytest.approx(1.6)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    truth = write_label(tmp_path / "t.nii.gz", a_label())
    other = write_nifti(tmp_path / "o.nii.gz", a_label(), oriented_affine("RAS", origin_xyz_mm=(0, 0, 0)))
    with pytest.raises(LabelError, match="mm away"):
        score_files(LabelPair(name="x", predicted=other, truth=truth))
    seven = write_label(tmp_path / "s.nii.gz", np.where(a_label() == 2, 7, a_label()).astype(np.uint8))
    with pytest.raises(LabelError, match=r"s.nii.gz: holds 7 \(5 from 2\)"):
        score_files(LabelPair(name="x", predicted=seven, truth=truth))


def test_folders_are_matched_by_name_and_who_is_alone_is_named(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    for name in ("a.nii.gz", "b.nii.gz", "missing.nii.gz"):
        write_label(tmp_path / "truth" / name, a_label())
    write_label(tmp_path / "pred" / "a.nii", a_label())
    write_label(tmp_path / "pred" / "b.nii.gz", a_label(shift=2))
    write_label(tmp_path / "pred" / "extra.nii.gz", a_label())
    (tmp_path / "pred" / "notes.txt").write_text("no volume")
    result = run("score", tmp_path / "pred", tmp_path / "truth", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "missing.nii.gz: has no prediction" in result.output
    assert "extra.nii.gz: has no truth" in result.output
    rows = list(csv.DictReader((tmp_path / "out" / "scores.csv").read_text().splitlines()))
    assert [(row["case"], float(row["liver_dice"])) for row in rows] == [("a", 1.0), ("b", 0.75)]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["liver"]["dice"]["mean"] == pytest.approx(0.875)
    assert (summary["n_cases"], summary["failed"], summary["n_without_counterpart"]) == (2, [], 2)
    for word in ("HD95 mm", "NSD", "IoU > 0.5, > 20 mm", "tumour burden", "0.875 ["):
        assert word in result.output


def test_a_file_that_cannot_be_scored_does_not_stop_the_others(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    for name in ("a.nii.gz", "b.nii.gz"):
        write_label(tmp_path / "truth" / name, a_label())
        write_label(tmp_path / "pred" / name, a_label())
    (tmp_path / "pred" / "a.nii.gz").write_bytes(b"rubbish")
    result = run("score", tmp_path / "pred", tmp_path / "truth", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "error: a: " in result.output
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["failed"] == ["a"]
    assert "│ b " in result.output


def test_two_files_are_a_pair_and_nothing_in_common_is_said(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    truth, pred = (write_label(tmp_path / n / f"{n}.nii.gz", a_label()) for n in ("t", "p"))
    assert run("score", pred, truth).exit_code == 0
    with pytest.raises(DataSetError, match="no two"):
        pair_labels(tmp_path / "p", tmp_path / "t")
    with pytest.raises(DataSetError, match="no such folder"):
        pair_labels(pred, tmp_path / "t")
    # Which of two files of one name is scored must not be left to the alphabet.
    write_label(tmp_path / "p" / "t.nii.gz", a_label())
    write_label(tmp_path / "p" / "t.nii", a_label(shift=1))
    with pytest.raises(DataSetError, match="has both t.nii and t.nii.gz"):
        pair_labels(tmp_path / "p", tmp_path / "t")


def test_a_prediction_that_cannot_be_opened_fails_and_is_not_called_missing(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    for name in ("a", "link", "loop", "folder"):
        write_label(tmp_path / "t" / f"{name}.nii.gz", a_label())
    write_label(tmp_path / "p" / "a.nii.gz", a_label())
    (tmp_path / "p" / "link.nii.gz").symlink_to("gone.nii.gz")
    (tmp_path / "p" / "loop.nii.gz").symlink_to("loop.nii.gz")
    (tmp_path / "p" / "folder.nii.gz").mkdir()
    result = run("score", tmp_path / "p", tmp_path / "t")
    said = " ".join(result.output.split())
    assert result.exit_code == 1
    assert "has no prediction" not in said
    assert "it is a link to gone.nii.gz, which leads to no file" in said
    assert said.count("cannot be opened") == 3
    # What unpacking leaves beside a file, and a folder without a counterpart, are passed over.
    (tmp_path / "p" / "a.nii").mkdir()
    (tmp_path / "p" / "other.nii").mkdir()
    pairs, alone = pair_labels(tmp_path / "p", tmp_path / "t")
    assert (next(pair.predicted.name for pair in pairs if pair.name == "a"), alone) == ("a.nii.gz", [])
    with pytest.raises(DataSetError, match="no such folder; it is a link to gone"):
        pair_labels(tmp_path / "p" / "link.nii.gz", tmp_path / "t" / "link.nii.gz")


# ---- several runs


def test_folds_are_pooled_and_must_not_share_cases(tmp_path: Path) -> None:
    runs = {"f0": {"a": scores(), "b": scores(shift=2)}, "f1": {"c": scores(shift=1)}}
    summary = write_folds(tmp_path, runs, failed=["d"])
    assert (summary["n_cases"], summary["failed"]) == (3, ["d"])
    rows = list(csv.DictReader((tmp_path / "scores.csv").read_text().splitlines()))
    assert [(row["case"], row["run"]) for row in rows] == [("a", "f0"), ("b", "f0"), ("c", "f1")]
    twice = {"f0": {"a": scores()}, "f1": {"a": scores()}}
    assert shared_cases(list(twice.values())) == ("a",)
    with pytest.raises(ValueError, match="share"):
        write_folds(tmp_path, twice)


def test_a_paired_comparison_by_hand() -> None:
    shifts = ((0, 1), (1, 2), (2, 1), (0, 0), (1, 3), (0, 2), (0, 3), (2, 0))
    first = {str(i): scores(shift=a) for i, (a, _) in enumerate(shifts)}
    second = {str(i): scores(shift=b) for i, (_, b) in enumerate(shifts)} | {"only here": scores()}
    found = {d.metric: d for d in paired_differences(first, second)}["liver_dice"]
    # A liver of 8 shifted by s has the Dice 1 - s/8.
    expected = np.array([(a - b) / 8 for a, b in shifts])
    assert found.n_cases == 8
    assert found.mean == pytest.approx(expected.mean())
    assert (found.rose, found.fell) == (2, 5)
    assert found.wilcoxon_p == pytest.approx(stats.wilcoxon(expected[expected != 0]).pvalue)
    few = {d.metric: d for d in paired_differences({"a": scores()}, {"a": scores(shift=1)})}
    assert few["liver_dice"].wilcoxon_p is None
    nobody = paired_differences({"a": scores()}, {"b": scores()})
    assert {(d.n_cases, d.mean) for d in nobody} == {(0, None)}


def test_two_runs_are_compared(
    run: Callable[..., Result], tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path
) -> None:
    runs = [shutil.copytree(tiny_run, tmp_path / name) for name in ("one", "two")]
    case = json.loads((tiny_run / "split.json").read_text())["val"][0]
    common = ("--raw", tiny_world.raw, "--device", "cpu", "--case", case, "--out", tmp_path / "both")
    result = run("compare", tiny_world.cache, *runs, *common)
    assert result.exit_code == 0, result.output
    assert "minus" in result.output
    assert "1 case" in result.output
    content = json.loads((tmp_path / "both" / "comparison.json").read_text())
    assert {d["mean"] for d in content["differences"]} <= {0.0, None}
    for folder in runs:
        assert (folder / "evaluation" / "scores.csv").exists()


def test_two_folds_share_no_case_to_compare_on(
    run: Callable[..., Result], tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path
) -> None:
    runs = copy_folds(tiny_world, tiny_run, tmp_path)
    result = run("compare", tiny_world.cache, *runs, "--raw", tiny_world.raw, "--out", tmp_path / "both")
    assert result.exit_code == 2
    assert "has no case that neither" in " ".join(result.output.split())
    assert "liverseg pool" in " ".join(result.output.split())
    assert not any((folder / "evaluation").exists() for folder in (*runs, tmp_path / "both"))
    common = ("--raw", tiny_world.raw, "--device", "cpu", "--case", "liver_0")
    forced = run("compare", tiny_world.cache, *runs, *common)
    assert forced.exit_code == 0, forced.output
    assert "trained on" in forced.output


def test_folds_are_pooled_into_one_table(
    run: Callable[..., Result], tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path
) -> None:
    runs = copy_folds(tiny_world, tiny_run, tmp_path)
    common = ("--raw", tiny_world.raw, "--device", "cpu", "--out", tmp_path / "folds")
    result = run("pool", tiny_world.cache, *runs, *common)
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader((tmp_path / "folds" / "scores.csv").read_text().splitlines()))
    assert [(row["case"], row["run"]) for row in rows] == [
        ("liver_0", str(runs[0])),
        ("liver_1", str(runs[1])),
    ]
    shutil.copy(runs[0] / "split.json", runs[1] / "split.json")
    twice = run("pool", tiny_world.cache, *runs, *common)
    assert twice.exit_code == 2
    assert "1 case (liver_0, …) would be scored by several runs" in " ".join(twice.output.split())


@pytest.mark.parametrize(
    ("command", "order", "said"),
    [
        ("evaluate", "RC", "CACHE comes before RUN: liverseg evaluate CACHE RUN"),
        ("compare", "RRC", "CACHE comes before RUN: liverseg compare CACHE RUN RUN"),
        ("evaluate", "CRR", "evaluate takes one RUN, got 2; evaluate scores one run, compare compares two"),
        ("compare", "CR", "compare takes two RUNs, got 1"),
        ("pool", "CR", "pool takes two or more RUNs, got 1"),
        ("evaluate", "C", "Missing argument 'RUN...'"),
    ],
)
def test_the_cache_comes_first(
    run: Callable[..., Result], tiny_world: TinyWorld, tiny_run: Path, command: str, order: str, said: str
) -> None:
    paths = [tiny_world.cache if letter == "C" else tiny_run for letter in order]
    result = run(command, *paths, "--raw", tiny_world.raw)
    assert result.exit_code == 2
    words = result.output.replace(str(tiny_world.cache), "CACHE").replace(str(tiny_run), "RUN")
    assert said in " ".join(words.split())
