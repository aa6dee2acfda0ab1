"""DICOM series: written here slice by slice, read as the NIfTI file of the same scan; faults named by file."""

from __future__ import annotations

import contextlib
import os
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import SPEC, TinyWorld

from data_cache.errors import VolumeError
from pipeline.dicom import DicomSource, convert_series
from pipeline.dicom.header import parse
from pipeline.prepare import read_scan

pydicom = pytest.importorskip("pydicom")
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def write_series(
    folder: Path,
    volume_kji: NDArray[np.int16],
    affine_ras: NDArray[np.float64],
    *,
    slope: float = 1.0,
    intercept: float = -1024.0,
    names: Sequence[str] | None = None,
) -> list[Path]:
    """A file a slice, in an order of names that is not the order in space."""
    folder.mkdir(parents=True)
    lps = LPS_TO_RAS @ affine_ras
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    directions = lps[:3, :3] / spacing
    uid, study, frame = (pydicom.uid.generate_uid() for _ in range(3))
    paths = []
    for k, slice_ji in enumerate(volume_kji):
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        dataset.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        dataset.SOPClassUID = pydicom.uid.CTImageStorage
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID
        dataset.Modality, dataset.SeriesInstanceUID, dataset.SeriesDescription = "CT", uid, "abdomen"
        dataset.StudyInstanceUID, dataset.FrameOfReferenceUID = study, frame
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.ImagePositionPatient = [f"{v:.6f}" for v in (lps @ [0, 0, k, 1])[:3]]
        dataset.ImageOrientationPatient = [f"{v:.8f}" for v in directions[:, :2].T.ravel()]
        dataset.PixelSpacing = [f"{spacing[1]:.8f}", f"{spacing[0]:.8f}"]
        dataset.SliceThickness = "99"  # a lie that scanners tell: it is not the distance of slices
        dataset.Rows, dataset.Columns = slice_ji.shape
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = (
            16,
            16,
            15,
            1,
        )
        dataset.RescaleSlope, dataset.RescaleIntercept = str(slope), str(intercept)
        dataset.PixelData = np.rint((slice_ji - intercept) / slope).astype("<i2").tobytes()
        path = folder / (names[k] if names else f"IM{(k * 7) % len(volume_kji):04d}.dcm")
        dataset.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


@pytest.fixture
def scan(tiny_world: TinyWorld) -> tuple[Path, NDArray[np.int16], NDArray[np.float64]]:
    """A phantom's file, its slices as they lie in the file, and its affine."""
    path = tiny_world.raw / "imagesTr" / "liver_0.nii.gz"
    image = nib.Nifti1Image.from_filename(path)
    volume = np.asarray(image.dataobj).astype(np.int16).transpose(2, 1, 0)
    return path, volume, np.asarray(image.affine)


def converted(source: Path, tmp_path: Path) -> nib.Nifti1Image:
    convert_series(source, tmp_path / "out.nii")
    return nib.Nifti1Image.from_filename(tmp_path / "out.nii")


def test_a_series_is_the_scan_it_was_written_from(scan: Any, tmp_path: Path) -> None:
    path, volume, affine = scan
    write_series(tmp_path / "series", volume, affine)
    (tmp_path / "series" / "notes.txt").write_text("not an image")
    image = converted(tmp_path / "series", tmp_path)
    np.testing.assert_allclose(image.affine, affine, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(image.dataobj).transpose(2, 1, 0), volume)
    ours, expected = (read_scan(p, SPEC) for p in (tmp_path / "out.nii", path))
    assert ours.header.file_axes == expected.header.file_axes
    box = expected.scan_box
    same, other = (s.view(box).image_zyx for s in (ours, expected))
    np.testing.assert_array_equal(same, other)


def test_slices_from_head_to_feet_and_in_a_zip(scan: Any, tmp_path: Path) -> None:
    _, volume, affine = scan
    turned = affine.copy()
    turned[:3, 2] *= -1
    turned[:3, 3] = (affine @ [0, 0, len(volume) - 1, 1])[:3]
    write_series(tmp_path / "series", volume[::-1], turned)
    with zipfile.ZipFile(tmp_path / "series.zip", "w") as archive:
        for path in (tmp_path / "series").iterdir():
            archive.write(path, f"inner/{path.name}")
    image = converted(tmp_path / "series.zip", tmp_path)
    np.testing.assert_array_equal(
        nib.as_closest_canonical(image).affine, nib.as_closest_canonical(image).affine
    )
    np.testing.assert_allclose(image.affine, affine, atol=1e-4)  # sorted by where they are
    np.testing.assert_array_equal(np.asarray(image.dataobj).transpose(2, 1, 0), volume)


