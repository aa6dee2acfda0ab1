"""What was fitted on held-back cases: a temperature and interval widths, their file, and what they change."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from data_cache.errors import RunError
from data_cache.files import read_json
from data_cache.outputs import SIGNATURE, write_signed_json
from data_cache.records import STRICT, parse, to_json
from data_cache.schema import PreprocessSpec
from liverseg.inference.uncertainty_files import UncertaintySummary
from liverseg.measure.calibration import TemperatureFit, tempered
from liverseg.measure.selective import widened

CALIBRATION = "calibration.json"  # in the folder of an evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was fitted on cases that neither trained the network nor are scored.

    Attributes:
        case_ids: Those cases.
        spec_fingerprint: Fingerprint of the network's preprocessing spec.
        sources: The networks, as they were named.
        temperature: None without a voxel, or where it did not help left-out cases.
        widening: By class, how many standard deviations an interval of 90 % needs; None where the cases are too few.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    case_ids: tuple[str, ...]
    spec_fingerprint: str
    sources: tuple[str, ...]
    temperature: TemperatureFit | None
    widening: dict[str, float | None]

    @classmethod
    def load(cls, path: Path, spec: PreprocessSpec) -> Self:
        """Read what ``write`` wrote, for a network of this spec; raises RunError with every fault."""
        try:
            content = read_json(path)
        except (OSError, ValueError) as failure:
            raise RunError(
                f"{path}: cannot be read: {failure}: name a {CALIBRATION} that liverseg evaluate --calibrate wrote"
            ) from None
        if isinstance(content, dict):
            content.pop(SIGNATURE, None)
        found = parse(cls, content, source=str(path), error=RunError)
        if found.spec_fingerprint != spec.fingerprint():
            raise RunError(
                f"{path}: fitted for a network of spec {found.spec_fingerprint}, this one has {spec.fingerprint()}: "
                "run liverseg evaluate --calibrate with this network"
            )
        return found

    def write(self, path: Path) -> None:
        """Write the file that ``load`` reads, signed by ``liverseg evaluate``."""
        write_signed_json(path, to_json(self), command="evaluate")

    def probabilities(self, foreground_czyx: NDArray[np.float32]) -> NDArray[np.float32]:
        """Mean probabilities (2, ...), tempered; labels are decided on the probabilities as they were."""
        if self.temperature is None:
            return foreground_czyx
        return tempered(foreground_czyx, self.temperature.temperature)

    def summary(self, summary: UncertaintySummary) -> UncertaintySummary:
        """The summary with intervals as wide as held-back cases ask for, where there were enough of these."""
        liver, tumour = self.widening["liver"], self.widening["tumour"]
        return replace(
            summary,
            liver_ml=summary.liver_ml if liver is None else widened(summary.liver_ml, liver),
            tumour_ml=summary.tumour_ml if tumour is None else widened(summary.tumour_ml, tumour),
        )
