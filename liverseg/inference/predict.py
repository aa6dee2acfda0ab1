"""One scan in, one label file out, on the scan's own grid; volumes and a picture beside it on request."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_cache.errors import VolumeError
from data_cache.geometry import Box
from data_cache.outputs import Mark, json_mark, nifti_mark, png_mark, require_replaceable, write_signed_json
from data_cache.text import visible
from liverseg.inference.calibration import Calibration
from liverseg.inference.dicom_seg import SEG_MARK, SUFFIX, require_referable, write_dicom_seg
from liverseg.inference.inputs import NiftiScan, ScanInput
from liverseg.inference.plausible import judge_segmentation, measure_segmentation
from liverseg.inference.segment import Predictor, ScanSegmentation, segment
from liverseg.inference.uncertainty_files import (
    UncertaintySummary,
    map_values,
    uncertainty_outputs,
    write_uncertainty,
)
from liverseg.measure.lesion_count import LesionCounter
from liverseg.measure.plausibility import NO_PATIENT_ML, AnswerFacts, Plausibility
from pipeline.labels import decide
from pipeline.memory import held_bytes
from pipeline.nifti import write_labels
from pipeline.nifti.write import LABEL_DESCRIPTION
from pipeline.prepare import HeldScan, read_scan
from pipeline.restore import native_labels, one_thread
from pipeline.sanity import require_plausible

STATISTICS = "statistics.csv"  # of all scans of a command
MOST_REASONS_SHOWN = 2  # on a picture
DOUBTS_FIGURE = "doubts.png"
Stages = Generator[int, None, "Prediction"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What was written for one image.

    Attributes:
        found: False where no liver was found; the label is then empty.
        liver_ml, tumour_ml: Native volumes; the liver's includes its tumours.
        n_lesions: 26-connected pieces of tumour, counted on the scan's own grid.
        n_doubtful: Tumours that were left out, since they are nowhere more probable than ``segment.SURE_TUMOUR``.
        liver_box: Native voxels of the fine pass, in canonical (RAS+) orientation; None without a liver.
        read_s, network_s, write_s: Seconds per part.
        notes: What was assumed or replaced while reading.
        uncertainty: What the samples disagree on; None where none were drawn.
        plausibility: Whether the answer can be a liver.
        trained_on: What each network learned from, in words; None where it is not recorded.
    """

    image: Path
    label: Path
    found: bool
    liver_ml: float
    tumour_ml: float
    n_lesions: int
    n_doubtful: int
    liver_box: Box | None
    read_s: float
    network_s: float
    write_s: float
    notes: tuple[str, ...]
    uncertainty: UncertaintySummary | None
    plausibility: Plausibility
    trained_on: tuple[str | None, ...]

    def row(self) -> dict[str, str | float | int | bool]:
        """What ``statistics.csv`` says of the scan; names, not paths: a folder often carries the patient's name."""
        return {
            "scan": visible(self.image.name),
            "liver_ml": round(self.liver_ml, 2),
            "tumour_ml": round(self.tumour_ml, 3),
            "lesions": self.n_lesions,
            "doubtful": self.n_doubtful,
            "plausible": self.plausibility.plausible,
            "reasons": "; ".join(self.plausibility.reasons),
            "seconds": round(self.read_s + self.network_s + self.write_s, 2),
        }

    def line(self) -> str:
        """What was found, how sure that is, where it was written and how long each part took."""
        times = f"read {self.read_s:.2f} s, network {self.network_s:.2f} s, write {self.write_s:.2f} s"
        uncertainty = "" if self.uncertainty is None else f"; {self.uncertainty.line()}"
        return f"{self.label}: {self._volumes()}{uncertainty} ({times})"

    def _volumes(self) -> str:
        if not self.found:
            return "no liver found"
        if not NO_PATIENT_ML[0] <= self.liver_ml <= NO_PATIENT_ML[1]:
            return "NOT PLAUSIBLE: a volume that no patient has"
        doubtful = f", {self.n_doubtful} doubtful left out" if self.n_doubtful else ""
        volumes = f"liver {self.liver_ml:.0f} mL, tumour {self.tumour_ml:.1f} mL{doubtful}"
        return volumes if self.plausibility.plausible else f"NOT PLAUSIBLE: {volumes}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictOptions:
    """What is written beside a label, and what is taken for a scan.

    Attributes:
        preview: Also write ``NAME.png``, a picture.
        statistics: Also write ``NAME.json``, volumes and times.
        dicom_seg: Also write ``NAME_seg.dcm``; the scan must be a DICOM series.
        series: SeriesInstanceUID to take, where the DICOM files are of several series.
        force: Also segment what is not a CT in HU, or has an impossible grid.
        calibration: Applied to the uncertainty, with samples.
    """

    preview: bool = False
    statistics: bool = False
    dicom_seg: bool = False
    series: str | None = None
    force: bool = False
    calibration: Calibration | None = None


