"""Files that ``predict --samples`` writes next to a label: three maps on the scan's grid, and a JSON summary."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from data_cache.geometry import Box, resampled_grid
from data_cache.outputs import Mark, json_mark, nifti_mark, write_signed_json
from liverseg.inference.segment import ScanSegmentation, keep_large_components
from liverseg.measure.density import measure_density
from liverseg.measure.diversity import PairCounts
from liverseg.measure.uncertainty import (
    MAX_ENTROPY,
    LesionCandidate,
    VolumeInterval,
    entropy,
    lesion_candidates,
    mean_entropy,
    mean_foreground,
    mutual_information,
    volume_interval,
)
from liverseg.training.training_data import TrainingData
from pipeline.labels import decide
from pipeline.nifti import VolumeHeader, write_map
from pipeline.nifti.write import LARGEST_BYTE
from pipeline.prepare import HeldScan
from pipeline.restore import native_labels, native_values, one_thread

if TYPE_CHECKING:
    from liverseg.inference.calibration import Calibration

DESCRIPTIONS = {
    "entropy": "predictive entropy, nats, at most ln 3",
    "information": "mutual information, nats, at most ln 3",
    "tumour": "probability of tumour",
}
MAX_VALUE = {"entropy": MAX_ENTROPY, "information": MAX_ENTROPY, "tumour": 1.0}
THREADS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class UncertaintySummary:
    """How far the samples of one scan agree; the JSON file next to its label.

    Attributes:
        samples: Number drawn; fewer than requested where networks are not stochastic.
        disagreement: 1 - mean Dice between two samples, the mean over liver and tumour; 1 where no liver was found;
            None for a single sample.
        liver_dice_between, tumour_dice_between: Mean Dice between two samples; None for a single sample.
        mean_entropy: Predictive entropy in and around the liver: see ``uncertainty.mean_entropy``.
        hu_deviation: How unlike the training cases the HU in and around the liver are, in standard deviations: see
            ``DensityReference``; None where the network does not record its training cases' HU.
        liver_ml, tumour_ml: Native volumes over the samples; the liver's includes its tumours.
        lesions: Possible lesions, most likely first.
    """

    samples: int
    disagreement: float | None
    liver_dice_between: float | None
    tumour_dice_between: float | None
    mean_entropy: float
    hu_deviation: float | None
    liver_ml: VolumeInterval
    tumour_ml: VolumeInterval
    lesions: tuple[LesionCandidate, ...]

    def line(self) -> str:
        """The summary in one line."""
        likely = sum(lesion.probability >= 0.5 for lesion in self.lesions)
        disagreement = "" if self.disagreement is None else f"disagreement {self.disagreement:.3f}, "
        deviation = "" if self.hu_deviation is None else f"HU deviation {self.hu_deviation:.1f}, "
        return (
            f"{disagreement}entropy {self.mean_entropy:.3f}, {deviation}"
            f"liver {self.liver_ml.low_ml:.0f} to {self.liver_ml.high_ml:.0f} mL, "
            f"tumour {self.tumour_ml.low_ml:.1f} to {self.tumour_ml.high_ml:.1f} mL, "
            f"{likely} likely and {len(self.lesions) - likely} doubtful lesions"
        )


def summarise_segmentation(
    found: ScanSegmentation, scan: HeldScan, training: Sequence[TrainingData | None]
) -> UncertaintySummary:
    """Judge the samples of a segmentation, and the HU of the scan that it is of.

    Args:
        found: With samples.
        scan: The scan.
        training: What each network learned from.
    """
    assert found.samples_nczyx is not None
    return summarise_uncertainty(
        found.samples_nczyx,
        found.box or scan.scan_box,
        scan.header,
        hu_deviation=_hu_deviation(found, scan, training),
    )


def _hu_deviation(
    found: ScanSegmentation, scan: HeldScan, training: Sequence[TrainingData | None]
) -> float | None:
    """The deviation from what the members of an ensemble have seen, the least of theirs."""
    known = [data.density for data in training if data is not None and data.density is not None]
    if not known:
        return None
    facts = None
    if found.box is not None:
        view = scan.view(found.box)
        facts = measure_density(view.image_zyx, decide(found.foreground_czyx), view.grid.spacing_zyx_mm)
    return min(reference.deviation(facts) for reference in known)


def summarise_uncertainty(
    samples_nczyx: NDArray[np.float32],
    box: Box,
    header: VolumeHeader,
    *,
    hu_deviation: float | None = None,
) -> UncertaintySummary:
    """Judge the samples of a scan.

    Args:
        samples_nczyx: Samples as ``ScanSegmentation`` has them: the full output of the network on the view of ``box``. As
            much memory again is needed: 8 MiB per sample of 64×128×128.
        box: The native voxels of that view.
        header: Header of the scan.
        hu_deviation: Goes into the summary as it is.
    """
    grid = resampled_grid(header.grid, box, samples_nczyx.shape[2:])
    kept = np.empty_like(samples_nczyx)
    for kept_czyx, sample_czyx in zip(kept, samples_nczyx, strict=True):
        kept_czyx[:] = keep_large_components(sample_czyx, voxel_volume_ml=grid.voxel_volume_ml)
    mean_czyx = keep_large_components(mean_foreground(samples_nczyx), voxel_volume_ml=grid.voxel_volume_ml)
    liver_ml, tumour_ml = native_volumes_ml(kept, box, header)
    label_zyx, labels_nzyx = decide(mean_czyx), np.stack([decide(sample_czyx) for sample_czyx in kept])
    between = PairCounts.from_block(labels_nzyx, label_zyx).pairwise_dice
    disagreement = None if between is None else 1 - sum(between) / 2 if label_zyx.any() else 1.0
    return UncertaintySummary(
        samples=len(samples_nczyx),
        disagreement=disagreement,
        liver_dice_between=None if between is None else between[0],
        tumour_dice_between=None if between is None else between[1],
        mean_entropy=mean_entropy(samples_nczyx, label_zyx),
        hu_deviation=hu_deviation,
        liver_ml=volume_interval(liver_ml),
        tumour_ml=volume_interval(tumour_ml),
        lesions=tuple(lesion_candidates(kept, grid)),
    )


def native_volumes_ml(
    samples_nczyx: NDArray[np.float32], box: Box, header: VolumeHeader
) -> NDArray[np.float64]:
    """Volumes (2, n) of the liver with its tumours and of the tumours, each sample decided on the scan's own grid."""

    def count(foreground_czyx: NDArray[np.float32]) -> tuple[int, int]:
        blocks = native_labels(foreground_czyx, box, header)
        counts = [(int(np.count_nonzero(b)), int(np.count_nonzero(b == 2))) for b in blocks]
        return sum(liver for liver, _ in counts), sum(tumour for _, tumour in counts)

    # Small products and large comparisons, neither of which holds the interpreter's lock.
    with ThreadPoolExecutor(THREADS) as pool, one_thread():
        voxels_nc = np.array(list(pool.map(count, samples_nczyx)), dtype=np.float64)
    return voxels_nc.T * header.grid.voxel_volume_ml


