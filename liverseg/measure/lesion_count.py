"""How many lesions a label has that is never whole in memory: counted while its slices pass."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.lesions import CUBE

Mask = NDArray[np.bool_]


class LesionCounter:
    """Counts the 26-connected lesions of a volume whose slices are added in order, in blocks of any size.

    It keeps the numbers of the last slice alone. Each number's parent is a number of the same lesion, smaller or
    itself, so that lesions that meet in a later slice become one (union-find, Galler & Fischer 1964).
    """

    def __init__(self) -> None:
        self._parents = [0]  # 0 is the background
        self._n_joined = 0
        self._last_ji: NDArray[np.int64] | None = None  # None where it has no lesion

    @property
    def count(self) -> int:
        """Lesions so far."""
        return len(self._parents) - 1 - self._n_joined

    def add(self, tumour_kji: Mask) -> None:
        """Go on with these slices."""
        last_ji, self._last_ji = self._last_ji, None
        shadow_ji: Mask = np.asarray(tumour_kji.any(axis=0))
        rows, columns = np.flatnonzero(shadow_ji.any(axis=1)), np.flatnonzero(shadow_ji.any(axis=0))
        if not rows.size:
            return
        # Lesions fill a small part of a block: only that is labelled.
        window = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        ids_kji, n = ndimage.label(tumour_kji[:, *window], structure=CUBE)
        before = len(self._parents)
        self._parents += range(before, before + n)
        if last_ji is not None:
            self._join(last_ji, self._placed(ids_kji[0], window, last_ji.shape, before))
        self._last_ji = self._placed(ids_kji[-1], window, tumour_kji.shape[1:], before)

    @staticmethod
    def _placed(
        ids_ji: NDArray[np.int32], window: tuple[slice, slice], shape_ji: tuple[int, ...], before: int
    ) -> NDArray[np.int64]:
        """The numbers of a slice in its whole plane, counted on from ``before``."""
        plane_ji = np.zeros(shape_ji, dtype=np.int64)
        plane_ji[window] = np.where(ids_ji > 0, ids_ji + np.int64(before - 1), 0)
        return plane_ji

    def _join(self, below_ji: NDArray[np.int64], above_ji: NDArray[np.int64]) -> None:
        """Make one of the lesions of two neighbouring slices that share a face, an edge or a corner."""
        j, i = np.nonzero(above_ji)
        padded_ji = np.pad(below_ji, 1)
        near = np.stack([padded_ji[j + dj, i + di] for dj in range(3) for di in range(3)])
        pairs = np.stack(np.broadcast_arrays(near, above_ji[j, i]), axis=-1)[near > 0]
        for one, other in np.unique(pairs, axis=0).tolist():
            low, high = sorted((self._root(one), self._root(other)))
            if low != high:
                self._parents[high] = low
                self._n_joined += 1

    def _root(self, number: int) -> int:
        while self._parents[number] != number:
            self._parents[number] = self._parents[self._parents[number]]
            number = self._parents[number]
        return number