LABEL_ALONE = PredictOptions()


def predict_scan(
    scan: ScanInput, out: Path, predictor: Predictor, options: PredictOptions = LABEL_ALONE
) -> Prediction:
    """Segment a scan and write ``out/NAME.nii.gz``, where NAME is the scan's.

    With samples, the folder ``NAME_uncertainty`` is also written: see ``write_uncertainty``.

    Args:
        scan: What to segment.
        out: Folder of the label; made if it is missing.
        predictor: The networks.
        options: What else is written.

    Raises:
        VolumeError: The scan cannot be read, or its label would overwrite it.
        ImplausibleScanError: The scan is not a CT in HU on a believable grid, and ``force`` is not set.
        OutputError: A file would be replaced that ``liverseg predict`` did not write.
    """
    return finish(predict_stages(scan, out, predictor, options))


def finish(stages: Stages) -> Prediction:
    """Run the stages that are left."""
    while True:
        try:
            next(stages)
        except StopIteration as end:
            prediction: Prediction = end.value
            return prediction


def predict_stages(
    scan: ScanInput, out: Path, predictor: Predictor, options: PredictOptions = LABEL_ALONE
) -> Stages:
    """``predict_scan`` in four stages, each of which may run in another thread: open, read, segment, write.

    Yields the bytes that reading will hold once the scan is open, then 0 once it is read and once it is segmented.
    Closed before its end, it deletes what it has converted and writes nothing.
    """
    for path, mark in _outputs(out, scan.name, options, samples=predictor.samples > 0):
        require_replaceable(path, mark, command="predict")
    started = time.perf_counter()
    with scan.as_nifti(series=options.series, force=options.force, scratch=out) as nifti:
        label = out / f"{scan.name}.nii.gz"
        # Not Path.resolve, which raises on a loop of links.
        if os.path.realpath(label) == os.path.realpath(scan.path):
            raise VolumeError(f"{scan.path}: its label would overwrite it: name another --out")
        if options.dicom_seg:
            require_referable(scan.path, uid=options.series, force=options.force)
        open_s = time.perf_counter() - started
        yield held_bytes(nifti.path)
        started = time.perf_counter()
        with one_thread():
            held = read_scan(nifti.path, predictor.spec)
        require_plausible(scan.path, held.doubts, force=options.force)
        read_s = open_s + time.perf_counter() - started
        yield 0
        segmented = _segment(held, predictor, read_s=read_s)
        del held
        yield 0
        return _write_prediction(scan, nifti, segmented, out, predictor, options)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Segmented:
    """A scan that only has to be written.

    Attributes:
        held: Without its voxels, unless uncertainty is computed from them.
    """

    held: HeldScan
    found: ScanSegmentation
    facts: AnswerFacts | None
    read_s: float
    network_s: float


def _segment(held: HeldScan, predictor: Predictor, *, read_s: float) -> _Segmented:
    started = time.perf_counter()
    found = segment(held, predictor)
    facts = measure_segmentation(found, held)
    return _Segmented(
        # The next scan's voxels may be in memory by the time this one is written, which needs the header alone.
        held=held if predictor.samples else replace(held, blocks=()),
        found=found,
        facts=facts,
        read_s=read_s,
        network_s=time.perf_counter() - started,
    )


def _write_prediction(
    scan: ScanInput,
    nifti: NiftiScan,
    segmented: _Segmented,
    out: Path,
    predictor: Predictor,
    options: PredictOptions,
) -> Prediction:
    label, found, held = out / f"{scan.name}.nii.gz", segmented.found, segmented.held
    started = time.perf_counter()
    written, uncertainty = _write(label, found, held, predictor, options)
    write_s = time.perf_counter() - started
    voxel_ml = held.header.grid.voxel_volume_ml
    liver_ml, tumour_ml = written.n_labelled * voxel_ml, written.n_tumour * voxel_ml
    prediction = Prediction(
        image=scan.path,
        label=label,
        found=found.box is not None,
        liver_ml=liver_ml,
        tumour_ml=tumour_ml,
        n_lesions=written.lesions.count,
        n_doubtful=found.n_doubtful,
        liver_box=found.box,
        read_s=segmented.read_s,
        network_s=segmented.network_s,
        write_s=write_s,
        notes=(*nifti.notes, *held.notes, *map(str, held.doubts)),
        uncertainty=uncertainty,
        plausibility=judge_segmentation(
            segmented.facts, predictor.training, liver_ml=liver_ml, tumour_ml=tumour_ml
        ),
        trained_on=tuple(None if data is None else data.line() for data in predictor.training),
    )
    _write_beside(scan, nifti, held, found, prediction, options)
    return prediction


