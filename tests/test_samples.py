"""``predict --samples`` and ``evaluate --samples``: maps, doubts and trust, from files to files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from scipy import ndimage
from tiny import SILENT, TinyWorld, tiny_config

import liverseg
from data_cache.errors import CacheError, ConfigError
from data_cache.geometry import DepthWindow, resampled_grid
from liverseg.cli import main
from liverseg.evaluation.evaluate import evaluate
from liverseg.evaluation.scoring import score_labels
from liverseg.evaluation.trust import NEAR_MM, NativeCase, judge_case, near_liver, risk_of
from liverseg.evaluation.trust_calibration import calibrate, calibrate_apart
from liverseg.inference.segment import Predictor, keep_liver, load_predictor, segment
from liverseg.inference.uncertainty import MOST_ENTROPY, entropy, mutual_information
from liverseg.inference.uncertainty_files import find_doubts, native_volumes_ml
from liverseg.model.losses import LossConfig
from liverseg.training.split import Split, load_split, together
from liverseg.training.train import train
from pipeline.nifti import read_canonical, to_canonical
from pipeline.prepare import read_scan
from pipeline.restore import native_labels, native_values

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    return lambda *arguments: CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="session")
def ssn_run(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``tiny_run``, and with a distribution over its logits."""
    folder = tmp_path_factory.mktemp("ssn_run") / "run"
    base = tiny_config(epochs=6, steps=20)
    model = replace(base.model, stochastic="ssn", rank=3, dropout=0.0)
    config = replace(base, model=model, loss=LossConfig(name="dice_cross_entropy", likelihood_samples=4))
    train(tiny_world.store, folder, config, resume=False, watcher=SILENT)
    return folder


@pytest.fixture
def image(tiny_world: TinyWorld) -> Path:
    return tiny_world.raw / "imagesTr" / "liver_0.nii.gz"


def voxels(path: Path) -> NDArray[Any]:
    return np.asarray(nib.Nifti1Image.from_filename(path).dataobj)


# ---- drawing


def test_samples_of_a_scan_are_the_same_every_time_and_their_mean_is_the_answer(
    ssn_run: Path, image: Path
) -> None:
    predictor = load_predictor(ssn_run, device="cpu", samples=5)
    thin = read_scan(image, predictor.spec)
    found, again = segment(thin, predictor), segment(thin, predictor)
    assert found.window is not None
    assert found.samples_nczyx is not None
    assert again.samples_nczyx is not None
    np.testing.assert_array_equal(found.samples_nczyx, again.samples_nczyx)
    assert found.samples_nczyx.shape == (5, 2, *predictor.spec.shape_zyx)
    assert not np.array_equal(found.samples_nczyx[0], found.samples_nczyx[1])
    grid = resampled_grid(thin.header.grid, found.window, predictor.spec.shape_zyx)
    mean = keep_liver(found.samples_nczyx.mean(axis=0), voxel_volume_ml=grid.voxel_volume_ml)
    np.testing.assert_array_equal(found.foreground_czyx, mean)


def test_one_sample_of_a_network_that_is_not_stochastic_is_its_answer(tiny_run: Path, image: Path) -> None:
    predictor = load_predictor(tiny_run, device="cpu", samples=7)
    assert predictor.n_drawn == 1
    thin = read_scan(image, predictor.spec)
    plain = segment(thin, replace(predictor, samples=0))
    np.testing.assert_array_equal(segment(thin, predictor).foreground_czyx, plain.foreground_czyx)
    assert plain.samples_nczyx is None


def test_members_of_an_ensemble_are_its_samples(tiny_run: Path, ssn_run: Path, image: Path) -> None:
    both = load_predictor(tiny_run, ssn_run, device="cpu", samples=4)
    # Two of four are dealt to each, and the first gives one.
    assert both.n_drawn == 3
    view = read_scan(image, both.spec)
    picture = view.view(view.scan_window, both.spec).image_zyx
    drawn = both.draw(picture)
    assert len(drawn) == 3
    alone = load_predictor(tiny_run, device="cpu").foreground(picture)
    np.testing.assert_array_equal(drawn[0], alone)


