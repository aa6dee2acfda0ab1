"""``predict --samples`` and ``evaluate --samples``: maps, doubts and trust, from files to files."""

from __future__ import annotations

import csv
import json
import shutil
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
from tiny import SILENT, TinyWorld, change_weights, tiny_config

import liverseg
from data_cache.errors import CacheError, ConfigError, RunError
from data_cache.geometry import Box, resampled_grid
from data_cache.outputs import write_signed_json
from liverseg.cli import main
from liverseg.evaluation.calibrate import _calibration_case, calibrate, calibrate_apart
from liverseg.evaluation.evaluate import evaluate
from liverseg.evaluation.shifted import measure_shifted
from liverseg.evaluation.uncertainty import CaseUncertainty, NativeCase, evaluate_uncertainty, risk_of
from liverseg.evaluation.uncertainty_summary import summarise_uncertainties, uncertainty_row
from liverseg.inference.calibration import Calibration, weight_checksums
from liverseg.inference.model_file import export_model
from liverseg.inference.segment import Predictor, keep_large_components, load_predictor, segment
from liverseg.inference.uncertainty_files import UncertaintySummary, native_volumes_ml, summarise_uncertainty
from liverseg.measure.calibration import ErrorDetection, ReliabilityCounts, TemperatureFit
from liverseg.measure.diversity import PairCounts
from liverseg.measure.near_liver import NEAR_MM, near_liver
from liverseg.measure.summary import score_labels
from liverseg.measure.uncertainty import MAX_ENTROPY, VolumeInterval, entropy, mutual_information
from liverseg.model.losses import LossConfig
from liverseg.pictures.sheet import new_figure, save
from liverseg.training.split import Split, image_identity, load_split, together
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
    assert found.box is not None
    assert found.samples_nczyx is not None
    assert again.samples_nczyx is not None
    np.testing.assert_array_equal(found.samples_nczyx, again.samples_nczyx)
    assert found.samples_nczyx.shape == (5, 2, *predictor.spec.shape_zyx)
    assert not np.array_equal(found.samples_nczyx[0], found.samples_nczyx[1])
    grid = resampled_grid(thin.header.grid, found.box, predictor.spec.shape_zyx)
    mean = keep_large_components(found.samples_nczyx.mean(axis=0), voxel_volume_ml=grid.voxel_volume_ml)
    np.testing.assert_allclose(found.foreground_czyx, mean, atol=3e-7)


def test_a_network_that_gives_the_same_answer_each_time_cannot_be_sampled(tiny_run: Path) -> None:
    with pytest.raises(
        ConfigError, match="cannot be sampled.*model.stochastic=ssn or dropout, or add other runs"
    ):
        load_predictor(tiny_run, device="cpu", samples=7)
    assert load_predictor(tiny_run, tiny_run, device="cpu", samples=2).n_drawn == 2


def test_members_of_an_ensemble_are_its_samples(tiny_run: Path, ssn_run: Path, image: Path) -> None:
    both = load_predictor(tiny_run, ssn_run, device="cpu", samples=4)
    # Two of four from each, so that each weighs a half; the first has but one answer, and gives it twice.
    assert both.n_drawn == 4
    view = read_scan(image, both.spec)
    picture = view.scan_view.image_zyx
    drawn = both.draw(picture)
    alone = load_predictor(tiny_run, device="cpu").foreground(picture)
    np.testing.assert_array_equal(drawn[0], alone)
    np.testing.assert_array_equal(drawn[1], alone)
    assert not np.array_equal(drawn[2], drawn[3])


