"""DICOM Segmentation objects: read back as the label they were written from, wherever the files lie in their folder."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import write_nifti
from numpy.typing import NDArray
from PIL import Image, ImageCms
from tiny import TinyWorld

from data_cache.errors import LabelError, OutputError, VolumeError
from data_cache.outputs import require_replaceable
from liverseg.cli import main
from liverseg.inference.dicom_seg import SEG_MARK, cielab, write_dicom_seg
from liverseg.pictures.palette import LIVER_PRED, TUMOUR_PRED
from pipeline.dicom import convert_series

pydicom = pytest.importorskip("pydicom")
hd = pytest.importorskip("highdicom")

from test_dicom import LPS_TO_RAS, edit, write_series  # noqa: E402 (it skips without pydicom, too)

SHAPE_KJI = (9, 12, 10)
AFFINE = np.array(
    [[0.9, 0.0, 0.0, -40.0], [0.0, 0.7, 0.0, 12.5], [0.0, 0.0, 2.5, -300.0], [0.0, 0.0, 0.0, 1.0]]
)
Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    return lambda *arguments: CliRunner().invoke(main, [str(a) for a in arguments])


def hand_made_label() -> NDArray[np.uint8]:
    """Liver with a hole in depth, tumours at one voxel, at a corner and beside background: nothing is symmetric."""
    label_kji = np.zeros(SHAPE_KJI, dtype=np.uint8)
    label_kji[1:4, 2:7, 3:9] = 1
    label_kji[6, 5:11, 1:4] = 1
    label_kji[2, 4, 5] = 2
    label_kji[6, 5:7, 1] = 2
    label_kji[8, 11, 9] = 2
    return label_kji


def written(
    tmp_path: Path, label_kji: NDArray[np.uint8], affine: NDArray[np.float64] = AFFINE
) -> tuple[Path, Path, Path]:
    """A series in shuffled files, a label on its grid in file order, and where its segmentation goes."""
    rng = np.random.default_rng(0)
    series, label = tmp_path / "series", tmp_path / "label.nii.gz"
    write_series(series, rng.integers(-1000, 500, label_kji.shape).astype(np.int16), affine)
    convert_series(series, tmp_path / "image.nii")
    on_disk = np.asarray(nib.Nifti1Image.from_filename(tmp_path / "image.nii").affine)
    write_nifti(label, label_kji.transpose(2, 1, 0), on_disk)
    return series, label, tmp_path / "out_seg.dcm"


def in_patient_space(segmentation: Any, affine_ras: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Labels (k, j, i) on a grid, each frame put where its own plane position says; pydicom alone."""
    label_kji = np.zeros(SHAPE_KJI, dtype=np.uint8)
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    row, column = np.reshape(shared.PlaneOrientationSequence[0].ImageOrientationPatient, (2, 3)).astype(float)
    j_mm, i_mm = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    frames = np.atleast_3d(segmentation.pixel_array)
    for frame_ji, about in zip(frames, segmentation.PerFrameFunctionalGroupsSequence, strict=True):
        number = about.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        origin = np.array(about.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        for j, i in np.argwhere(frame_ji):
            at_ras = LPS_TO_RAS[:3, :3] @ (origin + row * i_mm * i + column * j_mm * j)
            voxel = np.linalg.solve(affine_ras, [*at_ras, 1])[:3]
            np.testing.assert_allclose(voxel, np.rint(voxel), atol=0.01)
            label_kji[tuple(np.rint(voxel[::-1]).astype(int))] = number
    return label_kji


# ---- round trips


@pytest.mark.parametrize("turn", ["axial", "oblique", "tilted gantry", "feet up"])
def test_a_label_comes_back_voxel_for_voxel(tmp_path: Path, turn: str) -> None:
    affine, label_kji = AFFINE.copy(), hand_made_label()
    if turn == "oblique":
        affine = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.2, 0.1, 0.15)) @ affine
    elif turn == "tilted gantry":
        affine[1, 2] += 0.8
    elif turn == "feet up":
        affine[:3, :3] = affine[:3, :3] @ np.diag([-1, -1, 1])
    series, label, target = written(tmp_path, label_kji, affine)
    write_dicom_seg(target, series=series, label=label)
    np.testing.assert_array_equal(in_patient_space(pydicom.dcmread(target), affine), label_kji)
    # By the instances that are referred to: these are known by name and lie in no order.
    segmentation = hd.seg.segread(target)
    files = [pydicom.dcmread(p, stop_before_pixels=True) for p in sorted(series.iterdir())]
    along = sorted(files, key=lambda f: float(f.ImagePositionPatient[2]))
    by_instance = segmentation.get_pixels_by_source_instance(
        [f.SOPInstanceUID for f in along],
        combine_segments=True,
        ignore_spatial_locations=True,
        assert_missing_frames_are_empty=True,
    )
    np.testing.assert_array_equal(by_instance, label_kji)