def test_scaling_and_an_oblique_plane(scan: Any, tmp_path: Path) -> None:
    _, volume, affine = scan
    affine = affine @ np.diag([1.3, 1, 1, 1])  # pixels that are not square
    turn = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.2, 0.1, 0.15))
    write_series(tmp_path / "series", volume, turn @ affine, slope=2.0, intercept=-1000.0)
    image = converted(tmp_path / "series", tmp_path)
    np.testing.assert_allclose(image.affine, turn @ affine, atol=1e-3)
    assert np.abs(np.asarray(image.dataobj).transpose(2, 1, 0) - volume).max() <= 1


@pytest.mark.parametrize("padding", [-2000, 63536])
def test_padding_that_was_made_unsigned_is_air(scan: Any, tmp_path: Path, padding: int) -> None:
    _, volume, affine = scan
    bright = 3000  # metal is not padding
    volume = np.where(volume > 200, bright, volume).astype(np.int16)
    volume[:, :2] = -1024
    for path in write_series(tmp_path / "series", volume, affine):
        dataset = pydicom.dcmread(path)
        dataset.PixelRepresentation = 0
        dataset.add_new("PixelPaddingValue", "SS" if padding < 0 else "US", padding)
        stored = dataset.pixel_array.copy()
        stored[:2] = 63536  # -2000 in 16 bits without a sign
        dataset.PixelData = stored.astype("<u2").tobytes()
        dataset.save_as(path)
    image = converted(tmp_path / "series", tmp_path)
    np.testing.assert_array_equal(np.asarray(image.dataobj).transpose(2, 1, 0), volume)
    assert volume.max() == bright


def test_a_tilted_gantry_keeps_its_shear(scan: Any, tmp_path: Path) -> None:
    _, volume, affine = scan
    sheared = affine.copy()
    sheared[1, 2] += 0.8
    write_series(tmp_path / "series", volume, sheared)
    np.testing.assert_allclose(converted(tmp_path / "series", tmp_path).affine, sheared, atol=1e-3)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", r"1 slice is missing between s010.dcm and s012.dcm: \d+\.\d\d mm apart, the others"),
        ("double", "s010.dcm and twin.dcm are at the same position|twin.dcm and s010.dcm are at"),
        (
            "two series",
            r"holds 2 series: 'abdomen' .40 images, [\d.]+., 'abdomen' .40 images, [\d.]+.: choose",
        ),
        ("one slice", "s000.dcm is the only slice"),
        ("no dicom", r"s000.dcm \(and 39 more\) is not readable as DICOM \(7 bytes\)"),
        ("size", "has another size or spacing than"),
        ("pixels", "s010.dcm: its pixels cannot be decoded"),
    ],
)
def test_a_series_with_a_fault_is_refused_by_name(
    scan: Any, tmp_path: Path, fault: str, message: str
) -> None:
    _, volume, affine = scan
    source, names = tmp_path / "series", [f"s{k:03d}.dcm" for k in range(len(volume))]
    paths = write_series(source, volume, affine, names=names)
    if fault == "missing":
        paths[11].unlink()
    elif fault == "double":
        shutil.copy(paths[10], source / "twin.dcm")
    elif fault == "two series":
        write_series(source / "more", volume, affine)
    elif fault == "one slice":
        for path in paths[1:]:
            path.unlink()
    elif fault == "no dicom":
        for path in paths:
            path.write_text("nothing")
    elif fault == "size":
        write_series(tmp_path / "small", volume[:, :20], affine, names=names)
        dataset = pydicom.dcmread(tmp_path / "small" / "s005.dcm")
        first = pydicom.dcmread(paths[0])
        dataset.SeriesInstanceUID, dataset.StudyInstanceUID = first.SeriesInstanceUID, first.StudyInstanceUID
        dataset.save_as(paths[5])
    else:
        dataset = pydicom.dcmread(paths[10])
        dataset.PixelData = dataset.PixelData[:100]
        dataset.save_as(paths[10])
    with pytest.raises(VolumeError, match=message):
        convert_series(source, tmp_path / "out.nii")
    assert not (tmp_path / "out.nii").exists()


def test_a_broken_zip(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"PK rubbish")
    with pytest.raises(VolumeError, match="cannot be opened as a zip"):
        convert_series(tmp_path / "x.zip", tmp_path / "out.nii")


# ---- every file is a slice, recognizably something else, or named


def edit(paths: Sequence[Path], **attributes: Any) -> None:
    """Set attributes of files, or delete those that are None; values need not be valid."""
    for path in paths:
        dataset = pydicom.dcmread(path)
        for keyword, value in attributes.items():
            if value is None:
                delattr(dataset, keyword)
            else:
                tag = pydicom.datadict.tag_for_keyword(keyword)
                vr = pydicom.datadict.dictionary_VR(tag)
                with pydicom.config.disable_value_validation():
                    dataset[tag] = pydicom.DataElement(tag, "UN" if isinstance(value, bytes) else vr, value)
        dataset.save_as(path)