def test_a_scan_without_a_liver_has_samples_of_the_whole_scan(
    ssn_run: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liverseg.inference.segment.NO_LIVER_ML", 1e9)
    predictor = load_predictor(ssn_run, device="cpu", samples=2)
    thin = read_scan(image, predictor.spec)
    found = segment(thin, predictor)
    assert found.box is None
    assert found.samples_nczyx is not None
    uncertainty = summarise_uncertainty(found.samples_nczyx, thin.scan_box, thin.header)
    assert uncertainty.liver_ml.mean_ml == 0
    assert uncertainty.lesions == ()
    # What is too small for a liver may be sure of itself: the scan is as doubtful as any all the same.
    assert uncertainty.mean_entropy == MAX_ENTROPY
    assert uncertainty.disagreement == 1.0  # two samples that both see nothing agree, and are no comfort


# ---- what predict writes


def test_what_predict_writes_beside_the_label(run: Run, ssn_run: Path, image: Path, tmp_path: Path) -> None:
    result = run("predict", ssn_run, image, "--out", tmp_path, "--samples", 4, "--preview", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert {p.name for p in tmp_path.iterdir()} == {"liver_0.nii.gz", "liver_0.png", "liver_0_uncertainty"}
    folder = tmp_path / "liver_0_uncertainty"
    maps = {"entropy.nii.gz", "information.nii.gz", "tumour.nii.gz"}
    assert {p.name for p in folder.iterdir()} == {"uncertainty.json", "doubts.png", *maps}
    uncertainty = json.loads((folder / "uncertainty.json").read_text())
    assert uncertainty["samples"] == 4
    assert (
        uncertainty["liver_ml"]["low_ml"]
        <= uncertainty["liver_ml"]["mean_ml"]
        <= uncertainty["liver_ml"]["high_ml"]
    )
    assert uncertainty["liver_ml"]["low_ml"] < uncertainty["liver_ml"]["high_ml"]
    words = result.output.replace("\n", " ")
    assert (
        f"disagreement {uncertainty['disagreement']:.3f}, entropy {uncertainty['mean_entropy']:.3f}" in words
    )
    between = [uncertainty[f"{name}_dice_between"] for name in ("liver", "tumour")]
    assert uncertainty["disagreement"] == pytest.approx(1 - sum(between) / 2)
    assert uncertainty["hu_deviation"] > 0
    for name in maps:
        read = nib.Nifti1Image.from_filename(folder / name)
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
    assert found.box is not None
    mean = found.samples_nczyx.mean(axis=0)
    expected = {
        "entropy": entropy(mean),
        "information": mutual_information(found.samples_nczyx),
        "tumour": mean[1],
    }
    for name, values in expected.items():
        native = np.concatenate(list(native_values(values, found.box, thin.header)))
        written = voxels(tmp_path / "out" / "turned_uncertainty" / f"{name}.nii.gz").transpose(2, 1, 0)
        # A step is 1/255 of the most, and what is below half of one is cut before it is interpolated.
        most = 1.0 if name == "tumour" else MAX_ENTROPY
        np.testing.assert_allclose(written, native, atol=1.01 * most / 255)


def test_native_volumes_are_those_of_the_labels(ssn_run: Path, image: Path) -> None:
    predictor = load_predictor(ssn_run, device="cpu", samples=3)
    thin = read_scan(image, predictor.spec)
    found = segment(thin, predictor)
    assert found.samples_nczyx is not None
    assert found.box is not None
    liver_ml, tumour_ml = native_volumes_ml(found.samples_nczyx, found.box, thin.header)
    for i, sample in enumerate(found.samples_nczyx):
        label = np.concatenate(list(native_labels(sample, found.box, thin.header)))
        voxel_ml = thin.header.grid.voxel_volume_ml
        assert liver_ml[i] == pytest.approx(np.count_nonzero(label) * voxel_ml)
        assert tumour_ml[i] == pytest.approx(np.count_nonzero(label == 2) * voxel_ml)


def test_predict_says_what_cannot_be_drawn(run: Run, tiny_run: Path, image: Path, tmp_path: Path) -> None:
    result = run("predict", tiny_run, image, "--out", tmp_path, "--samples", 8, "--device", "cpu")
    assert result.exit_code == 1
    assert "cannot be sampled" in result.output
    assert not any(tmp_path.iterdir())
    other = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    both = ("predict", tiny_run, "--with", other, image, "--out", tmp_path, "--samples", 8, "--device", "cpu")
    twice = run(*both)
    assert twice.exit_code == 1
    assert "the same network as" in twice.output.replace("\n", " ")
    change_weights(other)
    result = run(*both)
    assert result.exit_code == 0, result.output
    assert "2 of the 8 samples asked for were drawn" in " ".join(result.output.split())
    assert json.loads((tmp_path / "liver_0_uncertainty" / "uncertainty.json").read_text())["samples"] == 2
    clash = run("predict", tiny_run, image, "--out", tmp_path, "--samples", 8, "--tta")
    assert clash.exit_code == 2
    assert "--tta and --samples exclude each other" in clash.output


def test_doubts_from_python(run: Run, ssn_run: Path, image: Path, tmp_path: Path) -> None:
    found = liverseg.load(ssn_run, device="cpu", samples=3).segment(image)
    assert found.uncertainty is not None
    assert found.samples_nczyx is not None
    assert len(found.samples_nczyx) == found.uncertainty.samples == 3
    result = run("predict", ssn_run, image, "--out", tmp_path, "--samples", 3, "--device", "cpu")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "liver_0_uncertainty" / "uncertainty.json").read_text())
    assert written["tumour_ml"] == asdict(found.uncertainty.tumour_ml)
    assert liverseg.load(ssn_run, device="cpu").segment(image).uncertainty is None