def on_grid(volume: Any, affine_ras: NDArray[np.float64], shape_kji: tuple[int, ...]) -> NDArray[np.uint8]:
    """Labels (k, j, i) on a grid, from a highdicom volume, which has its own order of axes and slices."""
    label_kji = np.zeros(shape_kji, dtype=np.uint8)
    to_ijk = np.linalg.inv(affine_ras) @ LPS_TO_RAS @ volume.affine
    at = np.argwhere(volume.array)
    ijk = (np.column_stack([at, np.ones(len(at))]) @ to_ijk.T)[:, :3]
    np.testing.assert_allclose(ijk, np.rint(ijk), atol=0.01)
    label_kji[tuple(np.rint(ijk[:, ::-1]).astype(int).T)] = volume.array[tuple(at.T)]
    return label_kji


def test_highdicom_reads_it_as_a_volume(tmp_path: Path) -> None:
    series, label, target = written(tmp_path, hand_made_label())
    write_dicom_seg(target, series=series, label=label)
    volume = hd.seg.segread(target).get_volume(combine_segments=True)
    assert volume.spacing == pytest.approx((2.5, 0.7, 0.9))
    np.testing.assert_array_equal(on_grid(volume, AFFINE, SHAPE_KJI), hand_made_label())


def test_no_liver_is_a_segmentation_without_a_voxel(tmp_path: Path) -> None:
    series, label, target = written(tmp_path, np.zeros(SHAPE_KJI, dtype=np.uint8))
    write_dicom_seg(target, series=series, label=label)
    segmentation = pydicom.dcmread(target)
    assert not segmentation.pixel_array.any()
    assert len(segmentation.SegmentSequence) == 2


def test_predict_writes_one_beside_its_label(
    run: Run, tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path
) -> None:
    image = nib.Nifti1Image.from_filename(tiny_world.raw / "imagesTr" / "liver_0.nii.gz")
    volume = np.asarray(image.dataobj).astype(np.int16).transpose(2, 1, 0)
    write_series(tmp_path / "CT_7", volume, np.asarray(image.affine))
    out = tmp_path / "out"
    result = run("predict", tiny_run, tmp_path / "CT_7", "--out", out, "--dicom-seg")
    assert result.exit_code == 0, result.output
    assert {p.name for p in out.iterdir()} == {"CT_7.nii.gz", "CT_7_seg.dcm"}
    label = nib.Nifti1Image.from_filename(out / "CT_7.nii.gz")
    label_kji = np.asarray(label.dataobj).transpose(2, 1, 0)
    assert set(np.unique(label_kji)) >= {0, 1}
    read = hd.seg.segread(out / "CT_7_seg.dcm").get_volume(combine_segments=True)
    np.testing.assert_array_equal(on_grid(read, np.asarray(label.affine), label_kji.shape), label_kji)


