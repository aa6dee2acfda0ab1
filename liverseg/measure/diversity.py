"""How the samples of a case differ, from each other and from the truth: energy distance, diversity, volumes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from liverseg.measure.summary import CLASSES

# 17 masks of it as float32 are 18 MB; and a float32 product counts exactly up to 16 million.
_CHUNK_VOXELS = 1 << 18

Overlap = Literal["iou", "dice"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairCounts:
    """Voxels that any two of a case's n samples and its truth share; adds up over the blocks of the case.

    Over cases nothing adds up: average what follows from each.

    Attributes:
        shared_cmm: (2, n + 1, n + 1) int64, of liver (label ≥ 1) and tumour (label 2); the last row and column
            is the truth's, and the diagonal holds each one's own voxels.
    """

    shared_cmm: NDArray[np.int64]

    @classmethod
    def empty(cls, n_samples: int) -> PairCounts:
        """No voxel yet."""
        return cls(shared_cmm=np.zeros((len(CLASSES), n_samples + 1, n_samples + 1), dtype=np.int64))

    @classmethod
    def from_block(cls, labels_nzyx: NDArray[np.uint8], truth_zyx: NDArray[np.uint8]) -> PairCounts:
        """Count a block of any shape.

        Args:
            labels_nzyx: (n, ...) labels 0, 1, 2 of the samples.
            truth_zyx: (...) the true ones of the same voxels.

        Raises:
            ValueError: The shapes do not fit.
        """
        if labels_nzyx.shape[1:] != truth_zyx.shape:
            raise ValueError(f"need samples of the truth's shape, got {labels_nzyx.shape}, {truth_zyx.shape}")
        total = cls.empty(len(labels_nzyx)).shared_cmm
        for labels_mv in _chunks(labels_nzyx.reshape(len(labels_nzyx), -1), truth_zyx.ravel()):
            for shared_mm, least in zip(total, (1, 2), strict=True):
                mask_mv = (labels_mv >= least).astype(np.float32)
                shared_mm += (mask_mv @ mask_mv.T).astype(np.int64)
        return cls(shared_cmm=total)

    def __add__(self, other: PairCounts) -> PairCounts:
        if self.shared_cmm.shape != other.shared_cmm.shape:
            raise ValueError(f"{self.n_samples} and {other.n_samples} samples are not of one case")
        return PairCounts(shared_cmm=self.shared_cmm + other.shared_cmm)

    @property
    def n_samples(self) -> int:
        """Without the truth."""
        return len(self.shared_cmm[0]) - 1

    @property
    def dice_of_samples(self) -> tuple[float, float]:
        """Mean Dice of the samples with the truth, for liver and for tumour; 1 where both are empty."""
        liver, tumour = self._overlap("dice")[:, :-1, -1].mean(axis=1)
        return float(liver), float(tumour)

    @property
    def pairwise_dice(self) -> tuple[float, float] | None:
        """Mean Dice over pairs of different samples, for liver and for tumour; 1 where both lack it, None for n = 1.

        The simple failure detector of Zenk et al. 2024 (arXiv:2406.03323).
        """
        first, second = np.triu_indices(self.n_samples, k=1)
        if not first.size:
            return None
        liver, tumour = self._overlap("dice")[:, first, second].mean(axis=1)
        return float(liver), float(tumour)

    def volumes_ml(self, voxel_volume_ml: float) -> NDArray[np.float64]:
        """(2, n) volumes of liver, tumours within, and of tumour in each sample."""
        voxels_cm = np.diagonal(self.shared_cmm, axis1=1, axis2=2)
        return voxels_cm[:, :-1].astype(np.float64) * voxel_volume_ml

    def ged(self, overlap: Overlap = "iou") -> float:
        """Generalised energy distance, squared: 2 E d(S, Y) - E d(S, S'); 0 where all samples are the truth.

        Kohl et al. 2018 (arXiv:1806.05034), with d = 1 - overlap, mean over liver and tumour, a class that both
        lack overlapping by 1; the third term, over pairs of truths, is 0 for the one that there is. E d(S, S')
        is the mean over all n² pairs, a sample with itself among them (a V-statistic), as in the code of ValUES
        (Kahl et al. 2024). So n = 1 gives 2 d. Never below 0.

        Args:
            overlap: "iou" is Kohl's; ValUES's code takes "dice", and its tables have 100 times that.
        """
        distance = self._distance(overlap)
        return float(2 * distance[:-1, -1].mean() - distance[:-1, :-1].mean())

    @property
    def diversity(self) -> float | None:
        """Mean d(S, S') by IoU over pairs of different samples; 0 where all agree, None for n = 1."""
        n = self.n_samples
        # The diagonal is 0 and need not be left out of the sum.
        return float(self._distance("iou")[:-1, :-1].sum()) / (n * (n - 1)) if n > 1 else None

    def to_json(self) -> dict[str, float | None]:
        """All figures except the volumes, as plain numbers."""
        dice = dict(zip(CLASSES, self.dice_of_samples, strict=True))
        return {
            "ged_iou": self.ged("iou"),
            "ged_dice": self.ged("dice"),
            "diversity": self.diversity,
            **{f"{name}_dice_of_samples": value for name, value in dice.items()},
        }

    def _distance(self, overlap: Overlap) -> NDArray[np.float64]:
        distance: NDArray[np.float64] = 1.0 - self._overlap(overlap).mean(axis=0)
        return distance

    def _overlap(self, overlap: Overlap) -> NDArray[np.float64]:
        """(2, n + 1, n + 1) of each pair, by class."""
        sizes_cm = np.diagonal(self.shared_cmm, axis1=1, axis2=2)
        both_cmm = sizes_cm[:, :, None] + sizes_cm[:, None, :]
        part, whole = self.shared_cmm, both_cmm - self.shared_cmm
        if overlap == "dice":
            part, whole = 2 * self.shared_cmm, both_cmm
        overlaps = np.ones(whole.shape)
        np.divide(part, whole, out=overlaps, where=whole > 0)
        return overlaps


def _chunks(labels_nv: NDArray[np.uint8], truth_v: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """(n + 1, voxels) of the voxels that anyone labels, the truth last, a piece at a time."""
    # A liver is a twentieth of a scan: what all call background adds nothing to any count.
    labelled = np.flatnonzero(labels_nv.any(axis=0) | (truth_v > 0))
    for first in range(0, labelled.size, _CHUNK_VOXELS):
        at = labelled[first : first + _CHUNK_VOXELS]
        yield np.concatenate((labels_nv[:, at], truth_v[None, at]))