# ---- trust


def native_case(predictor: Predictor, world: TinyWorld, case_id: str) -> NativeCase:
    meta = world.store.meta(case_id)
    assert meta.label is not None
    truth_zyx, header = read_canonical(world.raw / meta.label.path)
    found = segment(read_scan(world.raw / meta.image.path, predictor.spec), predictor)
    assert found.samples_nczyx is not None
    box = found.box or Box.whole(meta.grid.shape_zyx)
    labels = np.concatenate(list(native_labels(found.foreground_czyx, box, header)))
    return NativeCase(
        samples_nczyx=found.samples_nczyx,
        box=box,
        header=header,
        predicted_zyx=to_canonical(labels, header.axes_kji),
        truth_zyx=truth_zyx.astype(np.uint8),
    )


def summary_of(case: NativeCase) -> UncertaintySummary:
    return summarise_uncertainty(case.samples_nczyx, case.box, case.header)


def on_native(values: NDArray[np.float32], case: NativeCase) -> NDArray[np.float32]:
    blocks = list(native_values(values, case.box, case.header))
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
    uncertainty = evaluate_uncertainty(case_id, case, scores, summary=summary_of(case))
    mean = case.samples_nczyx.mean(axis=0)
    liver, tumour = (on_native(channel, case) for channel in mean)
    near = near_liver((case.truth_zyx > 0) | (case.predicted_zyx > 0), spacing)
    for name, p, is_class in (
        ("liver", liver + tumour, case.truth_zyx >= 1),
        ("tumour", tumour, case.truth_zyx == 2),
    ):
        counts = uncertainty.reliability[name]
        assert counts.n_voxels.sum() == near.sum()
        assert counts.n_correct.sum() == is_class[near].sum()
        assert counts.confidence_sum.sum() == pytest.approx(p[near].sum(), rel=1e-4)
    wrong = (case.predicted_zyx != case.truth_zyx)[near]
    assert uncertainty.errors.n_wrong.sum() == wrong.sum()
    h = entropy(np.stack((liver, tumour)))[near]
    pairs = (h[wrong][:, None] > h[~wrong][None, ::7]).mean()
    assert uncertainty.errors.auroc == pytest.approx(float(pairs), abs=0.02)
    grid = resampled_grid(case.header.grid, case.box, mean.shape[1:])
    kept = [keep_large_components(s, voxel_volume_ml=grid.voxel_volume_ml) for s in case.samples_nczyx]
    labels = [
        to_canonical(np.concatenate(list(native_labels(s, case.box, case.header))), case.header.axes_kji)
        for s in kept
    ]
    assert uncertainty.pairs.shared_cmm[0, 0, 1] == ((labels[0] > 0) & (labels[1] > 0)).sum()
    assert uncertainty.pairs.shared_cmm[0, 2, -1] == ((labels[2] > 0) & (case.truth_zyx > 0)).sum()
    assert uncertainty.tempered is None
    assert uncertainty.risk == risk_of(scores)


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
    # Liver (label >= 1) is right; the tumour is a false positive: Dice 1 and 0.
    assert risk_of(score_labels(predicted, truth, (1.0, 1.0, 1.0))) == 0.5
    assert risk_of(score_labels(none, truth, (1.0, 1.0, 1.0))) == 1


def test_calibration_is_fitted_on_cases_that_are_neither_trained_on_nor_scored(
    ssn_run: Path, tiny_world: TinyWorld
) -> None:
    predictor, store = load_predictor(ssn_run, device="cpu", samples=3), tiny_world.store
    split = load_split(ssn_run)
    first, other = split.val
    scored = image_identity(store, first)
    calibration = calibrate_apart(predictor, store, split, raw=tiny_world.raw, scored=scored)
    assert calibration.case_ids == (other,)
    assert calibration.temperature is None  # of one case there is none to leave out
    assert calibration.widening["liver"] is None  # nine cases it would take
    with pytest.raises(ConfigError, match="nothing is left to calibrate on"):
        calibrate_apart(
            predictor,
            store,
            split,
            raw=tiny_world.raw,
            scored=frozenset().union(*(image_identity(store, i) for i in split.val)),
        )
    with pytest.raises(CacheError, match="another spec"):
        wrong = replace(predictor, spec=replace(predictor.spec, margin_fraction=0.3))
        calibrate_apart(wrong, store, split, raw=tiny_world.raw, scored=scored)