def raw_value(paths: Sequence[Path], keyword: str, value: bytes) -> None:
    """Replace the bytes of a value, whatever its type allows."""
    for path in paths:
        dataset = pydicom.dcmread(path)
        tag = pydicom.datadict.tag_for_keyword(keyword)
        dataset._dict[pydicom.tag.Tag(tag)] = pydicom.dataelem.RawDataElement(
            pydicom.tag.Tag(tag), dataset[tag].VR, len(value), value, 0, False, True
        )
        dataset.save_as(path)


@pytest.fixture
def series(scan: Any, tmp_path: Path) -> list[Path]:
    """The files of a sound series, along its normal."""
    _, volume, affine = scan
    return write_series(tmp_path / "series", volume, affine, names=[f"s{k:03d}" for k in range(len(volume))])


def notes_of(source: Path, tmp_path: Path, **options: Any) -> tuple[str, ...]:
    return convert_series(source, tmp_path / "out.nii", **options)


def refusal(source: Path, tmp_path: Path, **options: Any) -> str:
    with pytest.raises(VolumeError) as caught:
        notes_of(source, tmp_path, **options)
    assert not (tmp_path / "out.nii").exists()
    message = str(caught.value)
    assert message.startswith(f"{source}: ")
    assert "\n" not in message
    return message


def test_slices_without_a_preamble_are_read(series: list[Path], tmp_path: Path) -> None:
    for path in series[-10:]:
        path.write_bytes(path.read_bytes()[132:])
    assert notes_of(tmp_path / "series", tmp_path) == ()
    assert nib.Nifti1Image.from_filename(tmp_path / "out.nii").shape[2] == len(series)


@pytest.mark.parametrize("length", [0, 3, 140, 300, 400, 700])
def test_a_slice_that_is_cut_short_is_named(series: list[Path], tmp_path: Path, length: int) -> None:
    series[-1].write_bytes(series[-1].read_bytes()[:length])
    assert series[-1].name in refusal(tmp_path / "series", tmp_path)


def test_noise_and_a_dead_link_among_the_slices_are_named(series: list[Path], tmp_path: Path) -> None:
    series[-1].write_bytes(np.random.default_rng(0).bytes(5000))
    assert f"{series[-1].name} " in refusal(tmp_path / "series", tmp_path)
    series[-1].unlink()
    series[-1].symlink_to("moved/elsewhere")
    assert f"{series[-1].name} is a link to a file that is not there" in refusal(
        tmp_path / "series", tmp_path
    )


