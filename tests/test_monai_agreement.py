"""MONAI as an oracle: metrics and losses that have one definition have one value, to four digits and more.

Where MONAI defines something else, the test says where and why.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from liverseg.measure.overlap import ClassScores, score_class
from liverseg.model.losses import LossConfig, LossName, Overlap, Sums, loss

# As Any: MONAI's modules pass their names on without exporting them.
losses: Any = pytest.importorskip("monai.losses")
metrics: Any = pytest.importorskip("monai.metrics")
# MONAI 1.6 warns of an argument that it passes to itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")

Mask = NDArray[np.bool_]
SPACINGS_MM = ((5.0, 0.7, 0.8), (1.0, 1.0, 1.0), (2.5, 0.9, 1.3))
TOLERANCE_MM = 2.0
FOUR_DIGITS = 5e-5
WEIGHTS = (0.2, 0.3, 0.5)
CLASSES = len(WEIGHTS)

either_sum = pytest.mark.parametrize(("sums", "batch"), [("batch", True), ("sample", False)])
either_target = pytest.mark.parametrize("soft", [False, True], ids=["hard labels", "fractions"])


# ---- metrics


def blobs(seed: int) -> tuple[Mask, Mask]:
    """Two masks of smoothed noise that overlap in part: many pieces, some cut by the edge of the volume."""
    rng = np.random.default_rng(seed)
    common, *own = (ndimage.gaussian_filter(rng.standard_normal((14, 25, 19)), 1.5) for _ in range(3))
    pred, truth = (common + 0.5 * noise > 0.08 for noise in own)
    return pred, truth


def monai_scores(pred: Mask, truth: Mask, spacing_zyx_mm: tuple[float, float, float]) -> dict[str, float]:
    pair = [torch.from_numpy(mask)[None, None].float() for mask in (pred, truth)]
    here = {"include_background": True, "spacing": spacing_zyx_mm}
    values = {
        "dice": metrics.compute_dice(*pair),
        "hd_mm": metrics.compute_hausdorff_distance(*pair, **here),
        "hd95_mm": metrics.compute_hausdorff_distance(*pair, percentile=95, **here),
        "assd_mm": metrics.compute_average_surface_distance(*pair, symmetric=True, **here),
        # Voxels are counted, as we do; use_subvoxels=True would weigh them with their area, as DeepMind does.
        "nsd": metrics.compute_surface_dice(*pair, class_thresholds=[TOLERANCE_MM], **here),
    }
    return {name: value.item() for name, value in values.items()}


def assert_agree(ours: ClassScores, theirs: dict[str, float]) -> None:
    for name, value in theirs.items():
        assert getattr(ours, name) == pytest.approx(value, abs=FOUR_DIGITS, rel=FOUR_DIGITS), name


@pytest.mark.parametrize("spacing_zyx_mm", SPACINGS_MM)
@pytest.mark.parametrize("seed", range(4))
def test_metrics_of_random_volumes(seed: int, spacing_zyx_mm: tuple[float, float, float]) -> None:
    pred, truth = blobs(seed)
    theirs = monai_scores(pred, truth, spacing_zyx_mm)
    # None of them at an end of its range, where much would agree.
    assert 0.3 < theirs["dice"] < 0.95
    assert 0.3 < theirs["nsd"] < 0.999
    assert 0 < theirs["assd_mm"] < theirs["hd95_mm"] < theirs["hd_mm"]
    assert_agree(score_class(pred, truth, spacing_zyx_mm, tolerance_mm=TOLERANCE_MM), theirs)


def test_metrics_of_one_voxel_and_of_equal_masks() -> None:
    pred, truth = (np.zeros((6, 7, 8), dtype=np.bool_) for _ in range(2))
    pred[1, 2, 3] = truth[4, 2, 3] = True
    ours = score_class(pred, truth, SPACINGS_MM[0], tolerance_mm=TOLERANCE_MM)
    assert_agree(ours, monai_scores(pred, truth, SPACINGS_MM[0]))
    assert ours.hd_mm == pytest.approx(15.0)  # three slices of 5 mm
    assert_agree(
        score_class(pred, pred, SPACINGS_MM[0], tolerance_mm=TOLERANCE_MM),
        monai_scores(pred, pred, SPACINGS_MM[0]),
    )


# Not compared: empty masks. MONAI gives NaN or infinity there and leaves the rule to its caller; ours are the LiTS
# challenge's, in the docstring of liverseg.measure.overlap and in tests/test_metrics.py.


# ---- losses


def case(*, soft: bool, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and targets (B, C, Z, Y, X) in which every sample has every class."""
    generator = torch.Generator().manual_seed(seed)
    logits, other = (2 * torch.randn(3, CLASSES, 5, 6, 7, generator=generator) for _ in range(2))
    fractions = other.softmax(dim=1)
    # Each sample has its own share of each class, so that sums over samples are not those over the batch.
    fractions[0, 1] *= 0.2
    fractions = fractions / fractions.sum(dim=1, keepdim=True)
    return logits, fractions if soft else hard(fractions)