def test_only_its_own_segmentations_may_be_replaced(tmp_path: Path) -> None:
    series, label, target = written(tmp_path, hand_made_label())
    write_dicom_seg(target, series=series, label=label)
    require_replaceable(target, SEG_MARK, command="predict")
    own = target.read_bytes()
    for ours, other in ((b"LO\x08\x00liverseg", b"LO\x08\x00Somebody"), (b"1.66.4", b"1.66.5")):
        assert ours in own
        target.write_bytes(own.replace(ours, other))
        with pytest.raises(OutputError):
            require_replaceable(target, SEG_MARK, command="predict")


# ---- what it says


def test_it_says_what_it_is_of_and_who_made_it(tmp_path: Path) -> None:
    series, label, target = written(tmp_path, hand_made_label())
    for path in series.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.SpacingBetweenSlices = "7"
        dataset.save_as(path)
    write_dicom_seg(target, series=series, label=label)
    segmentation = pydicom.dcmread(target)
    files = [pydicom.dcmread(p, stop_before_pixels=True) for p in series.iterdir()]
    (referred,) = segmentation.ReferencedSeriesSequence
    assert referred.SeriesInstanceUID == files[0].SeriesInstanceUID
    instances = {item.ReferencedSOPInstanceUID for item in referred.ReferencedInstanceSequence}
    assert instances == {f.SOPInstanceUID for f in files}
    assert segmentation.StudyInstanceUID == files[0].StudyInstanceUID
    assert segmentation.FrameOfReferenceUID == files[0].FrameOfReferenceUID
    assert segmentation.SeriesInstanceUID != files[0].SeriesInstanceUID
    # The series' files lie: by their positions the slices are 2.5 mm apart.
    measures = segmentation.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert float(measures.SpacingBetweenSlices) == pytest.approx(2.5)
    liver, tumour = segmentation.SegmentSequence
    assert [s.SegmentNumber for s in (liver, tumour)] == [1, 2]
    assert liver.SegmentedPropertyTypeCodeSequence[0].CodeValue == "10200004"
    assert tumour.SegmentedPropertyTypeCodeSequence[0].CodeValue == "108369006"
    assert tumour.AnatomicRegionSequence[0].CodeValue == "10200004"
    for segment in (liver, tumour):
        assert segment.SegmentAlgorithmType == "AUTOMATIC"
        assert segment.SegmentAlgorithmName == "liverseg"
        (algorithm,) = segment.SegmentationAlgorithmIdentificationSequence
        assert algorithm.AlgorithmName == "liverseg"
        assert algorithm.AlgorithmVersion == segmentation.SoftwareVersions


def test_segments_are_shown_in_the_colours_of_the_pictures(tmp_path: Path) -> None:
    series, label, target = written(tmp_path, hand_made_label())
    write_dicom_seg(target, series=series, label=label)
    # Pillow converts by ICC profiles, whose CIELAB has the white of DICOM's; its values are whole numbers.
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    for segment, colour in zip(
        pydicom.dcmread(target).SegmentSequence, (LIVER_PRED, TUMOUR_PRED), strict=True
    ):
        converted = ImageCms.applyTransform(Image.new("RGB", (1, 1), colour), to_lab)
        assert converted is not None
        lab = converted.tobytes()
        expected = (lab[0] * 100 / 255, *np.frombuffer(lab[1:], dtype=np.int8))
        lightness, red, yellow = segment.RecommendedDisplayCIELabValue
        found = (lightness * 100 / 65535, red * 255 / 65535 - 128, yellow * 255 / 65535 - 128)
        assert found == pytest.approx(expected, abs=1.0)


@pytest.mark.parametrize(
    ("colour", "expected"), [("#ffffff", (100, 0, 0)), ("#000000", (0, 0, 0)), ("#0a0a0a", (2.74, 0, 0))]
)
def test_grays_have_no_colour(colour: str, expected: tuple[float, ...]) -> None:
    # 10 / 255 is in the linear part of both curves: Y = 10 / 255 / 12.92 = 0.003035, and L* = Y * (29/3)^3 = 2.74.
    assert cielab(colour) == pytest.approx(expected, abs=0.01)