def test_what_is_recognizably_something_else_is_passed_over_and_said(
    series: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "series"
    (folder / "report.pdf").write_bytes(b"%PDF-1.4 " + bytes(100))
    (folder / "README").write_text("These are the slices of a CT.\n")
    (folder / "._s000").write_bytes(b"\0\5\x16\7")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to(folder)
    for name, (sop_class, modality) in {
        "seg": ("1.2.840.10008.5.1.4.1.1.66.4", "SEG"),
        "dose": ("1.2.840.10008.5.1.4.1.1.88.67", "SR"),
        "capture": ("1.2.840.10008.5.1.4.1.1.7", "CT"),
        "private": ("1.3.46.670589.5.0.10", "CT"),
        "enhanced": ("1.2.840.10008.5.1.4.1.1.2.1", "CT"),
        "mr": ("1.2.840.10008.5.1.4.1.1.2", "MR"),
    }.items():
        shutil.copy(series[0], folder / name)
        uid = pydicom.uid.generate_uid()
        edit([folder / name], SOPClassUID=sop_class, Modality=modality, SeriesInstanceUID=uid)
    shutil.copy(series[0], folder / "scout")
    edit([folder / "scout"], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    shutil.copy(
        series[0], folder / "protocol"
    )  # a page that some scanners add as a "slice" without a position
    edit([folder / "protocol"], SeriesInstanceUID=pydicom.uid.generate_uid(), ImagePositionPatient=None)
    (note,) = notes_of(folder, tmp_path)
    assert nib.Nifti1Image.from_filename(tmp_path / "out.nii").shape[2] == len(series)
    for words in (
        "1 × .pdf file (report.pdf)",
        "1 × text file (README)",
        "1 × hidden file (._s000)",
        "1 × FIFO, socket or device (pipe)",
        "1 × Segmentation (seg)",
        "X-Ray Radiation Dose SR (dose)",
        "1 × Secondary Capture Image (capture)",
        "1 × vendor's private object (private)",
        "1 × enhanced multi-frame CT (enhanced)",
        "1 × MR image (mr)",
        "1 × localizer (scout)",
        "1 × damaged image of another series (protocol)",
    ):
        assert words in note


def test_something_else_that_claims_to_be_of_the_series_is_not_passed_over(
    series: list[Path], tmp_path: Path
) -> None:
    edit(series[-1:], Modality="PT")
    assert "s039 is of the same series, but PT image" in refusal(tmp_path / "series", tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"Modality": "PT"}, "holds no CT series, but 40 × PT image"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4"}, "holds no CT series, but 40 × MR Image"),
        (
            {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2.1"},
            "enhanced multi-frame CT, several slices in one file",
        ),
        ({"SOPClassUID": "1.2.840.10008.99.99"}, "s000 (and 39 more) has the unknown SOP class"),
        ({"RescaleSlope": None, "RescaleIntercept": None}, "s000 (and 39 more) lacks RescaleSlope"),
        ({"RescaleType": "MGML"}, "has values in the unit 'MGML' (RescaleType): expected HU"),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "is a color image (3 samples per pixel"),
        ({"NumberOfFrames": 2}, "holds 2 frames"),
    ],
)
def test_a_series_that_is_not_ct_in_hu_is_refused_for_what_it_is(
    series: list[Path], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    edit(series, **changes)
    assert words in refusal(tmp_path / "series", tmp_path)


def test_force_takes_what_is_not_ct(series: list[Path], tmp_path: Path) -> None:
    edit(series, Modality="MR", RescaleSlope=None, RescaleIntercept=None)
    notes_of(tmp_path / "series", tmp_path, force=True)
    assert (tmp_path / "out.nii").exists()


# ---- numbers of headers


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("RescaleSlope", b""),
        ("RescaleSlope", b"1\\2 "),
        ("RescaleSlope", b"one "),
        ("RescaleSlope", b"0 "),
        ("RescaleSlope", b"nan "),
        ("RescaleIntercept", b""),
        ("RescaleIntercept", b"-inf"),
        ("ImagePositionPatient", b"1\\2 "),
        ("ImagePositionPatient", b"nan\\nan\\nan "),
        ("ImagePositionPatient", b"1e30\\0\\0"),
        ("ImagePositionPatient", b""),
        ("ImageOrientationPatient", b"1\\0\\0\\0\\1 "),
        ("ImageOrientationPatient", b"1\\0\\0\\1\\0\\0 "),
        ("ImageOrientationPatient", b"2\\0\\0\\0\\2\\0 "),
        ("ImageOrientationPatient", b"0\\0\\0\\0\\0\\0 "),
        ("ImageOrientationPatient", b"nan\\0\\0\\0\\1\\0 "),
        ("PixelSpacing", b"0\\0 "),
        ("PixelSpacing", b"-1\\1"),
        ("PixelSpacing", b"nan\\1 "),
        ("PixelSpacing", b"1 "),
        ("Rows", b"\xff\xff"),
        ("Rows", b"\0\0"),
        ("Columns", b""),
    ],
)
@pytest.mark.parametrize("which", [slice(None), slice(7, 8)], ids=["all", "one"])
def test_a_number_that_cannot_be_is_named_with_its_file(
    series: list[Path], tmp_path: Path, keyword: str, value: bytes, which: slice
) -> None:
    raw_value(series[which], keyword, value)
    message = refusal(tmp_path / "series", tmp_path)
    assert series[which][0].name in message
    assert keyword in message or "rows" in message or "pixels cannot be decoded" in message


def test_directions_that_are_rounded_are_normalized_and_said(scan: Any, tmp_path: Path) -> None:
    _, volume, affine = scan
    turn = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.4, 0, 0))
    paths = write_series(tmp_path / "series", volume, turn @ affine)
    for path in paths:
        rounded = [round(float(v), 1) for v in pydicom.dcmread(path).ImageOrientationPatient]
        edit([path], ImageOrientationPatient=rounded)
    (note,) = notes_of(tmp_path / "series", tmp_path)
    assert "off from orthogonal unit vectors" in note
    found = np.asarray(nib.Nifti1Image.from_filename(tmp_path / "out.nii").affine)
    np.testing.assert_allclose(np.linalg.norm(found[:3, 0]), np.linalg.norm(affine[:3, 0]), rtol=1e-6)


# ---- which series, which pass, on one line


def test_several_series_are_listed_and_one_is_chosen(scan: Any, series: list[Path], tmp_path: Path) -> None:
    _, volume, affine = scan
    others = write_series(tmp_path / "series" / "venous", volume + 1, affine)
    edit(others, SeriesDescription="venous")
    uids = [pydicom.dcmread(paths[0]).SeriesInstanceUID for paths in (series, others)]
    message = refusal(tmp_path / "series", tmp_path)
    assert f"'abdomen' (40 images, {uids[0]})" in message
    assert f"'venous' (40 images, {uids[1]}): choose one with --series UID" in message
    assert "has no CT series 1.2.3; it has" in refusal(tmp_path / "series", tmp_path, uid="1.2.3")
    (note,) = notes_of(tmp_path / "series", tmp_path, uid=uids[1])
    assert "40 × image of the series 'abdomen'" in note
    found = np.asarray(nib.Nifti1Image.from_filename(tmp_path / "out.nii").dataobj).transpose(2, 1, 0)
    np.testing.assert_array_equal(found, volume + 1)


