"""A page of panels under a title and over a legend, laid out in inches, and written whole."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from data_cache.files import replacing
from data_cache.outputs import author
from liverseg.pictures.palette import ALARM, BACKGROUND, DPI, MUTED, TEXT

TITLE_IN = 0.9
_LEGEND_IN, _GAP_IN, _EDGE_IN = 0.5, 0.06, 0.2


def save(figure: Figure, path: Path, *, command: str = "") -> Path:
    """Write the figure as PNG, completely or not at all, and return the path.

    Args:
        figure: The figure.
        path: Where to write it.
        command: Signs the file, so that ``png_mark`` recognises it.
    """
    # A name in letters that the font lacks is drawn as boxes: nothing that a user can do about it. Not put back, since
    # threads that each put filters back would leave another's behind.
    warnings.filterwarnings("ignore", message=r"Glyph .* missing from font", category=UserWarning)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=DPI, metadata={"Software": author(command).strip()})
    return path


def new_figure(title: str, *, width_in: float, height_in: float, alarm: bool = False) -> Figure:
    """A page in the background colour, empty but for its title: the first line bold, the others smaller below it.

    ``alarm`` draws the others in a colour that is not overlooked.
    """
    figure = Figure(figsize=(width_in, height_in), dpi=DPI, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    head, _, rest = title.partition("\n")
    _title_line(figure, 0.34, head, colour=TEXT, size=15.0, weight="bold")
    _title_line(figure, 0.64, rest, colour=ALARM if alarm else MUTED, size=10.5, weight="normal")
    return figure


def overlay_layout(aspect: float, title: str, *, alarm: bool = False) -> tuple[Figure, list[Axes]]:
    """2×2 axial panels of this height over width, and a column with the coronal over the sagittal."""
    return _layout(title, rows=2, columns=2, panel_in=(4.1 * aspect, 4.1), side_in=4.1, alarm=alarm)


def montage_layout(aspect: float, title: str) -> tuple[Figure, list[Axes]]:
    """3×6 axial panels of this height over width, and a column with the coronal over the sagittal."""
    return _layout(title, rows=3, columns=6, panel_in=(2.1 * aspect, 2.1), side_in=3.1)


def row_layout(aspect: float) -> tuple[Figure, list[Axes]]:
    """Three panels of this height over width side by side, without a title."""
    width_in = 3.4
    size_in = (3 * width_in + 2 * _GAP_IN, width_in * aspect + _LEGEND_IN)
    figure = Figure(figsize=size_in, dpi=DPI, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    lefts_in = [column * (width_in + _GAP_IN) for column in range(3)]
    return figure, [add_panel(figure, (left, _LEGEND_IN, width_in, width_in * aspect)) for left in lefts_in]


def _layout(
    title: str,
    *,
    rows: int,
    columns: int,
    panel_in: tuple[float, float],
    side_in: float,
    alarm: bool = False,
) -> tuple[Figure, list[Axes]]:
    height_in = rows * (panel_in[0] + _GAP_IN) - _GAP_IN
    middle_in = _EDGE_IN + columns * (panel_in[1] + _GAP_IN)
    width_in = middle_in + side_in + _EDGE_IN
    figure = new_figure(title, width_in=width_in, height_in=height_in + TITLE_IN + _LEGEND_IN, alarm=alarm)
    axial = grid(figure, rows, columns, left_in=_EDGE_IN, right_in=middle_in - _GAP_IN)
    sides = grid(figure, 2, 1, left_in=middle_in, right_in=width_in - _EDGE_IN)
    return figure, [*axial, *sides]


def rows_layout(
    title: str,
    heights_in: Sequence[float],
    *,
    columns: int,
    width_in: float,
    head_in: float = 0.0,
    foot_in: float,
) -> tuple[Figure, list[list[Axes]]]:
    """Rows of panels of one width, each row as high as it has to be.

    Args:
        title: As ``new_figure`` has it.
        heights_in: Of the rows, from the top.
        width_in: Of each panel.
        head_in: Room between the title and the first row.
        foot_in: Room below the last row.
    """
    size_in = (
        2 * _EDGE_IN + columns * (width_in + _GAP_IN) - _GAP_IN,
        TITLE_IN + head_in + sum(heights_in) + _GAP_IN * (len(heights_in) - 1) + foot_in,
    )
    figure = new_figure(title, width_in=size_in[0], height_in=size_in[1])
    lefts_in = [_EDGE_IN + column * (width_in + _GAP_IN) for column in range(columns)]
    rows, top_in = [], size_in[1] - TITLE_IN - head_in
    for height_in in heights_in:
        boxes_in = [(left_in, top_in - height_in, width_in, height_in) for left_in in lefts_in]
        rows.append([add_panel(figure, box_in) for box_in in boxes_in])
        top_in -= height_in + _GAP_IN
    return figure, rows


def grid(
    figure: Figure,
    rows: int,
    columns: int,
    *,
    left_in: float,
    right_in: float,
    bottom_in: float = _LEGEND_IN,
    gap_in: tuple[float, float] = (_GAP_IN, _GAP_IN),
) -> list[Axes]:
    """Panels row by row from under the title down to ``bottom_in``."""
    size = figure.get_size_inches()
    height = (size[1] - TITLE_IN - bottom_in - gap_in[0] * (rows - 1)) / rows
    width = (right_in - left_in - gap_in[1] * (columns - 1)) / columns
    lefts = [left_in + column * (width + gap_in[1]) for column in range(columns)]
    bottoms = [bottom_in + row * (height + gap_in[0]) for row in reversed(range(rows))]
    return [add_panel(figure, (left, bottom, width, height)) for bottom in bottoms for left in lefts]


def add_panel(figure: Figure, box_in: tuple[float, float, float, float]) -> Axes:
    """A panel at so many inches from the left and from the bottom, so wide and so high."""
    (left, bottom, width, height), (page_width, page_height) = box_in, figure.get_size_inches()
    return figure.add_axes(
        (left / page_width, bottom / page_height, width / page_width, height / page_height)
    )


def _title_line(figure: Figure, down_in: float, text: str, *, colour: str, size: float, weight: str) -> None:
    width_in, height_in = figure.get_size_inches()
    # No mathematics: a case may be called a$b$c.
    figure.text(
        _EDGE_IN / width_in,
        1 - down_in / height_in,
        text,
        color=colour,
        fontsize=size,
        weight=weight,
        va="center",
        parse_math=False,
    )


def draw_legend(figure: Figure, keys: Sequence[Artist], *, rows: int = 1) -> None:
    """All ``keys`` at the bottom, column by column; nothing without any."""
    if not keys:
        return
    width_in, height_in = figure.get_size_inches()
    figure.legend(
        handles=list(keys),
        loc="center left",
        bbox_to_anchor=(0.12 / width_in, (0.09 + 0.16 * rows) / height_in),
        ncols=math.ceil(len(keys) / rows),
        frameon=False,
        labelcolor=TEXT,
        fontsize=10,
        handlelength=2.8,
        columnspacing=2.4,
    )