def test_the_patient_goes_along(tmp_path: Path) -> None:
    series, label, target = written(tmp_path, hand_made_label())
    for path in series.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.SpecificCharacterSet = "ISO_IR 100"
        dataset.PatientName, dataset.PatientID = "Müller^Jörg", "4711"
        dataset.save_as(path)
    write_dicom_seg(target, series=series, label=label)
    segmentation = pydicom.dcmread(target)
    assert (segmentation.PatientName, segmentation.PatientID) == ("Müller^Jörg", "4711")


def test_nothing_else_of_the_patient_goes_along(tmp_path: Path) -> None:
    series, label, target = written(tmp_path, hand_made_label())
    for path in series.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.PatientAddress = dataset.PatientComments = dataset.InstitutionName = "SECRET"
        dataset.OtherPatientIDs = dataset.StudyDescription = dataset.OperatorsName = "SECRET"
        dataset.PatientAge, dataset.PatientWeight = "054Y", 81
        dataset.private_block(0x11, "LIVERSEG TEST", create=True).add_new(1, "LO", "SECRET")
        dataset.save_as(path)
    write_dicom_seg(target, series=series, label=label)
    assert b"SECRET" not in target.read_bytes()
    segmentation = pydicom.dcmread(target)
    assert not {"PatientAge", "PatientWeight", "SeriesDate"} & set(segmentation.dir())


# ---- refusals


def test_nifti_inputs_are_wrong_usage(
    run: Run, tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path
) -> None:
    image = tiny_world.raw / "imagesTr" / "liver_0.nii.gz"
    result = run("predict", tiny_run, image, "--out", tmp_path / "out", "--dicom-seg")
    assert result.exit_code == 2
    assert "liver_0.nii.gz is not a folder or zip of one" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_without_highdicom_it_says_what_to_install(
    run: Run, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "highdicom", None)
    (tmp_path / "series").mkdir()
    result = run("predict", tiny_run, tmp_path / "series", "--out", tmp_path / "out", "--dicom-seg")
    assert result.exit_code == 1
    assert "--dicom-seg needs highdicom: pip install 'liverseg[dicom]'" in result.output


def test_a_label_of_another_grid_is_refused(tmp_path: Path) -> None:
    series, label, target = written(tmp_path, hand_made_label())
    # The same scan with its slices the other way round: the same shape, and upside down as a segmentation.
    turned = AFFINE @ np.diag([1.0, 1.0, -1.0, 1.0])
    turned[:3, 3] = (AFFINE @ [0, 0, SHAPE_KJI[0] - 1, 1])[:3]
    write_nifti(label, hand_made_label()[::-1].transpose(2, 1, 0), turned)
    with pytest.raises(LabelError, match="its voxels are not those of the series"):
        write_dicom_seg(target, series=series, label=label)
    write_nifti(label, hand_made_label()[:5].transpose(2, 1, 0), AFFINE)
    with pytest.raises(LabelError, match="its voxels are not those of the series"):
        write_dicom_seg(target, series=series, label=label)
    assert not target.exists()


def test_a_series_that_cannot_be_referred_to(tmp_path: Path) -> None:
    series, label, target = written(tmp_path, hand_made_label())
    for path in series.iterdir():
        dataset = pydicom.dcmread(path)
        del dataset.FrameOfReferenceUID
        dataset.save_as(path)
    with pytest.raises(VolumeError, match="lacks FrameOfReferenceUID, which a segmentation refers to"):
        write_dicom_seg(target, series=series, label=label)


@pytest.mark.parametrize("uid", [lambda _: "1.2.3", lambda k: f"1.2.{k // 2}"], ids=["one for all", "pairs"])
def test_slices_that_share_a_uid_cannot_be_referred_to(tmp_path: Path, uid: Callable[[int], str]) -> None:
    series, label, target = written(tmp_path, hand_made_label())
    for k, path in enumerate(sorted(series.iterdir())):
        edit([path], SOPInstanceUID=uid(k))
    with pytest.raises(VolumeError, match=r"IM0000.dcm and IM000\d.dcm have the same SOPInstanceUID"):
        write_dicom_seg(target, series=series, label=label)
    assert not target.exists()