@pytest.fixture
def two_phases(scan: Any, series: list[Path], tmp_path: Path) -> tuple[list[Path], list[Path]]:
    """The files of one series that is two phases, the second half a step higher."""
    _, volume, affine = scan
    shifted = affine.copy()
    shifted[:3, 3] += affine[:3, 2] * 0.5
    others = write_series(
        tmp_path / "series" / "b", volume, shifted, names=[f"t{k:03d}" for k in range(len(volume))]
    )
    first = pydicom.dcmread(series[0])
    for keyword in ("SeriesInstanceUID", "FrameOfReferenceUID", "StudyInstanceUID"):
        edit(others, **{keyword: first[keyword].value})
    return series, others


def each(paths: Sequence[Path], keyword: str, value: Callable[[int], Any]) -> None:
    for n, path in enumerate(paths):
        edit([path], **{keyword: value(n)})


@pytest.mark.parametrize("keyword", ["AcquisitionNumber", "ConvolutionKernel", "AcquisitionTime"])
@pytest.mark.parametrize("numbers", ["none", "same", "one after the other"])
def test_two_passes_are_not_woven_into_one_volume(
    two_phases: Any, tmp_path: Path, keyword: str, numbers: str
) -> None:
    one, other = two_phases
    edit(one, **{keyword: "101010"})
    edit(other, **{keyword: "101110"})
    if numbers == "same":
        edit([*one, *other], InstanceNumber=1)
    elif numbers != "none":
        each([*one, *other], "InstanceNumber", lambda n: n + 1)
    said = refusal(tmp_path / "series", tmp_path)
    assert "holds 2 passes over the same region (40 images from " in said
    assert ": put each in a folder of its own" in said


def _clock(n: int, start: str = "1010") -> str:
    return f"{start}{n // 10:02d}.{n % 10}00000"