def hard(fractions: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(fractions.argmax(dim=1), CLASSES).movedim(-1, 1).float()


def ours(
    name: LossName,
    logits: Tensor,
    target: Tensor,
    *,
    sums: Sums = "batch",
    gamma: float = 0.0,
    weights: tuple[float, ...] = WEIGHTS,
    overlap: Overlap = "squared",
) -> float:
    config = LossConfig(name=name, gamma=gamma, class_weights=weights, sums=sums, alpha=1.0, overlap=overlap)
    return loss(logits, target, config).item()


def one_class(index: int) -> tuple[float, ...]:
    return tuple(float(c == index) for c in range(CLASSES))


@either_target
@either_sum
@pytest.mark.parametrize("overlap", ["squared", "linear"])
def test_dice_of_each_class_and_weighted(overlap: Overlap, sums: Sums, batch: bool, soft: bool) -> None:
    # Ours has no smoothing constants: MONAI's default 1e-5 above and below is what it uses for absent classes.
    exact = {"softmax": True, "batch": batch, "smooth_nr": 0.0, "smooth_dr": 0.0}
    exact["squared_pred"] = overlap == "squared"
    logits, target = case(soft=soft)
    per_class = losses.DiceLoss(**exact, reduction="none")(logits, target).reshape(-1, CLASSES).mean(dim=0)
    for c in range(CLASSES):
        value = ours("dice", logits, target, sums=sums, weights=one_class(c), overlap=overlap)
        assert value == pytest.approx(per_class[c].item(), rel=1e-5)
    # MONAI takes the mean over classes after weighing them, ours their sum.
    weighted = CLASSES * losses.DiceLoss(**exact, weight=WEIGHTS)(logits, target).item()
    assert ours("dice", logits, target, sums=sums, overlap=overlap) == pytest.approx(weighted, rel=1e-5)


def test_sums_over_the_batch_are_not_the_mean_over_samples() -> None:
    """Or the test above could not tell one from the other."""
    logits, target = case(soft=False)
    assert ours("dice", logits, target) != pytest.approx(
        ours("dice", logits, target, sums="sample"), rel=1e-3
    )


@either_target
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal(gamma: float, soft: bool) -> None:
    logits, target = case(soft=soft)
    # Its mean is over voxels and classes, ours over voxels of the sum over classes.
    theirs = CLASSES * losses.FocalLoss(use_softmax=True, gamma=gamma, weight=WEIGHTS)(logits, target).item()
    assert ours("focal", logits, target, gamma=gamma) == pytest.approx(theirs, rel=1e-5)


@either_target
@either_sum
def test_dice_and_cross_entropy(sums: Sums, batch: bool, soft: bool) -> None:
    logits, target = case(soft=soft)
    criterion = losses.DiceCELoss(softmax=True, squared_pred=True, batch=batch, smooth_nr=0.0, smooth_dr=0.0)
    # Equal weights, since MONAI's `weight` also goes into its cross-entropy, where ours has none.
    equal = (1 / CLASSES,) * CLASSES
    value = ours("dice_cross_entropy", logits, target, sums=sums, weights=equal)
    assert value == pytest.approx(criterion(logits, target).item(), rel=1e-5)
    cross_entropy = torch.nn.functional.cross_entropy(logits, target).item()
    assert value - ours("dice", logits, target, sums=sums, weights=equal) == pytest.approx(
        cross_entropy, rel=1e-5
    )


@either_target
@either_sum
def test_generalised_dice(sums: Sums, batch: bool, soft: bool) -> None:
    logits, target = case(soft=soft)
    theirs = losses.GeneralizedDiceLoss(softmax=True, batch=batch, smooth_nr=0.0, smooth_dr=0.0)
    equal = (1.0,) * CLASSES
    value = ours("generalised_dice", logits, target, sums=sums, weights=equal, overlap="linear")
    assert value == pytest.approx(theirs(logits, target).item(), rel=1e-5)


def test_an_absent_class_is_where_the_two_part() -> None:
    # MONAI's smoothing leaves about 1 for an absent class as soon as p is not 0 everywhere: whether 1 % or 90 % of
    # the voxels are claimed, the loss hardly changes. Ours takes the class for a small one that was found.
    _, target = case(soft=False)
    target[:, 0] += target[:, 2]
    target[:, 2] = 0
    theirs = losses.DiceLoss(softmax=True, squared_pred=True, batch=True, reduction="none")
    few, many = (torch.zeros_like(target) for _ in range(2))
    few[:, 2], many[:, 2] = -5.0, 3.0
    monai = [theirs(logits, target).flatten()[2].item() for logits in (few, many)]
    own = [ours("dice", logits, target, weights=one_class(2)) for logits in (few, many)]
    assert monai[1] - monai[0] < 0.01
    assert own[0] < 0.05 < 0.9 < own[1]


# Not compared, for MONAI has nothing of the kind: the semimetric overlap, tp_tn_dice (the complement's Dice), dice_focal (a power of one
# minus Dice times its logarithm; its DiceFocalLoss is the sum of a Dice and a focal loss), thresholded_dice. They are
# held to a brute force in tests/test_losses.py.
