"""Validation: loss and Dice of every held-back case, on the cached grid and on its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_cache.errors import CacheError
from data_cache.reader import CacheStore
from data_cache.schema import CaseMeta
from liverseg.device import autocast, autocast_dtype
from liverseg.model.inputs import class_fractions, decide, network_input
from liverseg.model.losses import loss as loss_of
from liverseg.model.network import UNet
from liverseg.training.config import TrainConfig
from liverseg.training.process_group import ProcessGroup
from liverseg.training.state import Row
from liverseg.training.stream import WHOLE, SampleSpec, Volumes
from pipeline.labels import read_label
from pipeline.nifti import to_canonical
from pipeline.restore import native_labels


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ValidationOutput:
    """What a network says of a case, and what is true, on the cached grid.

    Attributes:
        foreground_bczyx: Probabilities of liver and tumour, float32, batch of one.
        truth_bczyx: Shares of liver and tumour, float32.
    """

    view: str
    image_bczyx: Tensor
    foreground_bczyx: Tensor
    truth_bczyx: Tensor
    loss: float


NOT_VALIDATED: Row = dict.fromkeys(("val_loss", "val_dice_liver", "val_dice_tumour"))


class Validation:
    """The held-back cases of a run; each process of a group scores its share of them.

    Attributes:
        example: The case to look at: the first of this process's share with a tumour, or else the very first, which
            is in the main process's share.
    """

    def __init__(
        self, store: CacheStore, case_ids: Sequence[str], config: TrainConfig, group: ProcessGroup
    ) -> None:
        self._metas = {case_id: store.meta(case_id) for case_id in case_ids}
        self._config = config
        self._group = group
        self._own = group.share(case_ids)
        self.example = next((i for i in self._own if self._metas[i].volume_ml(2)), case_ids[0])
        self._volumes = Volumes(store, self._own, resident=config.data.resident, device=group.device)
        self._dtype = autocast_dtype(config.precision, group.device)

    def score(self, network: UNet, *, native: bool) -> Row:
        """Mean loss, and mean Dice of each class over the cases that have it; None where none has.

        Args:
            network: Applied in eval mode.
            native: Whether to score on the cases' own grids as well, against the labels in ``watch.raw``.

        Raises:
            CacheError: A raw label is not the one that the cache was built from.
        """
        found = self._group.gather(
            [self._score_case(network, case_id, native=native) for case_id in self._own]
        )
        return {name: _mean([case[name] for case in found]) for name in found[0]}

    def _score_case(self, network: UNet, case_id: str, *, native: bool) -> dict[str, float]:
        answer = self.answer(network, case_id)
        dice = class_dice(decide(answer.foreground_bczyx), decide(answer.truth_bczyx))
        scores = {"val_loss": answer.loss, "val_dice_liver": dice[0], "val_dice_tumour": dice[1]}
        if native and self._config.watch.raw is not None:
            foreground_czyx = answer.foreground_bczyx[0].cpu().numpy()
            raw, meta = Path(self._config.watch.raw), self._metas[case_id]
            liver, tumour = native_dice(foreground_czyx, meta, view=answer.view, raw=raw)
            scores |= {"native_dice_liver": liver, "native_dice_tumour": tumour}
        return scores

    @torch.no_grad()
    def answer(self, network: UNet, case_id: str) -> ValidationOutput:
        """What the network says of a case of this process's share, in its liver view if it has one."""
        network.eval()
        view = "liver" if "liver" in self._metas[case_id].boxes else "scan"
        batch = self._volumes.fetch([SampleSpec(case_id=case_id, view=view, part_zyx=WHOLE)])
        image = network_input(batch.image_bczyx, self._config.input)
        with autocast(self._group.device, self._dtype):
            logits = network(image.contiguous(memory_format=torch.channels_last_3d))
        fractions = class_fractions(batch.fractions_bczyx)
        return ValidationOutput(
            view=view,
            image_bczyx=batch.image_bczyx,
            foreground_bczyx=torch.softmax(logits.float(), dim=1)[:, 1:],
            truth_bczyx=fractions[:, 1:],
            loss=loss_of(logits, fractions, self._config.loss).item(),
        )


def native_dice(
    foreground_czyx: NDArray[np.float32], meta: CaseMeta, *, view: str, raw: Path
) -> tuple[float, float]:
    """``class_dice`` on the case's own grid, with the crop of its own label: what the grid and the network lose."""
    if meta.label is None:
        raise CacheError(f"case {meta.case_id} has no label")
    path = raw / meta.label.path
    truth = read_label(path)
    meta.label.require_content(path, truth.sha256)
    header = truth.header
    labels_kji = np.concatenate(list(native_labels(foreground_czyx, meta.boxes[view], header)))
    predicted_zyx = to_canonical(labels_kji, header.axes_kji)
    return class_dice(torch.from_numpy(predicted_zyx.copy()), torch.from_numpy(truth.label_zyx.copy()))


def class_dice(predicted_zyx: Tensor, truth_zyx: Tensor) -> tuple[float, float]:
    """Dice of liver (with its tumours) and of tumour, of labels of any one shape; NaN where the truth has none."""
    scores = []
    for label in (1, 2):
        p, t = predicted_zyx >= label, truth_zyx >= label
        size = int(t.sum())
        scores.append(2 * int((p & t).sum()) / (int(p.sum()) + size) if size else math.nan)
    return scores[0], scores[1]


def _mean(values: Sequence[float]) -> float | None:
    there = [value for value in values if not math.isnan(value)]
    return float(np.mean(there)) if there else None
