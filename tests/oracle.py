"""A network that knows the answer: what is left to test is everything around it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny import SPEC

from data_cache.geometry import Box
from data_cache.schema import View
from liverseg.inference.segment import Member, Predictor
from liverseg.model.inputs import InputConfig
from liverseg.model.network import NetworkConfig, UNet
from pipeline.prepare import HeldScan
from pipeline.resample import box_weights


def oracle(truth_zyx: NDArray[Any], monkeypatch: pytest.MonkeyPatch) -> Predictor:
    """A predictor that answers with the truth, averaged over whatever window of the scan it is shown."""
    shown: list[Box] = []
    original = HeldScan.view

    def remember(scan: HeldScan, box: Box) -> View:
        shown.append(box)
        return original(scan, box)

    def know(_: Predictor, image_zyx: NDArray[np.int16]) -> NDArray[np.float32]:
        ends = zip(shown[-1].start_zyx, shown[-1].stop_zyx, strict=True)
        z, y, x = (
            box_weights(n, m, *end) for n, m, end in zip(truth_zyx.shape, image_zyx.shape, ends, strict=True)
        )
        masks = np.stack([truth_zyx == 1, truth_zyx == 2]).astype(float)
        return np.asarray(np.einsum("czyx,Zz,Yy,Xx->cZYX", masks, z, y, x, optimize=True), dtype=np.float32)

    monkeypatch.setattr(HeldScan, "view", remember)
    monkeypatch.setattr(Predictor, "foreground", know)
    member = Member(
        network=UNet(NetworkConfig(base_channels=1, depth=1)), input=InputConfig(), source="oracle"
    )
    return Predictor(members=(member,), spec=SPEC, device=torch.device("cpu"), dtype=None)