@pytest.mark.parametrize("back", [False, True], ids=["same way", "back"])
@pytest.mark.parametrize("lost", [0, 1], ids=["whole", "one slice lacks it"])
@pytest.mark.parametrize(
    ("keyword", "first", "second"),
    [
        ("InstanceNumber", lambda n: n + 1, lambda n: n + 41),
        ("InstanceNumber", lambda n: n + 1, lambda n: n + 1),
        ("AcquisitionTime", _clock, lambda n: _clock(n, "1011")),
        ("AcquisitionTime", lambda n: _clock(n // 4), lambda n: _clock(n // 4, "1011")),
        (
            "AcquisitionDateTime",
            lambda n: f"20200101{_clock(n)}+0100",
            lambda n: f"20200101{_clock(n, '1011')}",
        ),
    ],
    ids=["numbers go on", "numbers start anew", "time per slice", "time per shot", "date and time"],
)
def test_two_passes_are_told_apart_by_their_order(
    two_phases: Any, tmp_path: Path, keyword: str, first: Any, second: Any, lost: int, back: bool
) -> None:
    one, other = two_phases
    each(one, keyword, first)
    each(other[:: -1 if back else 1], keyword, second)
    if lost:
        edit(one[20:21], **{keyword: ""})
    assert "holds 2 passes over the same region (" in refusal(tmp_path / "series", tmp_path)


def test_a_second_pass_that_is_one_slice_shorter_is_found_by_its_numbers(
    two_phases: Any, tmp_path: Path
) -> None:
    for paths in two_phases:
        each(paths, "InstanceNumber", lambda n: n + 1)
    two_phases[1][-1].unlink()
    assert "holds 2 passes over the same region (40 images from" in refusal(tmp_path / "series", tmp_path)


@pytest.mark.parametrize("names", ["a/{n:03d} b/{n:03d}", "{n} {m}", "IM{n}.dcm IM{m}.dcm", "x{n}y1 x{n}y2"])
@pytest.mark.parametrize("numbers", [None, 1])
def test_without_times_and_numbers_the_files_names_tell_two_passes_apart(
    two_phases: Any, tmp_path: Path, names: str, numbers: int | None
) -> None:
    for paths, name in zip(two_phases, names.split(), strict=True):
        for n, path in enumerate(paths):
            if numbers is not None:
                edit([path], InstanceNumber=numbers)
            target = tmp_path / "series" / name.format(n=n + 1, m=n + 41)
            target.parent.mkdir(exist_ok=True)
            path.rename(target)
    if "y1" in names:  # in the order of space: nothing tells
        assert notes_of(tmp_path / "series", tmp_path) == ()
    else:
        assert "holds 2 passes over the same region (40 images from" in refusal(tmp_path / "series", tmp_path)


@pytest.mark.parametrize("name", ["{n}", "IM{n:04d}", "{back}", "a{anew}/{n}", "{shuffled}", "{anew}/{n}"])
def test_names_of_one_pass(series: list[Path], tmp_path: Path, name: str) -> None:
    for n, path in enumerate(series):
        parts = {"n": n, "back": 40 - n, "anew": n % 13, "shuffled": _SHUFFLED[n]}
        target = tmp_path / "series" / "in" / name.format(**parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    assert notes_of(tmp_path / "series", tmp_path) == ()


def test_two_passes_at_the_same_places(series: list[Path], tmp_path: Path) -> None:
    edit(series, AcquisitionNumber=1)
    for path in series:
        shutil.copy(path, path.with_name(f"{path.name}b"))
    assert "are at the same position: delete one of them" in refusal(tmp_path / "series", tmp_path)
    each([p.with_name(f"{p.name}b") for p in series], "InstanceNumber", lambda n: n + 1)
    each(series, "InstanceNumber", lambda n: n + 1)
    assert "are at the same position: delete one of them" in refusal(tmp_path / "series", tmp_path)
    edit([p.with_name(f"{p.name}b") for p in series], AcquisitionNumber=2)
    assert "holds 2 passes over the same region (40 images from" in refusal(tmp_path / "series", tmp_path)


_SHUFFLED = np.random.default_rng(0).permutation(40).tolist()


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("AcquisitionTime", _clock),
        ("AcquisitionTime", lambda n: _clock(39 - n)),
        ("AcquisitionTime", lambda n: _clock(n // 4)),
        ("AcquisitionTime", lambda n: _clock(n // 20)),
        ("AcquisitionTime", lambda n: _clock((n + 20) % 40)),  # the upper slab first
        ("AcquisitionTime", lambda n: _clock((0, 2, 1, 3)[n // 10])),  # slabs in any order
        ("AcquisitionTime", lambda n: _clock(n, "1010" if n < 20 else "0000")),  # past midnight
        ("AcquisitionTime", lambda n: _clock(n ^ 1 if n in (2, 3, 20, 21) else n)),  # two pairs swapped
        ("AcquisitionTime", lambda n: _clock(_SHUFFLED[n])),
        ("AcquisitionTime", lambda n: _clock(_SHUFFLED[n] // 4)),
        ("AcquisitionTime", lambda _: "101010"),
        ("AcquisitionTime", lambda _: "noon"),
        ("AcquisitionTime", lambda n: "101011" if n == 7 else "101010"),
        ("InstanceNumber", lambda n: _SHUFFLED[n]),
        ("InstanceNumber", lambda n: n ^ 1 if n in (2, 3, 20, 21) else n),
        ("InstanceNumber", lambda _: 1),
        ("InstanceNumber", lambda n: n % 20),  # slabs that are each numbered anew
        ("InstanceNumber", lambda n: n if n < 20 else 39 - n),
        ("InstanceNumber", lambda n: n // 20),
        ("InstanceNumber", lambda n: "" if n == 7 else n),
        ("InstanceNumber", lambda n: 8 if n == 7 else n),
    ],
)
def test_one_pass_in_any_legitimate_order_is_one_volume(
    series: list[Path], tmp_path: Path, keyword: str, value: Any
) -> None:
    each(series, keyword, value)
    assert notes_of(tmp_path / "series", tmp_path) == ()


def test_numbers_that_occur_twice_do_not_outweigh_times_from_end_to_end(
    series: list[Path], tmp_path: Path
) -> None:
    each(series, "InstanceNumber", lambda n: n // 2)
    assert "holds 2 passes over the same region" in refusal(tmp_path / "series", tmp_path)
    each(series, "AcquisitionTime", _clock)
    assert notes_of(tmp_path / "series", tmp_path) == ()


@pytest.mark.parametrize(
    ("keyword", "usual", "odd"),
    [
        ("AcquisitionNumber", "3", ""),
        ("ConvolutionKernel", "B30f", ""),
        ("ImageType", "ORIGINAL\\PRIMARY\\AXIAL", ""),
        ("KVP", "120", "120.0"),
        ("KVP", "120", "1.2e2"),
        ("KVP", "", "120"),
        ("AcquisitionNumber", "3", "+03"),
        ("PatientName", "A^B", "A^B^^"),
        ("PatientName", "A^B=C^D", "A^B ^ ^=C^D^="),
        ("PatientName", "A^B", ""),
        ("FrameOfReferenceUID", "1.2.3", ""),
    ],
)
@pytest.mark.parametrize("which", [0, 7, 39])
def test_no_value_and_another_spelling_are_no_other_pass_or_patient(
    series: list[Path], tmp_path: Path, keyword: str, usual: str, odd: str, which: int
) -> None:
    edit(series, **{keyword: usual})
    edit(series[which : which + 1], **{keyword: odd})
    assert notes_of(tmp_path / "series", tmp_path) == ()


def test_a_value_that_half_of_the_slices_lack_tells_two_passes_apart(two_phases: Any, tmp_path: Path) -> None:
    edit(two_phases[0], AcquisitionNumber=1)
    assert "holds 2 passes over the same region (40 images from" in refusal(tmp_path / "series", tmp_path)


def test_types_of_images_that_differ_late_tell_two_passes_apart(two_phases: Any, tmp_path: Path) -> None:
    for paths, energy in zip(two_phases, ("40 KEV", "70 KEV"), strict=True):
        edit(paths, ImageType=["DERIVED", "SECONDARY", "AXIAL", *["CT_SOM7 SPI DUAL"] * 4, energy])
    assert "holds 2 passes over the same region (40 images from" in refusal(tmp_path / "series", tmp_path)


def test_a_slice_without_pixels_says_what_to_do(series: list[Path], tmp_path: Path) -> None:
    edit(series[7:8], PixelData=None)
    said = refusal(tmp_path / "series", tmp_path)
    assert "s007: its pixels cannot be decoded (The dataset has no 'Pixel Data'" in said
    assert said.endswith("): export the series again, uncompressed if possible")


@pytest.mark.parametrize("keyword", ["PatientID", "PatientName", "StudyInstanceUID"])
def test_slices_of_two_patients_are_not_one_volume(series: list[Path], tmp_path: Path, keyword: str) -> None:
    edit(series, **{keyword: "1.2.3"})
    edit(series[:4], **{keyword: "1.2.4"})
    said = refusal(series[0].parent, tmp_path)
    assert f"are of one series, but differ in {keyword}" in said
    assert "1.2.3" not in said
    edit(series[:4], **{keyword: ""})  # what an anonymizer has blanked here and there says nothing
    assert notes_of(series[0].parent, tmp_path) == ()


def test_slabs_of_one_pass_are_one_volume(series: list[Path], tmp_path: Path) -> None:
    """Scanners that stop between slabs number them as acquisitions."""
    edit(series[:20], AcquisitionNumber=1)
    edit(series[20:], AcquisitionNumber=2)
    edit(series[7:8], AcquisitionNumber="")
    for n, path in enumerate(reversed(series)):
        edit([path], InstanceNumber=n + 1)
    assert notes_of(tmp_path / "series", tmp_path) == ()


@pytest.mark.parametrize("how", ["sideways", "pitch", "one slice"])
def test_slices_off_the_line_are_refused(series: list[Path], tmp_path: Path, how: str) -> None:
    for k, path in enumerate(series):
        x, y, z = map(float, pydicom.dcmread(path).ImagePositionPatient)
        if how == "sideways" and k >= 20:
            x += 20
        elif how == "pitch":
            z += 0.08 * 2.5 * max(0, k - 20)
        elif how == "one slice" and k == 13:
            y += 3
        edit([path], ImagePositionPatient=[x, y, z])
    assert "off the straight line of evenly spaced slices" in refusal(tmp_path / "series", tmp_path)


@pytest.fixture
def rounded(scan: Any, tmp_path: Path) -> Callable[[float, str], list[Path]]:
    """Writes a series of a spacing and plane, with positions of one decimal."""
    _, volume, affine = scan

    def write(step_mm: float, plane: str) -> list[Path]:
        at = affine @ np.diag([1, 1, step_mm / np.linalg.norm(affine[:3, 2]), 1])
        if plane == "tilted gantry":
            at[1, 2] += 0.3 * step_mm
        elif plane == "oblique":
            at = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.2, 0.3, 0.25)) @ at
        paths = write_series(tmp_path / "series", volume, at, names=[f"s{k:03d}" for k in range(len(volume))])
        for path in paths:
            found = pydicom.dcmread(path).ImagePositionPatient
            edit([path], ImagePositionPatient=[f"{float(v):.1f}" for v in found])
        return paths

    return write


@pytest.mark.parametrize("plane", ["axial", "tilted gantry", "oblique"])
@pytest.mark.parametrize("step_mm", [0.3, 0.5, 0.625, 0.67, 0.75, 1.25, 3.27])
def test_positions_of_one_decimal_are_evenly_spaced(
    rounded: Any, tmp_path: Path, step_mm: float, plane: str
) -> None:
    paths = rounded(step_mm, plane)
    assert notes_of(tmp_path / "series", tmp_path) == ()
    zooms = nib.Nifti1Image.from_filename(tmp_path / "out.nii").header.get_zooms()
    tilt = 1.09**0.5 if plane == "tilted gantry" else 1
    assert zooms[2] == pytest.approx(step_mm * tilt, abs=0.2 / (len(paths) - 1))
    for gone in (1, 20, 38):
        paths[gone].rename(tmp_path / "away")
        assert (
            f"1 slice is missing between {paths[gone - 1].name} and {paths[gone + 1].name}: "
            in refusal_again(tmp_path / "series", tmp_path)
        )
        (tmp_path / "away").rename(paths[gone])


def refusal_again(source: Path, tmp_path: Path) -> str:
    (tmp_path / "out.nii").unlink(missing_ok=True)
    return refusal(source, tmp_path)


def test_a_slice_off_its_place_is_found_between_close_ones(rounded: Any, tmp_path: Path) -> None:
    paths = rounded(0.5, "axial")
    x, y, z = map(float, pydicom.dcmread(paths[13]).ImagePositionPatient)
    edit(paths[13:14], ImagePositionPatient=[x, y, f"{z + 0.2:.1f}"])
    assert "the slices are not evenly spaced between s012 and s013" in refusal(tmp_path / "series", tmp_path)


def test_steps_that_no_rounding_explains_are_uneven(rounded: Any, tmp_path: Path) -> None:
    paths = rounded(0.5, "axial")
    for path in paths[1::2]:  # such as two phases, 0.2 mm apart
        x, y, z = map(float, pydicom.dcmread(path).ImagePositionPatient)
        edit([path], ImagePositionPatient=[x, y, f"{z - 0.08:.2f}"])
    assert "the slices are not evenly spaced between" in refusal(tmp_path / "series", tmp_path)


def test_another_frame_of_reference_is_refused(series: list[Path], tmp_path: Path) -> None:
    edit(series[20:], FrameOfReferenceUID=pydicom.uid.generate_uid())
    assert "has another frame of reference than s000" in refusal(tmp_path / "series", tmp_path)


# ---- zips


@pytest.mark.parametrize(
    ("local", "central", "value", "words"),
    [
        (8, 10, 9, "Deflate64"),
        (6, 8, 1, "is encrypted: unpack it and name the folder"),
        (8, 10, 99, "cannot be read"),
    ],
    ids=["Deflate64", "encrypted", "unknown method"],
)
def test_zips_that_cannot_be_inflated(
    series: list[Path], tmp_path: Path, local: int, central: int, value: int, words: str
) -> None:
    path = zipped(series, tmp_path / "x.zip")
    content = bytearray(path.read_bytes())
    for magic, offset in ((b"PK\3\4", local), (b"PK\1\2", central)):
        at = -1
        while (at := content.find(magic, at + 1)) >= 0:
            content[at + offset] = value
    path.write_bytes(content)
    assert words in refusal(path, tmp_path)


def zipped(paths: Sequence[Path], path: Path, how: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", how) as archive:
        for member in paths:
            archive.write(member, member.name)
    return path


def test_a_zip_that_was_packed_on_windows(series: list[Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("study\\ser\\", b"")
        archive.writestr("__MACOSX\\ser\\s000", b"\0\5\x16\7" + bytes(200))
        for path in series:
            archive.write(path, f"study\\ser\\{path.name}")
            archive.writestr(f"study\\ser\\._{path.name}", b"\0\5\x16\7" + bytes(200))
    (note,) = notes_of(tmp_path / "x.zip", tmp_path)
    assert "41 × hidden file" in note


@pytest.mark.parametrize(
    "how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_flipped_bytes_of_a_zip_never_pass(series: list[Path], tmp_path: Path, how: int) -> None:
    whole = zipped(series[:5], tmp_path / "x.zip", how).read_bytes()
    rng = np.random.default_rng(how)
    for at in rng.integers(0, len(whole), 25):
        content = bytearray(whole)
        content[at] ^= int(rng.integers(1, 256))
        (tmp_path / "x.zip").write_bytes(content)
        with contextlib.suppress(VolumeError):
            notes_of(tmp_path / "x.zip", tmp_path)
            # Not refused: a byte that nothing reads, such as one of a member's date.
            assert nib.Nifti1Image.from_filename(tmp_path / "out.nii").shape[2] == 5


def test_a_zip_is_opened_once(series: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zipped(series, tmp_path / "x.zip")
    opened: list[object] = []
    original = zipfile.ZipFile.__init__

    def counting(self: zipfile.ZipFile, *arguments: Any, **options: Any) -> None:
        opened.append(arguments)
        original(self, *arguments, **options)

    monkeypatch.setattr(zipfile.ZipFile, "__init__", counting)
    notes_of(path, tmp_path)
    assert len(opened) == 1


def test_headers_are_read_without_their_pixels(series: list[Path]) -> None:
    """A series on a network disk is looked at first: only the blocks before the pixels are asked for."""
    with DicomSource.open(series[0].parent) as source:
        (file, *_) = source.files()
        with source.opened(file) as stream:
            parse(stream, pixels=False)
            assert stream.tell() < file.size_bytes // 2


def test_a_zip_of_nifti_files_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(b"x" * 100)
    path = zipped([tmp_path / "a.nii.gz"], tmp_path / "x.zip")
    assert "unpack it and name the NIfTI files" in refusal(path, tmp_path)