def test_a_temperature_changes_what_is_counted_after_it_and_nothing_else(
    ssn_run: Path, tiny_world: TinyWorld
) -> None:
    predictor = load_predictor(ssn_run, device="cpu", samples=2)
    case = native_case(predictor, tiny_world, "liver_0")
    scores = score_labels(case.predicted_zyx, case.truth_zyx, case.header.grid.spacing_zyx_mm)
    calibration = replace(
        calibrate(predictor, tiny_world.store, ["liver_1"], raw=tiny_world.raw),
        temperature=TemperatureFit(temperature=2.0, nll_before=1.0, nll_after=0.5, n_voxels=10),
    )
    plain = evaluate_uncertainty("a", case, scores, summary=summary_of(case))
    uncertainty = evaluate_uncertainty("a", case, scores, summary=plain.uncertainty, calibration=calibration)
    assert uncertainty.tempered is not None
    np.testing.assert_array_equal(
        plain.reliability["liver"].confidence_sum, uncertainty.reliability["liver"].confidence_sum
    )
    moved = uncertainty.tempered["liver"].confidence_sum - uncertainty.reliability["liver"].confidence_sum
    assert np.abs(moved).sum() > 0


def test_an_ensemble_was_trained_on_what_any_member_was() -> None:
    splits = [
        Split(train=(str(i),), val=("v",), train_sha256=(f"{i}", "both"), train_voxels=(f"v{i}", "vb"))
        for i in range(2)
    ]
    assert together(splits).train_sha256 == ("0", "both", "1")
    assert together(splits).train_voxels == ("v0", "vb", "v1")
    assert together(splits).train == ("0",)


