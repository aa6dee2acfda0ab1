"""Colours, resolution and pens that all pictures share."""

from __future__ import annotations

from dataclasses import dataclass

BACKGROUND = "#0d1117"
PANEL = "#151b23"
GRID = "#30363d"
TEXT = "#e6edf3"
MUTED = "#8b949e"
ALARM = "#ff7b72"  # words that must not be overlooked
# Searched for: at least 33 apart (CIELAB) with usual vision and under each colour blindness; a green for the tumour
# came within 11 of the blue under tritanopia. A test repeats the measurement.
LIVER_TRUTH = "#56b4e9"
LIVER_PRED = "#f0e442"
TUMOUR_TRUTH = "#b740ff"
TUMOUR_PRED = "#f2452d"

DPI = 110  # of every picture


@dataclass(frozen=True, slots=True, kw_only=True)
class Pen:
    """How the edge of one class of one label is drawn; the class is all labels from ``from_label`` up."""

    name: str
    from_label: int
    colour: str
    width: float
    style: str


BOX_PEN = Pen(name="close view", from_label=1, colour=TEXT, width=0.9, style="dotted")
# The truth solid and wide, the prediction thin on top of it: where both agree, both are seen.
TRUTH_PENS = (
    Pen(name="liver, truth", from_label=1, colour=LIVER_TRUTH, width=1.9, style="solid"),
    Pen(name="tumour, truth", from_label=2, colour=TUMOUR_TRUTH, width=1.9, style="solid"),
)
PRED_PENS = (
    Pen(name="liver, predicted", from_label=1, colour=LIVER_PRED, width=1.4, style="dashed"),
    Pen(name="tumour, predicted", from_label=2, colour=TUMOUR_PRED, width=1.4, style="dashed"),
)
