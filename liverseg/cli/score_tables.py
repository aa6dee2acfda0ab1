"""What the scoring commands print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data_cache.text import pluralise

if TYPE_CHECKING:
    from liverseg.evaluation.compare import PairedDifference
    from liverseg.measure.summary import LabelScores


def print_cases(title: str, cases: Mapping[str, LabelScores]) -> None:
    """The scores of each case."""
    from liverseg.console import console, table
    from liverseg.evaluation.score_table import CASE_COLUMNS, case_cells
    from liverseg.measure.summary import score_columns

    headers = ("case", *(header for _, header, _ in CASE_COLUMNS))
    rows = [(name, *case_cells(score_columns(scores))) for name, scores in cases.items()]
    console.print(table(title, headers, rows))


def print_summary(summary: Mapping[str, Any]) -> None:
    """The means over cases, the detection of lesions, and the rules of both."""
    from liverseg.console import console, say, table
    from liverseg.evaluation.score_table import footnotes, lesion_rows, summary_rows

    console.print(table("summary (cases that have the class)", *summary_rows(summary)))
    console.print(table("detection", *lesion_rows(summary)))
    for line in footnotes(summary):
        say(line)


def print_uncertainty(summary: Mapping[str, Any]) -> None:
    """Calibration, ranking and interval coverage over all cases."""
    from liverseg.console import console, number, say, table

    after, fitted = summary["calibration_tempered"], summary["fitted"]
    rows = []
    for name in ("liver", "tumour"):
        counts, covered = summary["calibration"][name], summary["volume_intervals"][name]
        tempered = "–" if after is None else number(after[name]["ece"], 4)
        rows.append((name, number(counts["ece"], 4), tempered, *map(_covered, covered.values())))
    headers = ("class", "ECE", "ECE, tempered", "volume in interval", "volume in widened interval")
    title = (
        f"uncertainty, {pluralise(summary['n_cases'], 'case')}, within {summary['near_mm']:g} mm of the liver"
    )
    console.print(table(title, headers, rows))
    errors = summary["errors"]
    say(
        f"entropy of wrong voxels against right ones: AUROC {number(errors['auroc'])}, average precision "
        f"{number(errors['auprc'])} (by chance {number(errors['rate'], 4)})"
    )
    _print_case_numbers(summary)
    say(
        f"samples: energy distance² {number(summary['ged_iou']['mean'])}, "
        f"diversity {number(summary['diversity']['mean'])}"
    )
    if fitted is not None:
        say(_fit_line(fitted))


def _print_case_numbers(summary: Mapping[str, Any]) -> None:
    """How well each number of a case ranks; one that not all cases have is left out."""
    from liverseg.console import console, number, table
    from liverseg.evaluation.uncertainty_summary import NUMBERS

    judged = {NUMBERS[name]: found for name, found in summary["case_numbers"].items() if found is not None}
    rows = [
        (
            name,
            number(found["spearman"]["rho"], 2),
            number(found["spearman"]["p_value"]),
            number(found["aurc"], 4),
            number(found["excess_aurc"], 4),
            number(found["shifted_auroc"], 2),
        )
        for name, found in judged.items()
    ]
    headers = ("number per case", "Spearman with Dice", "p", "AURC", "excess AURC", "AUROC, shifted")
    title = f"{pluralise(summary['n_cases'], 'case')} and {pluralise(summary['n_shifted'], 'shifted scan')}"
    console.print(table(title, headers, rows))


def _fit_line(fitted: Mapping[str, Any]) -> str:
    short = [name for name, factor in fitted["widening_sd"].items() if factor is None]
    fit = fitted["temperature"]
    temperature = (
        "no temperature lowers the ECE of left-out cases"
        if fit is None
        else f"temperature {fit['temperature']:.2f}"
    )
    line = f"{temperature}, fitted on {pluralise(len(fitted['case_ids']), 'other case')}"
    if short:
        line += f"; intervals of {' and '.join(short)} not widened: this takes nine cases that have the class"
    return line


def _covered(coverage: Mapping[str, Any] | None) -> str:
    if coverage is None or not coverage["n_cases"]:
        return "–"
    return f"{coverage['n_covered']} of {coverage['n_cases']}"


def print_differences(title: str, differences: Sequence[PairedDifference]) -> None:
    """A table of paired differences, one metric per row."""
    from liverseg.console import console, number, table
    from liverseg.evaluation.score_table import interval_text

    rows = [
        (
            d.metric,
            str(d.n_cases),
            interval_text({"mean": d.mean, "low95": d.low95, "high95": d.high95}, 3, sign="+"),
            f"{d.rose} / {d.fell}",
            number(d.wilcoxon_p),
        )
        for d in differences
    ]
    headers = ("metric", "cases", "mean difference [95 %]", "higher / lower", "Wilcoxon p")
    console.print(table(title, headers, rows))
