"""What an evaluated case leaves to look at: an overlay, the volume that ``liverseg report`` shows, its uncertainty."""

from __future__ import annotations

import json
from pathlib import Path

from data_cache.files import write_text
from data_cache.outputs import SIGNATURE, Mark, author, json_mark, png_mark
from liverseg.evaluation.case import CaseEvaluation, EvaluatedCase
from liverseg.evaluation.uncertainty_summary import UNCERTAINTY, uncertainty_picture
from liverseg.measure.summary import VOLUMES
from liverseg.pictures.figures import overlay_figure
from liverseg.pictures.sheet import save
from liverseg.pictures.slices import evaluation_volume

OVERLAYS = "overlays"


def artifacts(out: Path, case_id: str, *, samples: bool) -> list[tuple[Path, Mark]]:
    """The files that ``write_artifacts`` writes for a case, and the marks that earlier ones carry."""
    pictures = (OVERLAYS, UNCERTAINTY) if samples else (OVERLAYS,)
    return [
        *((out / folder / f"{case_id}.png", png_mark("evaluate")) for folder in pictures),
        (out / VOLUMES / f"{case_id}.json", json_mark("evaluate")),
    ]


def write_artifacts(out: Path, case: EvaluatedCase) -> None:
    """Write the pictures and the small volume of one case into the folders of the evaluation ``out``."""
    case_id, uncertainty = case.scores.case_id, case.scores.uncertainty
    for folder in (OVERLAYS, VOLUMES, *([] if uncertainty is None else [UNCERTAINTY])):
        (out / folder).mkdir(parents=True, exist_ok=True)
    if uncertainty is not None and case.native is not None:
        picture = uncertainty_picture(uncertainty, case.native, case.view)
        save(picture, out / UNCERTAINTY / f"{case_id}.png", command="evaluate")
    figure = overlay_figure(
        case.image_zyx,
        case.truth_zyx,
        case.predicted_zyx,
        case.grid.spacing_zyx_mm,
        title=_title(case.scores),
    )
    save(figure, out / OVERLAYS / f"{case_id}.png", command="evaluate")
    volume = evaluation_volume(
        case.image_zyx,
        case.truth_zyx,
        case.predicted_zyx,
        case.grid,
        foreground_czyx=case.foreground_czyx,
        box=case.box,
    )
    signed = {SIGNATURE: author("evaluate"), **volume}
    write_text(out / VOLUMES / f"{case_id}.json", json.dumps(signed))


def _title(evaluation: CaseEvaluation) -> str:
    scores = evaluation.predicted
    parts = [f"liver Dice {scores.liver.dice:.3f}"]
    if scores.liver.hd95_mm is not None:
        parts.append(f"HD95 {scores.liver.hd95_mm:.1f} mm")
    if scores.tumour.volume_truth_ml or scores.tumour.volume_pred_ml:
        parts.append(f"tumour Dice {scores.tumour.dice:.3f}")
        parts.append(
            f"tumour {scores.tumour.volume_pred_ml:.1f} mL of {scores.tumour.volume_truth_ml:.1f} mL"
        )
    seen = " (trained on)" if evaluation.trained_on else ""
    return f"{evaluation.case_id}{seen}\n{' · '.join(parts)}"
