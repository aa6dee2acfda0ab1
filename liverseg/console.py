"""What a person sees in the terminal: tables, progress bars, one line per error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from data_cache.inspection import CaseSummary
from data_cache.schema import CacheSchema, CaseMeta
from data_cache.text import pluralise, visible


def _console(*, stderr: bool) -> Console:
    # A pipe or a file has no width: tables are laid out for a wide page there, and lines are never broken.
    width = None if Console(stderr=stderr).is_terminal else 160
    return Console(stderr=stderr, soft_wrap=True, highlight=False, width=width)


console = _console(stderr=False)
errors = _console(stderr=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """How much a command prints; errors and warnings always go to the standard error stream.

    Attributes:
        quiet: Nothing else is printed.
        verbose: There is a line per finished case, and warnings name every file.
        json: Tables and lines are left out, and the progress bar is drawn on the standard error stream: the command's
            result is printed as JSON instead.
    """

    quiet: bool = False
    verbose: bool = False
    json: bool = False


_output = Output()


def choose_output(output: Output) -> None:
    """Decide how much is printed from now on."""
    global _output
    _output = output
    console.quiet = output.quiet or output.json


def output() -> Output:
    """What was chosen."""
    return _output


def say(text: str, *, style: str = "") -> None:
    """Print a line as it is: brackets in file names are not markup."""
    console.print(escape(visible(text)), style=style)


def complain(text: str) -> None:
    """Print one line to the standard error stream."""
    errors.print(f"[bold red]error:[/] {escape(visible(text))}")


def warn(text: str) -> None:
    """Print one line to the standard error stream."""
    errors.print(f"[yellow]warning:[/] {escape(visible(text))}")


class _Lines(Progress):
    """A bar that also says in a line what has been finished."""

    def update(self, task_id: TaskID, **fields: Any) -> None:
        super().update(task_id, **fields)
        if fields.get("advance"):
            task = self.tasks[task_id]
            total = "" if task.total is None else f" of {task.total:.0f}"
            self.console.print(
                escape(visible(f"{task.description}: {task.completed:.0f}{total}: {task.fields['note']}"))
            )


def progress_bar(*columns: ProgressColumn) -> Progress:
    """A bar with these columns, or else count, elapsed and remaining time; none where the output is not a terminal."""
    usual = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    target = errors if _output.json else console
    return (_Lines if _output.verbose else Progress)(
        *(columns or usual),
        console=target,
        transient=True,
        disable=_output.quiet
        or not target.is_terminal,  # rich ends a bar that nobody sees with an empty line
    )


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def table(title: str, headers: Sequence[str], rows: Iterable[Sequence[str]], *, left: bool = False) -> Table:
    """A table whose first column is left-aligned; cells fold where the terminal is narrow, none is cut.

    With ``left``, all columns are: for text.
    """
    result = Table(title=escape(visible(title)), title_justify="left")
    for i, header in enumerate(headers):
        result.add_column(header, justify="left" if left or i == 0 else "right", overflow="fold")
    for row in rows:
        result.add_row(*(escape(visible(cell)) for cell in row))
    return result


def store_table(name: str, schema: CacheSchema, summaries: Sequence[CaseSummary]) -> Table:
    """The cases of a store."""
    z, y, x = schema.spec.shape_zyx
    size_mib = sum(s.size_bytes for s in summaries) / 2**20
    title = (
        f"{name}: {pluralise(len(summaries), 'case')} of {z}×{y}×{x}, {size_mib:.1f} MiB, spec {schema.fingerprint}, "
        f"{schema.software}"
    )
    headers = (
        "case",
        "native x×y×z",
        "mm",
        "axes",
        "liver mL",
        "tumour mL",
        "liver box z, y, x",
        "KiB",
        "notes",
    )
    return table(title, headers, map(_store_row, summaries))


def _store_row(summary: CaseSummary) -> tuple[str, ...]:
    meta = summary.meta
    box = meta.boxes.get("liver")
    return (
        meta.case_id,
        "×".join(map(str, meta.grid.shape_zyx[::-1])),
        "×".join(f"{v:.2f}" for v in meta.grid.spacing_zyx_mm[::-1]),
        meta.file_axes,
        number(summary.liver_ml, 0),
        number(summary.tumour_ml, 1),
        "–" if box is None else str(box),
        str(summary.size_bytes // 1024),
        str(len(meta.notes) or ""),
    )


def case_table(meta: CaseMeta) -> Table:
    """Everything that is known of one case."""
    hu = meta.hu
    facts: Mapping[str, str] = {
        "image": _source(meta.image.path, meta.image.size_bytes, meta.image.sha256),
        "label": "–"
        if meta.label is None
        else _source(meta.label.path, meta.label.size_bytes, meta.label.sha256),
        "native x×y×z": "×".join(map(str, meta.grid.shape_zyx[::-1])) + f" ({meta.file_axes})",
        "spacing": "×".join(f"{v:.3f}" for v in meta.grid.spacing_zyx_mm[::-1]) + " mm",
        "HU": f"{hu.minimum:g} to {hu.maximum:g}, mean {hu.mean:g} ± {hu.standard_deviation:g}",
        **{f"{name} view": f"voxels {box} (z, y, x)" for name, box in meta.boxes.items()},
        "liver": f"{number(meta.volume_ml(1), 1)} mL and tumour {number(meta.volume_ml(2), 1)} mL",
        "built with": f"spec {meta.spec_fingerprint}",
        "notes": "; ".join(meta.notes) or "–",
    }
    return table(meta.case_id, ("", ""), [(key, value) for key, value in facts.items()])


def _source(path: str, size_bytes: int, sha256: str) -> str:
    return f"{path} ({size_bytes / 2**20:.1f} MiB, sha256 {sha256[:12]}…)"
