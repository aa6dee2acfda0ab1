"""Segmenting, predicting and evaluating: crops, native grids, the rules of who is scored."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import write_listing
from numpy.typing import NDArray
from oracle import oracle
from tiny import SPEC, TinyWorld

from data_cache.errors import CacheError, ConfigError, OutputError, RunError, VolumeError
from data_cache.geometry import Box
from data_cache.reader import CacheStore
from liverseg.evaluation.case import CaseEvaluation, evaluate_case
from liverseg.evaluation.evaluate import (
    choose_cases,
    evaluate,
    summarise,
)
from liverseg.inference.inputs import ScanInput
from liverseg.inference.predict import Prediction, predict_scan
from liverseg.inference.segment import (
    Predictor,
    extend_box,
    keep_large_components,
    labelled_box,
    leave_out_doubtful_tumours,
    load_predictor,
    segment,
)
from liverseg.training.checkpoint import content_checksum, load_checkpoint
from liverseg.training.split import Split, load_split
from liverseg.training.validate import native_dice
from pipeline.build import build
from pipeline.decathlon import read_data_set
from pipeline.labels import decide
from pipeline.nifti import VolumeHeader, VolumeStream, read_canonical
from pipeline.prepare import read_scan


def foreground(shape: tuple[int, int, int], *boxes: tuple[slice, slice, slice]) -> NDArray[np.float32]:
    """Liver probability 0.9 in the boxes, 0.1 elsewhere; no tumour."""
    result = np.zeros((2, *shape), dtype=np.float32)
    result[0] = 0.1
    for box in boxes:
        result[0][box] = 0.9
    return result


def test_the_largest_component_is_the_liver_and_keeps_its_soft_edge() -> None:
    large, small = np.s_[2:6, 2:6, 2:6], np.s_[9:11, 9:11, 9:11]
    kept = keep_large_components(foreground((12, 12, 12), large, small), voxel_volume_ml=1.0)
    assert (kept[0][large] == np.float32(0.9)).all()
    assert not kept[0][small].any()
    assert kept[0, 0, 3, 3] == np.float32(0.1)  # two voxels from the box: what interpolation needs
    assert kept[0, 9, 3, 3] == 0


def test_a_neighbouring_component_does_not_come_back_as_a_soft_edge() -> None:
    liver, near = np.s_[2:8, 2:8, 2:8], np.s_[9:11, 2:4, 2:4]
    kept = keep_large_components(foreground((12, 12, 12), liver, near), voxel_volume_ml=1.0)
    assert not kept[0][near].any()


def test_specks_are_no_liver() -> None:
    # 8 voxels of 1 mL are less than 10 mL.
    assert not keep_large_components(foreground((6, 6, 6), np.s_[0:2, 0:2, 0:2]), voxel_volume_ml=1.0).any()
    assert keep_large_components(foreground((6, 6, 6), np.s_[0:2, 0:2, 0:3]), voxel_volume_ml=1.0).any()
    assert not keep_large_components(np.zeros((2, 4, 4, 4), dtype=np.float32), voxel_volume_ml=1.0).any()


def test_tumour_and_liver_are_one_component() -> None:
    probabilities = foreground((6, 6, 12), np.s_[1:5, 1:5, 1:4])
    probabilities[1][1:5, 1:5, 4:11] = 0.9
    kept = keep_large_components(probabilities, voxel_volume_ml=1.0)
    assert (kept[1][1:5, 1:5, 4:11] == np.float32(0.9)).all()


def test_pieces_of_a_liver_stay_and_small_ones_go() -> None:
    # 96 voxels; 24, a quarter of them; and 12, an eighth.
    left, right, small = np.s_[0:4, 0:4, 0:6], np.s_[8:10, 0:3, 0:4], np.s_[8:10, 8:10, 8:11]
    kept = keep_large_components(foreground((12, 12, 12), left, right, small), voxel_volume_ml=1.0)
    assert (kept[0][left] == np.float32(0.9)).all()
    assert (kept[0][right] == np.float32(0.9)).all()
    assert not kept[0][small].any()


def with_tumours(*peaks: float) -> NDArray[np.float32]:
    """A liver whose tumours, of 2×3×3 voxels and five apart, are at 0.6 but for one voxel each."""
    probabilities = foreground((6, 6, 5 * len(peaks)), np.s_[:, :, :])
    for i, peak in enumerate(peaks):
        probabilities[:, 2:4, 1:4, 5 * i + 1 : 5 * i + 4] = np.array([0.4, 0.6])[:, None, None, None]
        probabilities[:, 3, 2, 5 * i + 2] = (1 - peak, peak)
    return probabilities


def test_a_tumour_is_believed_by_its_peak_and_outlined_at_one_half() -> None:
    before = with_tumours(0.69, 0.71, 0.6, 1.0)
    after, n_doubtful = leave_out_doubtful_tumours(before)
    assert n_doubtful == 2
    assert np.array_equal(decide(after) == 2, (decide(before) == 2) & np.isin(np.arange(20) // 5, (1, 3)))
    assert np.array_equal(after[1][..., 5:10], before[1][..., 5:10])
    np.testing.assert_allclose(
        after.sum(axis=0), before.sum(axis=0), atol=1e-6
    )  # the liver with its tumours stays


def test_what_touches_a_sure_tumour_at_a_corner_is_part_of_it() -> None:
    probabilities = with_tumours(0.9)
    probabilities[:, 4, 4, 4] = (0.4, 0.6)
    after, n_doubtful = leave_out_doubtful_tumours(probabilities)
    assert n_doubtful == 0
    assert np.array_equal(after, probabilities)


def test_no_tumour_is_no_doubtful_one() -> None:
    liver = foreground((4, 4, 4), np.s_[:, :, :])
    after, n_doubtful = leave_out_doubtful_tumours(liver)
    assert (n_doubtful, np.array_equal(after, liver)) == (0, True)


def test_labelled_box_on_a_hand_example() -> None:
    # 16 view slices over the native slices 40..199, ten each: view slices 4 and 5 are native 80..99.
    # 8 rows over 100..115, two each: rows 2 and 3 are 104..107. 8 columns over 0..3: half a voxel each, 1..1.
    box = Box(start_zyx=(40, 100, 0), stop_zyx=(200, 116, 4))
    found = labelled_box(foreground((16, 8, 8), np.s_[4:6, 2:4, 2:4]), box)
    assert found == Box(start_zyx=(80, 104, 1), stop_zyx=(100, 108, 2))
    assert labelled_box(foreground((16, 8, 8)), box) is None


def test_boxes_grow_only_at_faces_that_the_liver_touches_and_the_scan_goes_on_beyond() -> None:
    box, scan = Box(start_zyx=(20, 8, 0), stop_zyx=(52, 24, 16)), Box.whole((100, 25, 16))
    top = foreground((16, 8, 8), np.s_[14:16, 2:4, 2:4])
    assert extend_box(box, top, scan) == Box(start_zyx=(20, 8, 0), stop_zyx=(56, 24, 16))  # 32 // 8 = 4
    back = foreground((16, 8, 8), np.s_[4:6, 0:8, 0:8])
    # 16 // 8 = 2 rows at the front, one at the back, where the scan ends; the columns are all there are.
    assert extend_box(box, back, scan) == Box(start_zyx=(20, 6, 0), stop_zyx=(52, 25, 16))
    assert extend_box(scan, foreground((4, 4, 4), np.s_[:, :, :]), scan) == scan


def predict_file(image: Path, out: Path, predictor: Predictor) -> Prediction:
    name = image.name.removesuffix(".nii.gz")
    return predict_scan(ScanInput(name=name, path=image, is_dicom=False), out, predictor)


def oracle_predictor(world: TinyWorld, case_id: str, monkeypatch: pytest.MonkeyPatch) -> Predictor:
    """A predictor that knows the truth of one case."""
    meta = world.store.meta(case_id)
    assert meta.label is not None
    truth_zyx, _ = read_canonical(world.raw / meta.label.path)
    return oracle(truth_zyx, monkeypatch)


@pytest.mark.parametrize("case_id", ["liver_0", "liver_1"], ids=["LPS", "RAS"])
def test_a_perfect_network_gives_the_ceiling_of_the_grid(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case_id: str
) -> None:
    predictor = oracle_predictor(tiny_world, case_id, monkeypatch)
    image = tiny_world.raw / "imagesTr" / f"{case_id}.nii.gz"
    result = predict_file(image, tmp_path, predictor)
    source, written = nib.Nifti1Image.from_filename(image), nib.Nifti1Image.from_filename(result.label)
    truth = np.asarray(
        nib.Nifti1Image.from_filename(tiny_world.raw / "labelsTr" / f"{case_id}.nii.gz").dataobj
    )
    label = np.asarray(written.dataobj)
    assert written.shape == source.shape
    np.testing.assert_array_equal(written.affine, source.affine)
    for code in ("sform_code", "qform_code"):
        assert written.header[code] == source.header[code]
    dice = 2 * np.sum((label > 0) & (truth > 0)) / (np.sum(label > 0) + np.sum(truth > 0))
    assert dice > 0.97
    voxel_ml = abs(np.linalg.det(source.affine)) / 1000
    assert result.liver_ml == pytest.approx(np.sum(label > 0) * voxel_ml)
    assert result.tumour_ml == pytest.approx(np.sum(label == 2) * voxel_ml)


def test_no_liver_is_an_answer(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = oracle_predictor(tiny_world, "liver_0", monkeypatch)
    monkeypatch.setattr(Predictor, "foreground", lambda _, image: np.zeros((2, *image.shape), np.float32))
    result = predict_file(tiny_world.raw / "imagesTr" / "liver_0.nii.gz", tmp_path, predictor)
    assert not result.found
    assert "no liver found" in result.line()
    assert not np.asarray(nib.Nifti1Image.from_filename(result.label).dataobj).any()


def test_a_label_never_overwrites_its_image(tiny_world: TinyWorld, tiny_run: Path) -> None:
    image = tiny_world.raw / "imagesTr" / "liver_0.nii.gz"
    before = image.read_bytes()
    with pytest.raises(OutputError, match="was not written by liverseg predict"):
        predict_file(image, image.parent, load_predictor(tiny_run, device="cpu"))
    assert image.read_bytes() == before


def test_flips_and_permutations_of_the_file_give_the_same_segmentation(
    tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path
) -> None:
    predictor = load_predictor(tiny_run, device="cpu")
    path = tiny_world.raw / "imagesTr" / "liver_1.nii.gz"
    image = nib.Nifti1Image.from_filename(path)
    expected = predict_file(path, tmp_path / "out", predictor)
    canonical = np.asarray(nib.as_closest_canonical(nib.Nifti1Image.from_filename(expected.label)).dataobj)
    for axes in ("LPS", "SAR", "IRP"):
        turned = image.as_reoriented(
            nib.orientations.ornt_transform(
                nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes)
            )
        )
        nib.save(turned, tmp_path / f"{axes}.nii.gz")
        result = predict_file(tmp_path / f"{axes}.nii.gz", tmp_path / "out", predictor)
        label = nib.Nifti1Image.from_filename(result.label)
        assert nib.aff2axcodes(label.affine) == tuple(axes)
        same = np.asarray(nib.as_closest_canonical(label).dataobj)
        assert np.mean(same != canonical) < 1e-4  # sums in another order may tip a voxel


def test_segment_runs_from_the_run_folder(tiny_world: TinyWorld, tiny_run: Path) -> None:
    predictor = load_predictor(tiny_run, device="cpu")
    assert predictor.spec == SPEC
    scan = read_scan(tiny_world.raw / "imagesTr" / "liver_2.nii.gz", SPEC)
    found = segment(scan, predictor)
    assert found.foreground_czyx.shape == (2, *SPEC.shape_zyx)
    assert found.box is None or found.box.stop_zyx[0] <= 40


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such checkpoint"):
        load_predictor(tmp_path)
    with pytest.raises(RunError, match="no such file or folder"):
        load_predictor(tmp_path / "none")


# ---- evaluation


def test_only_cases_that_were_never_trained_on_are_scored(tiny_world: TinyWorld, tiny_run: Path) -> None:
    store, split = tiny_world.store, load_split(tiny_run)
    chosen, unseen = choose_cases(store, split, ())
    assert set(chosen) == set(split.val)
    assert unseen
    assert choose_cases(store, split, split.train[:1]) == (split.train[:1], False)
    everything = tuple(store.meta(i).image.sha256 for i in store.case_ids)
    assert choose_cases(store, replace(split, train_sha256=everything), ()) == (store.case_ids, False)
    # A run of an earlier version knows its images by their files alone.
    assert choose_cases(store, replace(split, train_voxels=()), ()) == (chosen, True)
    with pytest.raises(ConfigError, match="liver_99"):
        choose_cases(store, split, ("liver_99",))
    # Named twice, a case would count twice in every mean, and narrow its interval.
    assert choose_cases(store, split, (*split.val, *split.val)) == (split.val, True)


@pytest.mark.parametrize("how", ["unzipped", "zipped anew", "turned", "other header"])
def test_a_scan_is_known_again_in_another_file(
    tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path, how: str
) -> None:
    split = load_split(tiny_run)
    trained, unseen = split.train[0], split.val[0]
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / "raw" / folder).mkdir(parents=True)
        for case_id in (trained, unseen):
            image = nib.Nifti1Image.from_filename(tiny_world.raw / folder / f"{case_id}.nii.gz")
            if how == "turned":
                wanted = nib.orientations.axcodes2ornt(
                    "LAS" if nib.aff2axcodes(image.affine)[0] == "R" else "RAS"
                )
                image = image.as_reoriented(
                    nib.orientations.ornt_transform(nib.io_orientation(image.affine), wanted)
                )
            if how == "other header":
                image.header["descrip"] = b"anonymized"
            ending = "nii" if how == "unzipped" else "nii.gz"
            nib.save(image, tmp_path / "raw" / folder / f"new_{case_id}.{ending}")
    write_listing(tmp_path / "raw", [f"new_{trained}", f"new_{unseen}"])
    build(read_data_set(tmp_path / "raw"), tmp_path / "c.zarr", SPEC, jobs=1, report=lambda _: None)
    store = CacheStore.open(tmp_path / "c.zarr")
    files = {store.meta(i).image.sha256 for i in store.case_ids}
    assert files.isdisjoint(split.train_sha256)
    assert choose_cases(store, split, ()) == ((f"new_{unseen}",), True)


def test_evaluation_writes_scores_summary_and_overlays(
    tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path
) -> None:
    store, split = tiny_world.store, load_split(tiny_run)
    told: list[str] = []
    scored = evaluate(
        load_predictor(tiny_run, device="cpu"),
        store,
        split,
        case_ids=split.val,
        raw=tiny_world.raw,
        out=tmp_path,
        report=lambda case_id, _: told.append(case_id),
    )
    assert told == list(split.val)
    rows = list(csv.DictReader((tmp_path / "scores.csv").read_text().splitlines()))
    assert [row["case"] for row in rows] == list(split.val)
    summary = json.loads((tmp_path / "summary.json").read_text())
    mean = np.mean([float(row["liver_dice"]) for row in rows])
    assert summary["liver"]["dice"]["mean"] == pytest.approx(mean)
    assert summary["trained_on"] == []
    weights = load_checkpoint(tiny_run / "best.pt")["average"]
    assert summary["weights_sha256"] == [content_checksum(weights)]  # which export asks for
    for e, row in zip(scored, rows, strict=True):
        assert e.ceiling is not None
        assert float(row["liver_dice_grid_ceiling"]) == e.ceiling.liver.dice > 0.97
        assert (tmp_path / "overlays" / f"{e.case_id}.png").read_bytes().startswith(b"\x89PNG")


def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The raw files that are opened from now on, in order."""
    paths: list[Path] = []
    original = VolumeStream.__init__

    def remember(self: VolumeStream, header: VolumeHeader, *rest: Any, **options: Any) -> None:
        paths.append(header.path)
        original(self, header, *rest, **options)

    monkeypatch.setattr(VolumeStream, "__init__", remember)
    return paths