def test_a_scan_without_a_liver_has_samples_of_the_whole_scan(
    ssn_run: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liverseg.inference.segment.NO_LIVER_ML", 1e9)
    predictor = load_predictor(ssn_run, device="cpu", samples=2)
    thin = read_scan(image, predictor.spec)
    found = segment(thin, predictor)
    assert found.window is None
    assert found.samples_nczyx is not None
    doubts = find_doubts(found.samples_nczyx, thin.scan_window, thin.header)
    assert doubts.liver_ml.mean_ml == 0
    assert doubts.lesions == ()


# ---- what predict writes


def test_what_predict_writes_beside_the_label(run: Run, ssn_run: Path, image: Path, tmp_path: Path) -> None:
    result = run("predict", ssn_run, image, "--out", tmp_path, "--samples", 4, "--preview", "--device", "cpu")
    assert result.exit_code == 0, result.output
    names = {p.name.removeprefix("liver_0") for p in tmp_path.iterdir()}
    maps = {"_entropy.nii.gz", "_information.nii.gz", "_tumour.nii.gz"}
    assert names == {".nii.gz", ".png", "_uncertainty.json", "_uncertainty.png", *maps}
    doubts = json.loads((tmp_path / "liver_0_uncertainty.json").read_text())
    assert doubts["samples"] == 4
    assert doubts["liver_ml"]["low_ml"] <= doubts["liver_ml"]["mean_ml"] <= doubts["liver_ml"]["high_ml"]
    assert doubts["liver_ml"]["low_ml"] < doubts["liver_ml"]["high_ml"]
    assert f"uncertainty {doubts['case_uncertainty']:.3f}" in result.output.replace("\n", " ")
    for name in maps:
        read = nib.Nifti1Image.from_filename(tmp_path / f"liver_0{name}")
        np.testing.assert_array_equal(read.affine, nib.Nifti1Image.from_filename(image).affine)
        assert read.shape == nib.Nifti1Image.from_filename(image).shape


@pytest.mark.parametrize("file_axes", ["RAS", "LPI"])
def test_maps_are_those_of_the_samples_on_the_scans_grid(
    run: Run, ssn_run: Path, image: Path, tmp_path: Path, file_axes: str
) -> None:
    wanted = nib.orientations.axcodes2ornt(file_axes)
    original = nib.Nifti1Image.from_filename(image)
    turn = nib.orientations.ornt_transform(nib.io_orientation(original.affine), wanted)
    nib.save(original.as_reoriented(turn), tmp_path / "turned.nii.gz")
    result = run("predict", ssn_run, tmp_path / "turned.nii.gz", "--out", tmp_path / "out", "--samples", 3)
    assert result.exit_code == 0, result.output
    predictor = load_predictor(ssn_run, device="cpu", samples=3)
    thin = read_scan(tmp_path / "turned.nii.gz", predictor.spec)
    found = segment(thin, predictor)
    assert found.samples_nczyx is not None
    assert found.window is not None
    mean = found.samples_nczyx.mean(axis=0)
    expected = {
        "entropy": entropy(mean),
        "information": mutual_information(found.samples_nczyx),
        "tumour": mean[1],
    }
    for name, values in expected.items():
        native = np.concatenate(list(native_values(values, found.window, thin.header)))
        written = voxels(tmp_path / "out" / f"turned_{name}.nii.gz").transpose(2, 1, 0)
        # A step is 1/255 of the most, and what is below half of one is cut before it is interpolated.
        most = 1.0 if name == "tumour" else MOST_ENTROPY
        np.testing.assert_allclose(written, native, atol=1.01 * most / 255)


def test_native_volumes_are_those_of_the_labels(ssn_run: Path, image: Path) -> None:
    predictor = load_predictor(ssn_run, device="cpu", samples=3)
    thin = read_scan(image, predictor.spec)
    found = segment(thin, predictor)
    assert found.samples_nczyx is not None
    assert found.window is not None
    liver_ml, tumour_ml = native_volumes_ml(found.samples_nczyx, found.window, thin.header)
    for i, sample in enumerate(found.samples_nczyx):
        label = np.concatenate(list(native_labels(sample, found.window, thin.header)))
        voxel_ml = thin.header.grid.voxel_volume_ml
        assert liver_ml[i] == pytest.approx(np.count_nonzero(label) * voxel_ml)
        assert tumour_ml[i] == pytest.approx(np.count_nonzero(label == 2) * voxel_ml)


def test_predict_says_what_cannot_be_drawn(run: Run, tiny_run: Path, image: Path, tmp_path: Path) -> None:
    result = run("predict", tiny_run, image, "--out", tmp_path, "--samples", 8, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "1 of 8 samples: a network that is not stochastic gives one" in result.output
    assert json.loads((tmp_path / "liver_0_uncertainty.json").read_text())["samples"] == 1
    assert not voxels(tmp_path / "liver_0_information.nii.gz").any()
    clash = run("predict", tiny_run, image, "--out", tmp_path, "--samples", 8, "--tta")
    assert clash.exit_code == 2
    assert "--tta and --samples exclude each other" in clash.output


def test_doubts_from_python(run: Run, ssn_run: Path, image: Path, tmp_path: Path) -> None:
    found = liverseg.load(ssn_run, device="cpu", samples=3).segment(image)
    assert found.doubts is not None
    assert found.samples_nczyx is not None
    assert len(found.samples_nczyx) == found.doubts.samples == 3
    result = run("predict", ssn_run, image, "--out", tmp_path, "--samples", 3, "--device", "cpu")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "liver_0_uncertainty.json").read_text())
    assert written["tumour_ml"] == asdict(found.doubts.tumour_ml)
    assert liverseg.load(ssn_run, device="cpu").segment(image).doubts is None