@pytest.fixture
def phantom_series(tiny_world: TinyWorld, tmp_path: Path) -> list[Path]:
    """The files of a series that a network can segment."""
    image = nib.Nifti1Image.from_filename(tiny_world.raw / "imagesTr" / "liver_0.nii.gz")
    volume = np.asarray(image.dataobj).astype(np.int16).transpose(2, 1, 0)
    return write_series(tmp_path / "CT_7", volume, np.asarray(image.affine))


@pytest.mark.parametrize(
    ("keyword", "value", "words"),
    [
        ("SOPInstanceUID", "1.2.3", "have the same SOPInstanceUID"),
        ("SOPInstanceUID", None, "lacks SOPInstanceUID"),
        ("StudyInstanceUID", None, "lacks StudyInstanceUID"),
    ],
)
def test_what_cannot_be_referred_to_is_found_before_anything_is_written(
    run: Run,
    phantom_series: list[Path],
    tiny_run: Path,
    tmp_path: Path,
    keyword: str,
    value: str | None,
    words: str,
) -> None:
    edit(phantom_series, **{keyword: value})
    out = tmp_path / "out"
    result = run("predict", tiny_run, tmp_path / "CT_7", "--out", out, "--dicom-seg")
    assert result.exit_code == 1
    assert words in " ".join(result.output.split())
    assert "or leave out --dicom-seg" in " ".join(result.output.split())
    assert not list(out.glob("*CT_7*"))


def test_a_series_that_is_forced_has_a_segmentation(
    run: Run, phantom_series: list[Path], tiny_run: Path, tmp_path: Path
) -> None:
    edit(phantom_series, RescaleSlope=None, RescaleIntercept=None)
    out = tmp_path / "out"
    result = run("predict", tiny_run, tmp_path / "CT_7", "--out", out, "--dicom-seg", "--force")
    assert result.exit_code == 0, result.output
    assert {p.name for p in out.iterdir()} == {"CT_7.nii.gz", "CT_7_seg.dcm"}


def test_nothing_of_the_patient_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    series, label, target = written(tmp_path, np.zeros(SHAPE_KJI, dtype=np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        edit(list(series.iterdir()), PatientName="Smith John" * 10, AccessionNumber="4" * 30)
    recwarn.clear()
    caplog.clear()
    write_dicom_seg(target, series=series, label=label)
    assert not [r for r in caplog.records if r.name.startswith("highdicom")]  # pydicom's go nowhere
    assert not recwarn.list
    assert pydicom.dcmread(target).PatientName == "Smith John" * 10


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("PatientBirthDate", "unknown"),
        ("StudyDate", "2020-13-45"),
        ("StudyTime", "noon"),
        ("PatientSex", "unknown"),
        ("PatientSex", "W"),
        ("StudyID", "4" * 40),
        ("PatientID", "4" * 80),
    ],
)
def test_a_value_of_the_patient_that_cannot_be_does_not_stop_it(
    tmp_path: Path, keyword: str, value: str
) -> None:
    series, label, target = written(tmp_path, hand_made_label())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        edit(list(series.iterdir()), **{keyword: value})
    write_dicom_seg(target, series=series, label=label)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert pydicom.dcmread(target)[keyword].value in ("", None, value)


def test_the_patient_of_most_slices_is_its_patient(tmp_path: Path) -> None:
    series, label, target = written(tmp_path, hand_made_label())
    paths = list(series.iterdir())
    edit(paths, PatientName="A^B", PatientID="7")
    edit([p for p in paths if p.name == "IM0000.dcm"], PatientName="", PatientID="")  # the lowest slice
    write_dicom_seg(target, series=series, label=label)
    segmentation = pydicom.dcmread(target)
    assert (segmentation.PatientName, segmentation.PatientID) == ("A^B", "7")