def test_evaluate_writes_what_uncertainty_is_worth(
    run: Run, ssn_run: Path, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    first, second = load_split(ssn_run).val
    command = ("evaluate", tiny_world.cache, ssn_run, "--raw", tiny_world.raw, "--out", tmp_path)
    options: tuple[Any, ...] = (
        "--case",
        first,
        "--samples",
        3,
        "--calibrate",
        tiny_world.cache,
        tiny_world.raw,
        "--device",
        "cpu",
    )
    options += ("--shifted", tiny_world.cache, tiny_world.raw)
    result = run(*command, *options)
    assert result.exit_code == 0, result.output
    assert "entropy of wrong voxels against right ones" in result.output
    summary = json.loads((tmp_path / "uncertainty.json").read_text())
    assert summary["fitted"]["case_ids"] == [second]
    assert "AUROC, shifted" in result.output
    assert summary["n_shifted"] == len(tiny_world.store.case_ids)
    for name in ("disagreement", "mean_entropy", "hu_deviation"):
        assert 0 <= summary["case_numbers"][name]["shifted_auroc"] <= 1
    shifted = list(csv.DictReader((tmp_path / "uncertainty_shifted.csv").read_text().splitlines()))
    assert [row["case"] for row in shifted] == list(tiny_world.store.case_ids)
    assert all(float(row["disagreement"]) >= 0 for row in shifted)
    assert summary["calibration"]["liver"]["ece"] >= 0
    written = Calibration.load(tmp_path / "calibration.json", load_predictor(ssn_run, device="cpu"))
    assert written.case_ids == (second,)
    (row,) = csv.DictReader((tmp_path / "uncertainty.csv").read_text().splitlines())
    assert row["case"] == first
    assert float(row["liver_low_ml"]) <= float(row["liver_high_ml"])
    for name in ("reliability.png", "risk_coverage.png", f"uncertainty/{first}.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    # The same once more without shifted scans: none may stay beside its scores.
    assert run(*command, "--case", first, "--samples", 2, "--device", "cpu").exit_code == 0
    assert not (tmp_path / "uncertainty_shifted.csv").exists()


def test_a_case_that_cannot_be_calibrated_on_or_shifted_costs_itself_and_the_exit_code(
    run: Run, ssn_run: Path, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    first, second = load_split(ssn_run).val
    raw = shutil.copytree(tiny_world.raw, tmp_path / "raw")
    image = raw / tiny_world.store.meta(second).image.path
    image.write_bytes(image.read_bytes()[:-100] + bytes(100))
    command = ("--json", "evaluate", tiny_world.cache, ssn_run, "--raw", tiny_world.raw, "--case", first)
    options = ("--out", tmp_path / "out", "--samples", 2, "--device", "cpu")
    others = ("--calibrate", tiny_world.cache, raw, "--shifted", tiny_world.cache, raw)
    result = run(*command, *options, *others)
    assert result.exit_code == 1, result.output
    told = json.loads(result.stdout)
    assert not told["complete"]
    assert list(told["calibrate_failed"]) == list(told["shifted_failed"]) == [second]
    assert told["failed"] == {}
    assert told["uncertainty"]["n_shifted"] == len(tiny_world.store.case_ids) - 1


def test_a_failure_that_nobody_foresaw_does_not_end_a_calibration(
    ssn_run: Path, tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor, store = load_predictor(ssn_run, device="cpu", samples=2), tiny_world.store
    calibrated: dict[str, Exception | None] = {}
    shifted: dict[str, object] = {}
    for module in ("calibrate", "shifted"):
        monkeypatch.setattr(f"liverseg.evaluation.{module}.segment", lambda *_: [][0])
    found = calibrate(predictor, store, store.case_ids[:2], raw=tiny_world.raw, report=calibrated.__setitem__)
    assert found.case_ids == ()
    assert measure_shifted(predictor, store, raw=tiny_world.raw, report=shifted.__setitem__) == {}
    assert all(isinstance(failure, IndexError) for failure in (*calibrated.values(), *shifted.values()))
    assert (len(calibrated), len(shifted)) == (2, len(store.case_ids))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--calibrate", "x", "y"), "--calibrate needs samples"),
        (("--shifted", "x", "y"), "--shifted needs samples"),
        (("--with", "x", "--samples", 2), "evaluate takes one RUN, got 2"),
    ],
)
def test_evaluate_refuses_what_makes_no_sense(
    run: Run, ssn_run: Path, tiny_run: Path, tiny_world: TinyWorld, arguments: tuple[Any, ...], words: str
) -> None:
    runs = (ssn_run, tiny_run) if "--with" in arguments else (ssn_run,)
    result = run("evaluate", tiny_world.cache, *runs, "--raw", tiny_world.raw, *arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


def test_evaluate_without_samples_writes_none_of_it_and_leaves_none(
    ssn_run: Path, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    (tmp_path / "uncertainty").mkdir()
    write_signed_json(tmp_path / "uncertainty.json", {}, command="evaluate")
    (tmp_path / "uncertainty.csv").write_text("case,disagreement,mean_entropy,hu_deviation,risk\n")
    for name in ("reliability.png", "uncertainty/liver_9.png"):
        save(new_figure("", width_in=2, height_in=2), tmp_path / name, command="evaluate")
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
    assert done.uncertainty is None
    assert not list(tmp_path.glob("uncertainty.*"))
    assert not list(tmp_path.glob("uncertainty/*"))
    assert not list(tmp_path.glob("reliability.png"))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["models"], summary["samples"]) == ([str(ssn_run)], 0)


def test_uncertainty_is_at_borders_and_not_in_the_air(ssn_run: Path, image: Path) -> None:
    predictor = load_predictor(ssn_run, device="cpu", samples=4)
    thin = read_scan(image, predictor.spec)
    found = segment(thin, predictor)
    assert found.samples_nczyx is not None
    assert found.box is not None
    view = thin.view(found.box)
    doubt = entropy(found.samples_nczyx.mean(axis=0))
    liver = found.foreground_czyx.sum(axis=0) >= 0.5
    border = ndimage.binary_dilation(liver) & ~ndimage.binary_erosion(liver)
    air = ndimage.minimum_filter(view.image_zyx < -900, size=3)
    assert air.any()
    assert doubt[border].mean() > 2 * doubt[air].mean()  # of a network of seconds


# ---- all cases, by hand


def hand_case(
    case_id: str, *, uncertainty: float, risk: float, interval: tuple[float, float], truth_ml: float
) -> CaseUncertainty:
    """Liver and tumour volumes of the mean of ``interval``, a sixth of it for a standard deviation."""
    low, high = interval
    volume = VolumeInterval(mean_ml=(low + high) / 2, sd_ml=(high - low) / 6, low_ml=low, high_ml=high)
    voxels_zyx = np.array([[[0.2, 0.9]]], dtype=np.float32)
    counts = ReliabilityCounts.from_block(voxels_zyx, voxels_zyx > 0.5)
    return CaseUncertainty(
        case_id=case_id,
        uncertainty=UncertaintySummary(
            samples=2,
            disagreement=uncertainty,
            liver_dice_between=1 - uncertainty,
            tumour_dice_between=1 - uncertainty,
            mean_entropy=1 - uncertainty,
            hu_deviation=None,
            liver_ml=volume,
            tumour_ml=volume,
            lesions=(),
        ),
        risk=risk,
        reliability={"liver": counts, "tumour": counts},
        tempered=None,
        errors=ErrorDetection.from_block(voxels_zyx, voxels_zyx < 0.5),
        pairs=PairCounts.from_block(np.ones((2, 1, 1, 2), np.uint8), np.ones((1, 1, 2), np.uint8)),
        truth_ml={"liver": truth_ml, "tumour": 0.0},
    )


def test_a_summary_of_three_cases_by_hand() -> None:
    cases = [
        hand_case("a", uncertainty=0.1, risk=0.0, interval=(90, 102), truth_ml=100),  # inside
        hand_case("b", uncertainty=0.2, risk=0.1, interval=(90, 102), truth_ml=104),  # 8 from 96: 4 sd
        hand_case("c", uncertainty=0.3, risk=0.5, interval=(90, 102), truth_ml=130),  # 34 from 96: 17 sd
    ]
    calibration = Calibration(
        case_ids=("v",),
        spec_fingerprint="s",
        sources=("r",),
        weights=("w",),
        temperature=None,
        widening={"liver": 5.0, "tumour": None},
    )
    summary = summarise_uncertainties(cases, calibration)
    # The more doubtful, the lower the Dice: against the Dice, and not against the risk.
    numbers = summary["case_numbers"]
    assert numbers["disagreement"]["spearman"]["rho"] == pytest.approx(-1)
    assert numbers["mean_entropy"]["spearman"]["rho"] == pytest.approx(1)
    assert numbers["hu_deviation"] is None
    covered = summary["volume_intervals"]["liver"]
    assert (covered["samples"]["n_covered"], covered["widened"]["n_covered"]) == (1, 2)
    # No case has a tumour: none of them counts, and nothing was fitted.
    assert summary["volume_intervals"]["tumour"]["samples"]["n_cases"] == 0
    assert summary["volume_intervals"]["tumour"]["widened"] is None
    # Selective risks 0, 0.05, 0.2 in the best order that there is.
    assert numbers["disagreement"]["aurc"] == pytest.approx(0.25 / 3)
    assert numbers["disagreement"]["excess_aurc"] == pytest.approx(0)
    # Shifted scans of disagreement 0.25 and 0.4 against 0.1, 0.2 and 0.3: 2 + 3 of 6 pairs.
    assert numbers["disagreement"]["shifted_auroc"] is None
    shifted = {
        name: replace(cases[0].uncertainty, disagreement=value) for name, value in (("x", 0.25), ("y", 0.4))
    }
    judged = summarise_uncertainties(cases, calibration, shifted)
    assert judged["case_numbers"]["disagreement"]["shifted_auroc"] == pytest.approx(5 / 6)
    assert judged["n_shifted"] == 2
    # |0.2 - 0| and |0.9 - 1|, one voxel each: 0.15.
    assert summary["calibration"]["liver"]["ece"] == pytest.approx(0.15)
    assert summary["ged_iou"]["mean"] == 0
    assert [row["case"] for row in map(uncertainty_row, cases)] == ["a", "b", "c"]


def test_a_calibration_case_is_measured_on_its_own_grid(ssn_run: Path, tiny_world: TinyWorld) -> None:
    predictor, store = load_predictor(ssn_run, device="cpu", samples=2), tiny_world.store
    case_id = next(i for i in store.case_ids if store.meta(i).volume_ml(2))
    fitted = _calibration_case(predictor, store, case_id, tiny_world.raw)
    liver_ml, tumour_ml = store.meta(case_id).volume_ml(1), store.meta(case_id).volume_ml(2)
    assert liver_ml is not None
    assert tumour_ml is not None
    assert fitted.truth_ml == {
        "liver": pytest.approx(liver_ml + tumour_ml),
        "tumour": pytest.approx(tumour_ml),
    }
    # What evaluate counts of the same case, voxel for voxel.
    case = native_case(predictor, tiny_world, case_id)
    scores = score_labels(case.predicted_zyx, case.truth_zyx, case.header.grid.spacing_zyx_mm)
    counted = evaluate_uncertainty(case_id, case, scores, summary=summary_of(case)).reliability["liver"]
    assert fitted.truth_v.size == counted.n_voxels.sum()
    assert np.count_nonzero(fitted.truth_v) == counted.n_correct.sum()
    assert fitted.foreground_cv.sum() == pytest.approx(counted.confidence_sum.sum(), rel=1e-4)
    assert fitted.intervals["tumour"] == summary_of(case).tumour_ml


def test_predict_applies_what_was_fitted(run: Run, ssn_run: Path, image: Path, tmp_path: Path) -> None:
    predictor = load_predictor(ssn_run, device="cpu")
    fitted = Calibration(
        case_ids=("a", "b"),
        spec_fingerprint=predictor.spec.fingerprint(),
        sources=("run",),
        weights=weight_checksums(predictor),
        temperature=TemperatureFit(temperature=3.0, nll_before=1.0, nll_after=0.5, n_voxels=10),
        widening={"liver": 4.0, "tumour": None},
    )
    fitted.write(tmp_path / "calibration.json")
    common = ("predict", ssn_run, image, "--samples", 3, "--device", "cpu")
    plain = run(*common, "--out", tmp_path / "plain")
    assert plain.exit_code == 0, plain.output
    applied = run(*common, "--out", tmp_path / "applied", "--calibration", tmp_path / "calibration.json")
    assert applied.exit_code == 0, applied.output
    before, after = (
        json.loads((tmp_path / name / "liver_0_uncertainty" / "uncertainty.json").read_text())
        for name in ("plain", "applied")
    )
    assert (before["calibrated_on"], after["calibrated_on"]) == (None, ["a", "b"])
    volume = before["liver_ml"]
    assert after["liver_ml"]["high_ml"] == pytest.approx(volume["mean_ml"] + 4 * volume["sd_ml"])
    assert after["tumour_ml"] == before["tumour_ml"]
    entropies = [
        voxels(tmp_path / name / "liver_0_uncertainty" / "entropy.nii.gz") for name in ("plain", "applied")
    ]
    assert entropies[1].mean() > entropies[0].mean()  # a temperature above 1 softens
    labels = [voxels(tmp_path / name / "liver_0.nii.gz") for name in ("plain", "applied")]
    np.testing.assert_array_equal(labels[0], labels[1])


def fitted_for(predictor: Predictor, **changes: Any) -> Calibration:
    values: dict[str, Any] = {
        "case_ids": ("a", "b"),
        "spec_fingerprint": predictor.spec.fingerprint(),
        "sources": ("runs/here",),
        "weights": weight_checksums(predictor),
        "temperature": TemperatureFit(temperature=3.0, nll_before=1.0, nll_after=0.5, n_voxels=10),
        "widening": {"liver": 4.0, "tumour": None},
    }
    return Calibration(**values | changes)


def test_a_calibration_that_does_not_fit_is_refused(
    run: Run, ssn_run: Path, tiny_run: Path, image: Path, tmp_path: Path
) -> None:
    predictor, path = load_predictor(ssn_run, device="cpu"), tmp_path / "calibration.json"
    fitted_for(predictor, spec_fingerprint="0" * 16).write(path)
    with pytest.raises(RunError, match="fitted for a network of spec 0000000000000000, this one has"):
        Calibration.load(path, predictor)
    with pytest.raises(RunError, match="name a calibration.json that liverseg evaluate --calibrate wrote"):
        Calibration.load(tmp_path / "none.json", predictor)
    fitted_for(predictor).write(path)
    assert Calibration.load(path, predictor) == fitted_for(predictor)
    other, both = (
        load_predictor(*runs, device="cpu", samples=2) for runs in ((tiny_run, ssn_run), (ssn_run, tiny_run))
    )
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"case_ids": ["a", "c"]}))
    with pytest.raises(
        RunError, match="its content does not match its checksum: restore it, or run liverseg"
    ):
        Calibration.load(path, predictor)
    path.write_text(json.dumps(content))  # in another layout
    with pytest.raises(RunError, match="fitted for the networks runs/here, whose weights are not those of "):
        Calibration.load(path, other)
    fitted_for(both).write(path)
    assert Calibration.load(path, other) == fitted_for(both)  # the order of an ensemble does not matter
    result = run("predict", ssn_run, image, "--out", tmp_path, "--calibration", path)
    assert result.exit_code == 2
    assert "--calibration needs samples" in result.output


