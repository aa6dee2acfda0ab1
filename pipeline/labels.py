"""The one rule that turns probabilities into labels.

It lives here, below ``liverseg``, because restoring a scan to its native grid needs it and may not import torch's package.
``liverseg.model.inputs.decide`` is the same rule on tensors, and a test holds the two together.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Probabilities = NDArray[np.float32]


def is_foreground(both: Probabilities) -> NDArray[np.bool_]:
    """Whether a voxel is liver or tumour: their probabilities together reach one half."""
    return both >= 0.5


def is_tumour(both: Probabilities, tumour: Probabilities) -> NDArray[np.bool_]:
    """Whether a voxel is tumour: it is foreground, and more than half of its foreground probability is tumour's."""
    return is_foreground(both) & (2 * tumour > both)


def decide(foreground_czyx: Probabilities) -> NDArray[np.uint8]:
    """Labels 0, 1 and 2 from the probabilities, or fractions, of liver and tumour (2, ...)."""
    both, tumour = foreground_czyx.sum(axis=0), foreground_czyx[1]
    return is_foreground(both).astype(np.uint8) + is_tumour(both, tumour)