# ---- trust


def native_case(predictor: Predictor, world: TinyWorld, case_id: str) -> NativeCase:
    meta = world.store.meta(case_id)
    assert meta.label is not None
    truth_zyx, header = read_canonical(world.raw / meta.label.path)
    found = segment(read_scan(world.raw / meta.image.path, predictor.spec), predictor)
    assert found.samples_nczyx is not None
    window = found.window or DepthWindow(start=0, stop=meta.grid.shape_zyx[0])
    labels = np.concatenate(list(native_labels(found.foreground_czyx, window, header)))
    return NativeCase(
        samples_nczyx=found.samples_nczyx,
        window=window,
        header=header,
        predicted_zyx=to_canonical(labels, header.axes_kji),
        truth_zyx=truth_zyx.astype(np.uint8),
    )


def on_native(values: NDArray[np.float32], case: NativeCase) -> NDArray[np.float32]:
    blocks = list(native_values(values, case.window, case.header))
    return to_canonical(np.concatenate(blocks), case.header.axes_kji)


@pytest.mark.parametrize("per_block", [1, 1000])
@pytest.mark.parametrize("case_id", ["liver_0", "liver_1"])  # stored LPS and RAS
def test_a_case_is_judged_as_whole_arrays_are(
    ssn_run: Path, tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch, case_id: str, per_block: int
) -> None:
    predictor = load_predictor(ssn_run, device="cpu", samples=3)
    case = native_case(predictor, tiny_world, case_id)
    spacing = case.header.grid.spacing_zyx_mm
    scores = score_labels(case.predicted_zyx, case.truth_zyx, spacing)
    monkeypatch.setattr("pipeline.restore.BLOCK_VOXELS", per_block * 40 * 40)
    trust = judge_case(case_id, case, scores)
    mean = case.samples_nczyx.mean(axis=0)
    liver, tumour = (on_native(channel, case) for channel in mean)
    near = near_liver((case.truth_zyx > 0) | (case.predicted_zyx > 0), spacing)
    for name, p, is_class in (
        ("liver", liver + tumour, case.truth_zyx >= 1),
        ("tumour", tumour, case.truth_zyx == 2),
    ):
        counts = trust.reliability[name]
        assert counts.n_voxels.sum() == near.sum()
        assert counts.n_correct.sum() == is_class[near].sum()
        assert counts.confidence_sum.sum() == pytest.approx(p[near].sum(), rel=1e-4)
    wrong = (case.predicted_zyx != case.truth_zyx)[near]
    assert trust.errors.n_wrong.sum() == wrong.sum()
    h = entropy(np.stack((liver, tumour)))[near]
    pairs = (h[wrong][:, None] > h[~wrong][None, ::7]).mean()
    assert trust.errors.auroc == pytest.approx(float(pairs), abs=0.02)
    grid = resampled_grid(case.header.grid, case.window, mean.shape[1:])
    kept = [keep_liver(s, voxel_volume_ml=grid.voxel_volume_ml) for s in case.samples_nczyx]
    labels = [
        to_canonical(np.concatenate(list(native_labels(s, case.window, case.header))), case.header.axes_kji)
        for s in kept
    ]
    assert trust.pairs.shared_cmm[0, 0, 1] == ((labels[0] > 0) & (labels[1] > 0)).sum()
    assert trust.pairs.shared_cmm[0, 2, -1] == ((labels[2] > 0) & (case.truth_zyx > 0)).sum()
    assert trust.tempered is None
    assert trust.risk == risk_of(scores)


