"""Files that ``predict --samples`` writes next to a label: three maps on the scan's grid, and a JSON summary."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_cache.geometry import Box, resampled_grid
from data_cache.outputs import Mark, json_mark, nifti_mark, write_signed_json
from liverseg.inference.segment import ScanSegmentation, keep_largest_component
from liverseg.measure.uncertainty import (
    MAX_ENTROPY,
    LesionCandidate,
    VolumeInterval,
    case_uncertainty,
    entropy,
    lesion_candidates,
    mean_foreground,
    mutual_information,
    volume_interval,
)
from pipeline.labels import decide
from pipeline.nifti import VolumeHeader, write_map
from pipeline.nifti.write import LARGEST_BYTE
from pipeline.prepare import HeldScan
from pipeline.restore import native_labels, native_values, one_thread

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
        case_uncertainty: Number to sort a worklist by, largest first: see ``uncertainty.case_uncertainty``.
        liver_ml, tumour_ml: Native volumes over the samples; the liver's includes its tumours.
        lesions: Possible lesions, most likely first.
    """

    samples: int
    case_uncertainty: float
    liver_ml: VolumeInterval
    tumour_ml: VolumeInterval
    lesions: tuple[LesionCandidate, ...]

    def line(self) -> str:
        """The summary in one line."""
        likely = sum(lesion.probability >= 0.5 for lesion in self.lesions)
        return (
            f"uncertainty {self.case_uncertainty:.3f}, "
            f"liver {self.liver_ml.low_ml:.0f} to {self.liver_ml.high_ml:.0f} mL, "
            f"tumour {self.tumour_ml.low_ml:.1f} to {self.tumour_ml.high_ml:.1f} mL, "
            f"{likely} likely and {len(self.lesions) - likely} doubtful lesions"
        )


def summarise_uncertainty(
    samples_nczyx: NDArray[np.float32], box: Box, header: VolumeHeader
) -> UncertaintySummary:
    """Judge the samples of a scan.

    Args:
        samples_nczyx: Samples as ``ScanSegmentation`` has them: the full output of the network on the view of ``box``. As
            much memory again is needed: 8 MiB per sample of 64×128×128.
        box: The native voxels of that view.
        header: Header of the scan.
    """
    grid = resampled_grid(header.grid, box, samples_nczyx.shape[2:])
    kept = np.empty_like(samples_nczyx)
    for kept_czyx, sample_czyx in zip(kept, samples_nczyx, strict=True):
        kept_czyx[:] = keep_largest_component(sample_czyx, voxel_volume_ml=grid.voxel_volume_ml)
    mean_czyx = keep_largest_component(mean_foreground(samples_nczyx), voxel_volume_ml=grid.voxel_volume_ml)
    liver_ml, tumour_ml = native_volumes_ml(kept, box, header)
    return UncertaintySummary(
        samples=len(samples_nczyx),
        case_uncertainty=case_uncertainty(samples_nczyx, decide(mean_czyx)),
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


def write_uncertainty(folder: Path, finding: ScanSegmentation, thin: HeldScan) -> UncertaintySummary:
    """Write the maps ``entropy.nii.gz``, ``information.nii.gz`` and ``tumour.nii.gz``, and ``uncertainty.json``.

    Args:
        folder: One per scan, made if it is missing: next to labels, a map could pass for the label of a scan of its name.
        finding: Segmentation with samples.
        thin: The scan.
    """
    folder.mkdir(parents=True, exist_ok=True)
    assert finding.samples_nczyx is not None
    box = finding.box or thin.scan_box
    maps = map_values(finding.samples_nczyx)
    with one_thread():
        for name, values_zyx in maps.items():
            most, path = MAX_VALUE[name], folder / f"{name}.nii.gz"
            # Values below half a step are written as 0, so they need not be interpolated either.
            values_zyx[values_zyx < most / LARGEST_BYTE / 2] = 0
            blocks = native_values(values_zyx, box, thin.header)
            write_map(path, thin.header, blocks, maximum=most, description=f"liverseg: {DESCRIPTIONS[name]}")
    uncertainty = summarise_uncertainty(finding.samples_nczyx, box, thin.header)
    write_signed_json(folder / "uncertainty.json", asdict(uncertainty), command="predict")
    return uncertainty


def map_values(samples_nczyx: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """Predictive entropy, mutual information and mean tumour probability (Z, Y, X), by the names of their files."""
    mean_czyx = mean_foreground(samples_nczyx)
    return {
        "entropy": entropy(mean_czyx),
        "information": mutual_information(samples_nczyx),
        "tumour": mean_czyx[1].copy(),
    }