def test_a_calibration_fits_the_file_that_its_network_was_exported_to(ssn_run: Path, tmp_path: Path) -> None:
    predictor, path = load_predictor(ssn_run, device="cpu"), tmp_path / "calibration.json"
    fitted_for(predictor).write(path)
    exported = export_model(ssn_run, tmp_path / "model.safetensors")
    assert Calibration.load(path, load_predictor(exported, device="cpu")) == fitted_for(predictor)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"widening": {}}, "widening: expected liver and tumour, found nothing"),
        ({"widening": {"liver": 1.0}}, "widening: expected liver and tumour, found liver"),
        ({"widening": {"liver": 1.0, "tumour": 1.0, "bone": 1.0}}, "found bone, liver, tumour"),
        ({"widening": {"liver": -5.0, "tumour": None}}, "widening.liver: expected 0 to 1e.06, found -5.0"),
        (
            {"widening": {"liver": None, "tumour": 1e300}},
            "widening.tumour: expected 0 to 1e.06, found 1e.300",
        ),
        *(({"temperature": t}, f"temperature: expected 0.05 to 20, found {t!r}") for t in (0.0, -1.5, 21.0)),
        ({"temperature": 1e9}, "temperature: expected 0.05 to 20, found 1000000000.0"),
    ],
)
def test_a_calibration_out_of_range_is_refused(
    ssn_run: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    """Though its checksum is right."""
    predictor, path = load_predictor(ssn_run, device="cpu"), tmp_path / "calibration.json"
    if "temperature" in changes:
        fit = TemperatureFit(temperature=changes["temperature"], nll_before=1.0, nll_after=0.5, n_voxels=10)
        changes = {"temperature": fit}
    fitted_for(predictor, **changes).write(path)
    with pytest.raises(RunError, match=f"{words}.*: run liverseg evaluate --calibrate again$"):
        Calibration.load(path, predictor)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "expected a calibration.json that liverseg evaluate --calibrate wrote, found another file"),
        ("{}", "found another file"),
        ('{"written_by": "liverseg evaluate", "case_ids": []}', "lacks the checksum .*calibrate again"),
        ('{"written_by": "liverseg evaluate", "checksum": 3}', "case_ids: missing"),
        ('{"written_by": "liverseg evaluate", "checksum": 3, "a": "\\ud800"}', "calibration.json: "),
        (
            '{"written_by": "", "checksum": 3, "a": ' + "[" * 900 + "]" * 900 + "}",
            "nested too deeply|recursion",
        ),
        ("[" * 100_000, "cannot be read: nested too deeply"),
    ],
)
def test_another_file_than_a_calibration_is_refused(
    ssn_run: Path, tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(RunError, match=words):
        Calibration.load(path, load_predictor(ssn_run, device="cpu"))


def test_a_flipped_bit_of_a_calibration_is_noticed_or_harmless(ssn_run: Path, tmp_path: Path) -> None:
    """Harmless is one of white space, or of the name of the command that signed it."""
    predictor, path = load_predictor(ssn_run, device="cpu"), tmp_path / "calibration.json"
    fitted_for(predictor).write(path)
    whole, expected, noticed = path.read_bytes(), fitted_for(predictor), 0
    bits = np.random.default_rng(0).integers(8 * len(whole), size=200).tolist()
    for bit in bits:
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            assert Calibration.load(path, predictor) == expected, f"bit {bit}"
        except RunError as failure:
            assert str(path) in str(failure)  # noqa: PT017 (either outcome is right)
            noticed += 1
    assert noticed >= 150


def test_maps_do_not_pass_for_labels_or_scans(run: Run, ssn_run: Path, image: Path, tmp_path: Path) -> None:
    for name in ("a", "a_entropy"):
        shutil.copy(image, tmp_path / f"{name}.nii.gz")
    before = (tmp_path / "a_entropy.nii.gz").read_bytes()
    out = tmp_path / "out"
    result = run("predict", ssn_run, tmp_path / "a.nii.gz", "--out", out, "--samples", 2, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a_entropy.nii.gz").read_bytes() == before
    (tmp_path / "truth").mkdir()
    shutil.copy(out / "a.nii.gz", tmp_path / "truth" / "a.nii.gz")
    scored = run("score", out, tmp_path / "truth")
    assert scored.exit_code == 0, scored.output


def test_an_ensemble_has_a_folder_of_its_own(
    run: Run, ssn_run: Path, tiny_run: Path, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    runs = [Path(shutil.copytree(folder, tmp_path / folder.parent.name)) for folder in (ssn_run, tiny_run)]
    case = load_split(ssn_run).val[0]
    common = ("--raw", tiny_world.raw, "--case", case, "--device", "cpu")
    assert run("evaluate", tiny_world.cache, runs[0], *common).exit_code == 0
    alone = (runs[0] / "evaluation" / "summary.json").read_bytes()
    together = run("evaluate", tiny_world.cache, runs[0], *common, "--with", runs[1], "--samples", 2)
    assert together.exit_code == 0, together.output
    assert (runs[0] / "evaluation" / "summary.json").read_bytes() == alone
    summary = json.loads((runs[0] / "ensemble" / "summary.json").read_text())
    assert (summary["models"], summary["samples"]) == ([str(r) for r in runs], 2)


@pytest.mark.parametrize(
    "options", [{"tta": True, "samples": 2}, {"tta": True, "fast": True}, {"samples": -1}]
)
def test_what_cannot_be_asked_for_together_is_refused(ssn_run: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="tta excludes fast and samples"):
        liverseg.load(ssn_run, device="cpu", **options)