def test_near_the_liver_on_a_brute_force() -> None:
    mask = np.zeros((9, 12, 12), dtype=bool)
    mask[4, 5:7, 6] = True
    spacing = (5.0, 3.0, 2.0)
    inside = np.argwhere(mask) * spacing
    every = np.argwhere(np.ones_like(mask)) * spacing
    distance = np.sqrt(((every[:, None] - inside[None]) ** 2).sum(axis=2)).min(axis=1)
    np.testing.assert_array_equal(near_liver(mask, spacing).ravel(), distance <= NEAR_MM)
    assert not near_liver(np.zeros_like(mask), spacing).any()


def test_risk_counts_the_tumour_where_there_is_any() -> None:
    truth, none = np.zeros((4, 4, 4), dtype=np.uint8), np.zeros((4, 4, 4), dtype=np.uint8)
    truth[:2] = 1
    assert risk_of(score_labels(truth, truth, (1.0, 1.0, 1.0))) == 0
    predicted = truth.copy()
    predicted[0, 0, 0] = 2
    # Liver (label >= 1) is right; the tumour is invented: Dice 1 and 0.
    assert risk_of(score_labels(predicted, truth, (1.0, 1.0, 1.0))) == 0.5
    assert risk_of(score_labels(none, truth, (1.0, 1.0, 1.0))) == 1


def test_calibration_is_fitted_on_cases_that_are_neither_trained_on_nor_scored(
    ssn_run: Path, tiny_world: TinyWorld
) -> None:
    predictor, store = load_predictor(ssn_run, device="cpu", samples=3), tiny_world.store
    split = load_split(ssn_run)
    first, other = split.val
    scored = {store.meta(first).image.sha256}
    calibration = calibrate_apart(predictor, store, split, scored=scored)
    assert calibration.case_ids == (other,)
    assert calibration.temperature is not None
    assert calibration.temperature.nll_after <= calibration.temperature.nll_before
    assert calibration.widening["liver"] is None  # nine cases it would take
    with pytest.raises(ConfigError, match="nothing is left to calibrate on"):
        calibrate_apart(predictor, store, split, scored={store.meta(i).image.sha256 for i in split.val})
    with pytest.raises(CacheError, match="another spec"):
        wrong = replace(predictor, spec=replace(predictor.spec, margin_fraction=0.3))
        calibrate_apart(wrong, store, split, scored=scored)