class _Written:
    """What a label has, counted while its blocks pass to the file: it is never whole in memory."""

    def __init__(self) -> None:
        self.n_labelled = self.n_tumour = 0
        self.lesions = LesionCounter()

    def counted(self, blocks: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
        """The same blocks."""
        for block in blocks:
            labelled = int(np.count_nonzero(block))  # bincount is ten times slower
            tumour = block == 2 if labelled else np.zeros((1, *block.shape[1:]), dtype=bool)
            self.n_labelled += labelled
            self.n_tumour += int(np.count_nonzero(tumour))
            self.lesions.add(tumour)
            yield block


def _write(
    label: Path, found: ScanSegmentation, held: HeldScan, predictor: Predictor, options: PredictOptions
) -> tuple[_Written, UncertaintySummary | None]:
    """Write the label and, of samples, the uncertainty; returns what the label has."""
    written = _Written()
    label.parent.mkdir(parents=True, exist_ok=True)
    blocks = native_labels(found.foreground_czyx, found.box or held.scan_box, held.header)
    with one_thread():
        write_labels(label, held.header, written.counted(blocks))
    if not predictor.samples:
        return written, None
    folder = _doubts_folder(label.parent, label.name.removesuffix(".nii.gz"))
    return written, write_uncertainty(
        folder, found, held, predictor.training, calibration=options.calibration
    )


def _write_beside(
    scan: ScanInput,
    nifti: NiftiScan,
    held: HeldScan,
    found: ScanSegmentation,
    prediction: Prediction,
    options: PredictOptions,
) -> None:
    stem = prediction.label.parent / scan.name
    if options.statistics:
        _write_statistics(stem.with_name(f"{scan.name}.json"), prediction)
    if options.dicom_seg:
        write_dicom_seg(
            stem.with_name(f"{scan.name}{SUFFIX}"),
            series=scan.path,
            label=prediction.label,
            uid=options.series,
            force=options.force,
        )
    if options.preview:
        _draw_preview(stem.with_name(f"{scan.name}.png"), nifti.path, held, found, prediction)


def _outputs(out: Path, name: str, options: PredictOptions, *, samples: bool) -> Iterator[tuple[Path, Mark]]:
    """The files that will be written for a scan, and the marks that an earlier version of each carries."""
    yield out / f"{name}.nii.gz", nifti_mark(LABEL_DESCRIPTION)
    if options.statistics:
        yield out / f"{name}.json", json_mark("predict")
    if options.dicom_seg:
        yield out / f"{name}{SUFFIX}", SEG_MARK
    if options.preview:
        yield out / f"{name}.png", png_mark("predict")
    if samples:
        yield from uncertainty_outputs(_doubts_folder(out, name))
    if samples and options.preview:
        yield _doubts_folder(out, name) / DOUBTS_FIGURE, png_mark("predict")


def _write_statistics(path: Path, prediction: Prediction) -> None:
    # Names, not paths: a folder often carries the patient's name.
    names = {"image": visible(prediction.image.name), "label": visible(prediction.label.name)}
    content = {"plausible": prediction.plausibility.plausible} | asdict(prediction) | names
    write_signed_json(path, content, command="predict")


def _draw_preview(
    path: Path,
    image: Path,
    held: HeldScan,
    found: ScanSegmentation,
    prediction: Prediction,
) -> None:
    from liverseg.pictures.figures import preview_figure
    from liverseg.pictures.sheet import save
    from liverseg.pictures.uncertainty_figures import UncertaintyMaps, uncertainty_figure

    box = found.box or held.scan_box
    name, _, words = prediction.line().partition(": ")
    shown = visible(Path(name).name).replace("$", r"\$")  # a dollar sign would start a formula
    reasons = prediction.plausibility.reasons[:MOST_REASONS_SHOWN]
    # Three lines: a page has no room for more above its pictures.
    known = dict.fromkeys(line for line in prediction.trained_on if line is not None)
    trained = f"; network trained on {' and on '.join(known)}" if known else ""
    lines = [shown, words.partition(" (")[0] + trained, *(["; ".join(reasons)] if reasons else [])]
    title = "\n".join(lines)
    grid = held.header.grid
    figure = preview_figure(
        image, prediction.label, grid.shape_zyx, grid.spacing_zyx_mm, title=title, alarm=bool(reasons)
    )
    save(figure, path, command="predict")
    if found.samples_nczyx is not None:
        view = held.view(box)
        values = {f"{name}_zyx": value for name, value in map_values(found.samples_nczyx).items()}
        maps = UncertaintyMaps(label_zyx=decide(found.foreground_czyx), **values)
        figure = uncertainty_figure(view.image_zyx, maps, view.grid.spacing_zyx_mm, title=title)
        folder = _doubts_folder(path.parent, path.name.removesuffix(".png"))
        save(figure, folder / DOUBTS_FIGURE, command="predict")


def _doubts_folder(out: Path, name: str) -> Path:
    return out / f"{name}_uncertainty"