def uncertainty_outputs(folder: Path) -> list[tuple[Path, Mark]]:
    """The files of ``write_uncertainty``, and the marks that an earlier version of each carries."""
    maps = [(folder / f"{n}.nii.gz", nifti_mark(f"liverseg: {text}")) for n, text in DESCRIPTIONS.items()]
    return [*maps, (folder / "uncertainty.json", json_mark("predict"))]


def write_uncertainty(
    folder: Path,
    finding: ScanSegmentation,
    held: HeldScan,
    training: Sequence[TrainingData | None],
    *,
    calibration: Calibration | None = None,
) -> UncertaintySummary:
    """Write the maps ``entropy.nii.gz``, ``information.nii.gz`` and ``tumour.nii.gz``, and ``uncertainty.json``.

    Args:
        folder: One per scan, made if it is missing: next to labels, a map could pass for the label of a scan of its name.
        finding: Segmentation with samples.
        held: The scan.
        training: What each network learned from.
        calibration: Applied to the maps of entropy and of tumour, and to the volume intervals; labels stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    assert finding.samples_nczyx is not None
    box = finding.box or held.scan_box
    maps = map_values(finding.samples_nczyx, calibration)
    with one_thread():
        for name, values_zyx in maps.items():
            most, path = MAX_VALUE[name], folder / f"{name}.nii.gz"
            # Values below half a step are written as 0, so they need not be interpolated either.
            values_zyx[values_zyx < most / LARGEST_BYTE / 2] = 0
            blocks = native_values(values_zyx, box, held.header)
            write_map(path, held.header, blocks, maximum=most, description=f"liverseg: {DESCRIPTIONS[name]}")
    uncertainty = summarise_segmentation(finding, held, training)
    if calibration is not None:
        uncertainty = calibration.summary(uncertainty)
    fitted_on = None if calibration is None else list(calibration.case_ids)
    content = {**asdict(uncertainty), "calibrated_on": fitted_on}
    write_signed_json(folder / "uncertainty.json", content, command="predict")
    return uncertainty


def map_values(
    samples_nczyx: NDArray[np.float32], calibration: Calibration | None = None
) -> dict[str, NDArray[np.float32]]:
    """Predictive entropy, mutual information and mean tumour probability (Z, Y, X), by the names of their files."""
    mean_czyx = mean_foreground(samples_nczyx)
    if calibration is not None:
        mean_czyx = calibration.probabilities(mean_czyx)
    return {
        "entropy": entropy(mean_czyx),
        "information": mutual_information(samples_nczyx),
        "tumour": mean_czyx[1].copy(),
    }