def test_a_temperature_changes_what_is_counted_after_it_and_nothing_else(
    ssn_run: Path, tiny_world: TinyWorld
) -> None:
    predictor = load_predictor(ssn_run, device="cpu", samples=2)
    case = native_case(predictor, tiny_world, "liver_0")
    scores = score_labels(case.predicted_zyx, case.truth_zyx, case.header.grid.spacing_zyx_mm)
    calibration = calibrate(predictor, tiny_world.store, ["liver_1"])
    assert calibration.temperature is not None
    plain = judge_case("a", case, scores)
    trust = judge_case("a", case, scores, calibration=calibration)
    assert trust.tempered is not None
    np.testing.assert_array_equal(
        plain.reliability["liver"].confidence_sum, trust.reliability["liver"].confidence_sum
    )
    moved = trust.tempered["liver"].confidence_sum - trust.reliability["liver"].confidence_sum
    assert np.abs(moved).sum() > 0


def test_an_ensemble_was_trained_on_what_any_member_was() -> None:
    splits = [Split(train=(str(i),), val=("v",), train_sha256=(f"{i}", "both")) for i in range(2)]
    assert together(splits).train_sha256 == ("0", "both", "1")
    assert together(splits).train == ("0",)


def test_evaluate_writes_what_uncertainty_is_worth(
    run: Run, ssn_run: Path, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    first, second = load_split(ssn_run).val
    command = ("evaluate", ssn_run, tiny_world.cache, "--raw", tiny_world.raw, "--out", tmp_path)
    options = ("--case", first, "--samples", 3, "--calibrate", tiny_world.cache, "--device", "cpu")
    result = run(*command, *options)
    assert result.exit_code == 0, result.output
    assert "entropy finds wrong voxels" in result.output
    summary = json.loads((tmp_path / "uncertainty.json").read_text())
    assert summary["fitted"]["case_ids"] == [second]
    assert summary["calibration"]["liver"]["ece"] >= 0
    assert summary["calibration_tempered"]["liver"]["ece"] >= 0
    (row,) = csv.DictReader((tmp_path / "uncertainty.csv").read_text().splitlines())
    assert row["case"] == first
    assert float(row["liver_low_ml"]) <= float(row["liver_high_ml"])
    for name in ("reliability.png", "risk_coverage.png", f"uncertainty/{first}.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--calibrate", "x"), "--calibrate is of what --samples measures"),
        (("--with", "x", "--samples", 2), "name one RUN"),
    ],
)
def test_evaluate_refuses_what_makes_no_sense(
    run: Run, ssn_run: Path, tiny_run: Path, tiny_world: TinyWorld, arguments: tuple[Any, ...], words: str
) -> None:
    runs = (ssn_run, tiny_run) if "--with" in arguments else (ssn_run,)
    result = run("evaluate", *runs, tiny_world.cache, "--raw", tiny_world.raw, *arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


def test_evaluate_without_samples_writes_none_of_it(
    ssn_run: Path, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    predictor, split = load_predictor(ssn_run, device="cpu"), load_split(ssn_run)
    (done,) = evaluate(
        predictor,
        tiny_world.store,
        split,
        case_ids=split.val[:1],
        raw=tiny_world.raw,
        out=tmp_path,
        report=lambda *_: None,
    )
    assert done.trust is None
    assert not list(tmp_path.glob("uncertainty*"))


def test_uncertainty_is_at_borders_and_not_in_the_air(ssn_run: Path, image: Path) -> None:
    predictor = load_predictor(ssn_run, device="cpu", samples=4)
    thin = read_scan(image, predictor.spec)
    found = segment(thin, predictor)
    assert found.samples_nczyx is not None
    assert found.window is not None
    view = thin.view(found.window, predictor.spec)
    doubt = entropy(found.samples_nczyx.mean(axis=0))
    liver = found.foreground_czyx.sum(axis=0) >= 0.5
    border = ndimage.binary_dilation(liver) & ~ndimage.binary_erosion(liver)
    air = ndimage.minimum_filter(view.image_zyx < -900, size=3)
    assert air.any()
    assert doubt[border].mean() > 5 * doubt[air].mean()