def test_each_raw_file_is_opened_once(
    tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = opened(monkeypatch)
    case_id, predictor = "liver_0", load_predictor(tiny_run, device="cpu")
    found = evaluate_case(case_id, predictor, tiny_world.store, raw=tiny_world.raw, trained_on=False)
    assert sorted(paths) == [
        tiny_world.raw / folder / f"{case_id}.nii.gz" for folder in ("imagesTr", "labelsTr")
    ]
    assert not list(tmp_path.iterdir())
    expected, _ = read_canonical(tiny_world.raw / "imagesTr" / f"{case_id}.nii.gz")
    np.testing.assert_array_equal(found.image_zyx, expected)


@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr"])
def test_another_scan_of_equal_shape_is_refused(
    tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path, folder: str
) -> None:
    raw = Path(shutil.copytree(tiny_world.raw, tmp_path / "raw"))
    shutil.copy(raw / folder / "liver_1.nii.gz", raw / folder / "liver_0.nii.gz")
    predictor = load_predictor(tiny_run, device="cpu")
    with pytest.raises(
        CacheError, match=rf"{folder}/liver_0\.nii\.gz: not the file that the case was built from"
    ):
        evaluate_case("liver_0", predictor, tiny_world.store, raw=raw, trained_on=False)


def test_validation_refuses_another_label_of_equal_shape(tiny_world: TinyWorld, tmp_path: Path) -> None:
    raw = Path(shutil.copytree(tiny_world.raw, tmp_path / "raw"))
    shutil.copy(raw / "labelsTr" / "liver_1.nii.gz", raw / "labelsTr" / "liver_0.nii.gz")
    meta = tiny_world.store.meta("liver_0")
    with pytest.raises(CacheError, match="not the file that the case was built from"):
        native_dice(np.zeros((2, *SPEC.shape_zyx), np.float32), meta, view="liver", raw=raw)


def test_the_ceiling_is_what_a_perfect_network_scores(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = oracle_predictor(tiny_world, "liver_1", monkeypatch)
    split = Split(train=("x",), val=("liver_1",), train_sha256=("0",))
    (scored,) = evaluate(
        predictor,
        tiny_world.store,
        split,
        case_ids=["liver_1"],
        raw=tiny_world.raw,
        out=tmp_path,
        report=lambda *_: None,
    )
    assert scored.ceiling is not None
    assert scored.predicted.liver.dice == pytest.approx(scored.ceiling.liver.dice, abs=0.01)


def test_the_label_s_crop_differs_by_the_crop_alone(
    tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tumour that is nowhere sure is left out of both; so it is where samples are averaged."""
    predictor = oracle_predictor(tiny_world, "liver_1", monkeypatch)
    known = Predictor.foreground

    def unsure(of: Predictor, image_zyx: NDArray[np.int16]) -> NDArray[np.float32]:
        whole = known(of, image_zyx).sum(axis=0)
        return np.stack([0.35 * whole, 0.65 * whole])

    def draw(of: Predictor, image_zyx: NDArray[np.int16]) -> NDArray[np.float32]:
        return np.stack([unsure(of, image_zyx)] * 2)

    monkeypatch.setattr(Predictor, "foreground", unsure)
    monkeypatch.setattr(Predictor, "draw", draw)
    for samples in (0, 2):
        scores = evaluate_case(
            "liver_1",
            replace(predictor, samples=samples),
            tiny_world.store,
            raw=tiny_world.raw,
            trained_on=False,
        ).scores
        assert scores.label_crop is not None
        assert scores.predicted.tumour.volume_pred_ml == scores.label_crop.tumour.predicted == 0
        assert scores.label_crop.liver.predicted > 0


def test_a_case_that_fails_does_not_stop_the_others(
    tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path
) -> None:
    split = load_split(tiny_run)
    raw = tmp_path / "raw"
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True)
        for case_id in split.val[1:]:
            source = tiny_world.raw / folder / f"{case_id}.nii.gz"
            (raw / folder / source.name).write_bytes(source.read_bytes())
    told: dict[str, CaseEvaluation | Exception] = {}
    scored = evaluate(
        load_predictor(tiny_run, device="cpu"),
        tiny_world.store,
        split,
        case_ids=split.val,
        raw=raw,
        out=tmp_path / "out",
        report=told.__setitem__,
    )
    assert isinstance(told[split.val[0]], VolumeError)
    assert [e.case_id for e in scored] == list(split.val[1:])


def test_a_case_that_fails_for_no_reason_we_know_does_not_stop_the_others(
    tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = load_predictor(tiny_run, device="cpu")
    from liverseg.evaluation.case import evaluate_case

    def fail_once(case_id: str, *arguments: object, **options: object) -> object:
        if case_id == "liver_0":
            raise KeyError("oops")
        return evaluate_case(case_id, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("liverseg.evaluation.evaluate.evaluate_case", fail_once)
    told: dict[str, CaseEvaluation | Exception] = {}
    scored = evaluate(
        predictor,
        tiny_world.store,
        Split(train=("x",), val=("liver_0", "liver_1"), train_sha256=("0",)),
        case_ids=["liver_0", "liver_1"],
        raw=tiny_world.raw,
        out=tmp_path,
        report=told.__setitem__,
    )
    assert isinstance(told["liver_0"], KeyError)
    assert [e.case_id for e in scored] == ["liver_1"]


def test_a_store_of_another_spec_is_refused(tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path) -> None:
    predictor = replace(load_predictor(tiny_run, device="cpu"), spec=replace(SPEC, margin_fraction=0.1))
    with pytest.raises(CacheError, match="another spec"):
        evaluate(
            predictor,
            tiny_world.store,
            load_split(tiny_run),
            case_ids=["liver_0"],
            raw=tiny_world.raw,
            out=tmp_path,
            report=lambda *_: None,
        )


def test_summary_means_are_over_cases_that_have_the_class(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = oracle_predictor(tiny_world, "liver_1", monkeypatch)
    split = Split(train=("x",), val=("liver_1",), train_sha256=("0",))
    (one,) = evaluate(
        predictor, tiny_world.store, split, case_ids=["liver_1"], raw=tiny_world.raw, out=tmp_path,
        report=lambda *_: None,
    )  # fmt: skip
    without = replace(
        one,
        predicted=replace(
            one.predicted,
            overlap=replace(
                one.predicted.overlap, tumour=replace(one.predicted.tumour, volume_truth_ml=0.0, dice=1.0)
            ),
        ),
    )
    summary = summarise([one, without])
    assert summary["n_cases"] == 2
    assert summary["tumour"]["n_cases_with_it"] == int(one.predicted.tumour.volume_truth_ml > 0)
    assert summary["liver"]["n_cases_with_it"] == 2
