"""What was fitted on held-back cases: a temperature and interval widths, their file, and what they change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from data_cache.errors import RunError
from data_cache.files import json_checksum, read_json
from data_cache.outputs import SIGNATURE, write_signed_json
from data_cache.records import STRICT, parse, to_json
from liverseg.inference.uncertainty_files import UncertaintySummary
from liverseg.measure.calibration import TEMPERATURES, TemperatureFit, tempered
from liverseg.measure.selective import widened
from liverseg.measure.summary import CLASSES
from liverseg.training.checkpoint import content_checksum

if TYPE_CHECKING:
    from liverseg.inference.segment import Predictor

CALIBRATION = "calibration.json"  # in the folder of an evaluation
CHECKSUM = "checksum"
WIDEST = 1e6  # standard deviations: where more are needed, the samples' spread says nothing
_AGAIN = "run liverseg evaluate --calibrate again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was fitted on cases that neither trained the network nor are scored.

    Attributes:
        case_ids: Those cases.
        spec_fingerprint: Fingerprint of the network's preprocessing spec.
        sources: The networks, as they were named.
        weights: Checksum of the weights of each.
        temperature: None without a voxel, or where it did not help left-out cases.
        widening: By class, how many standard deviations an interval of 90 % needs; None where the cases are too few.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    case_ids: tuple[str, ...]
    spec_fingerprint: str
    sources: tuple[str, ...]
    weights: tuple[str, ...]
    temperature: TemperatureFit | None
    widening: dict[str, float | None]

    @classmethod
    def load(cls, path: Path, predictor: Predictor) -> Self:
        """Read what ``write`` wrote for the networks of this predictor.

        Raises:
            RunError: The file is missing, damaged or of an earlier version, or was fitted for other networks.
        """
        content, checksum = _read_content(path)
        found = parse(cls, content, source=str(path), error=RunError)
        if checksum != json_checksum(content):
            raise RunError(
                f"{path}: damaged: its content does not match its checksum: restore it, or {_AGAIN}"
            )
        faults = list(_faults(found))
        if faults:
            raise RunError(f"{path}: {'; '.join(faults)}: {_AGAIN}")
        spec = predictor.spec.fingerprint()
        if found.spec_fingerprint != spec:
            raise RunError(
                f"{path}: fitted for a network of spec {found.spec_fingerprint}, this one has {spec}: "
                "run liverseg evaluate --calibrate with this network"
            )
        if sorted(found.weights) != sorted(weight_checksums(predictor)):
            raise RunError(
                f"{path}: fitted for the networks {', '.join(found.sources)}, whose weights are not those of "
                f"{', '.join(predictor.sources)}: run liverseg evaluate --calibrate with the same networks"
            )
        return found

    def write(self, path: Path) -> None:
        """Write the file that ``load`` reads, signed by ``liverseg evaluate`` and with a checksum of its content."""
        content = to_json(self)
        write_signed_json(path, {**content, CHECKSUM: json_checksum(content)}, command="evaluate")

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


def weight_checksums(predictor: Predictor) -> tuple[str, ...]:
    """The checksum of each network's weights, equal for a run and for the file that it was exported to."""
    return tuple(content_checksum(member.network.state_dict()) for member in predictor.members)


def _read_content(path: Path) -> tuple[dict[str, Any], object]:
    """The content of the file, and the checksum that it states."""
    try:
        content = read_json(path)
    except (OSError, ValueError) as failure:
        raise RunError(
            f"{path}: cannot be read: {failure}: name a {CALIBRATION} that liverseg evaluate --calibrate wrote"
        ) from None
    if not isinstance(content, dict) or SIGNATURE not in content:
        raise RunError(
            f"{path}: expected a {CALIBRATION} that liverseg evaluate --calibrate wrote, found another file"
        )
    del content[SIGNATURE]
    checksum = content.pop(CHECKSUM, None)
    if checksum is None:
        raise RunError(
            f"{path}: lacks the checksum of its content and of the networks' weights, as files of earlier versions do: "
            f"{_AGAIN}"
        )
    return content, checksum


def _faults(found: Calibration) -> Iterator[str]:
    """What no fit gives."""
    fit = found.temperature
    if fit is not None and not TEMPERATURES[0] <= fit.temperature <= TEMPERATURES[1]:
        yield f"temperature: expected {TEMPERATURES[0]:g} to {TEMPERATURES[1]:g}, found {fit.temperature!r}"
    if sorted(found.widening) != sorted(CLASSES):
        yield f"widening: expected {' and '.join(CLASSES)}, found {', '.join(sorted(found.widening)) or 'nothing'}"
    for name, factor in found.widening.items():
        if factor is not None and not 0 <= factor <= WIDEST:
            yield f"widening.{name}: expected 0 to {WIDEST:g}, found {factor!r}"
