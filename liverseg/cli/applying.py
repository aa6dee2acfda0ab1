"""Commands that apply a trained network to scans, and export it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_cache.errors import LiversegError
from data_cache.text import pluralise, visible
from liverseg.cli.common import DRAWN, FILE, FOLDER, in_debug
from liverseg.cli.failures import in_words
from liverseg.cli.notes import warn_of_scan, warn_of_units
from liverseg.cli.outcome import Outcome

if TYPE_CHECKING:
    from liverseg.inference.inputs import ScanInput
    from liverseg.inference.predict import Prediction, PredictOptions
    from liverseg.inference.segment import Predictor

ANY = click.Path(path_type=Path)


@click.command()
@click.argument("run", type=ANY)
@click.argument("scans", nargs=-1, required=True, type=ANY)
@click.option("--out", required=True, type=FOLDER, help="Folder of the labels, one file per scan.")
@click.option("--with", "others", multiple=True, type=ANY, help="Average with this run, too; repeatable.")
@click.option(
    "--series", metavar="UID", help="SeriesInstanceUID to segment, where a DICOM folder holds several series."
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, …")
@click.option("--fast", is_flag=True, help="Run the coarse pass only: one pass over the whole scan.")
@click.option("--tta", is_flag=True, help="Average three passes over boxes of different size.")
@click.option(
    "--samples",
    default=0,
    type=click.IntRange(min=0),
    metavar="N",
    help="Draw N segmentations per scan; also write uncertainty maps and a JSON file.",
)
@click.option("--preview", is_flag=True, help="Also write a picture per scan.")
@click.option(
    "--statistics",
    is_flag=True,
    help="Also write a JSON file per scan, and statistics.csv of all: volumes, lesions, times.",
)
@click.option(
    "--dicom-seg",
    is_flag=True,
    help="Also write a DICOM Segmentation per series; all SCANS must be DICOM. It carries the patient and study "
    "attributes that DICOM requires, and nothing else of the series.",
)
@click.option(
    "--calibration",
    type=FILE,
    help="A calibration.json of `liverseg evaluate --calibrate`: applied to the uncertainty maps and volume intervals.",
)
@click.option(
    "--force", is_flag=True, help="Also segment what is not a CT in HU, or lies on an impossible grid."
)
def predict(
    run: Path,
    scans: tuple[Path, ...],
    out: Path,
    others: tuple[Path, ...],
    series: str | None,
    device: str,
    fast: bool,
    tta: bool,
    samples: int,
    preview: bool,
    statistics: bool,
    dicom_seg: bool,
    calibration: Path | None,
    force: bool,
) -> Outcome:
    """Segment SCANS with RUN, a training run or a file from `liverseg export`: one label per scan, on the scan's grid.

    A scan is a NIfTI file, a folder of NIfTI files, or a folder or zip of one DICOM series. A scan that fails is
    reported, does not stop the others, and makes the exit code 1.

    With --samples, the label is the mean of N segmentations, drawn as the run was trained (model.stochastic: dropout
    left on, or a stochastic segmentation network) or one from each of several runs (--with). A folder NAME_uncertainty
    beside each label holds maps of predictive entropy, mutual information and tumour probability on the scan's grid,
    and uncertainty.json: volumes with 5-95 % intervals, possible lesions with their probability, how far the samples
    disagree, and how unlike the training cases the HU in and around the liver are.

    \b
    Example: liverseg predict runs/liver scan1.nii.gz scan2.nii.gz --out segmentations
             liverseg predict model.safetensors dicom/CT_0042 --out segmentations --preview --statistics
             liverseg predict runs/ssn scan1.nii.gz --out segmentations --samples 16
             liverseg predict runs/a --with runs/b --with runs/c scan1.nii.gz --out segmentations --samples 3
    """
    from liverseg.inference.calibration import Calibration
    from liverseg.inference.inputs import find_scans
    from liverseg.inference.predict import PredictOptions
    from liverseg.inference.segment import load_predictor

    if tta and (fast or samples):
        raise click.UsageError(f"--tta and --{'fast' if fast else 'samples'} exclude each other")
    if calibration is not None and not samples:
        raise click.UsageError("--calibration needs samples: add --samples 16")
    if dicom_seg:
        _check_dicom_seg(scans)
    predictor = load_predictor(run, *others, device=device, fast=fast, tta=tta, samples=samples)
    _warn_of_networks(predictor, samples)
    options = PredictOptions(
        preview=preview,
        statistics=statistics,
        dicom_seg=dicom_seg,
        series=series,
        force=force,
        calibration=None if calibration is None else Calibration.load(calibration, predictor),
    )
    return _predict_all(find_scans(scans), out, predictor, options)


def _warn_of_networks(predictor: Predictor, samples: int) -> None:
    from liverseg.console import warn
    from liverseg.device import cudnn_warning

    doubt = cudnn_warning(predictor.device, predictor.dtype)
    if doubt is not None:
        warn(doubt)
    if predictor.n_drawn != samples:
        warn(DRAWN.format(predictor.n_drawn, samples))
    for member in predictor.members:
        if member.training is not None and member.training.phantom:
            warn(f"{member.source}: trained on {member.training.line()}, not on patients")


def _predict_all(
    scans: Sequence[ScanInput], out: Path, predictor: Predictor, options: PredictOptions
) -> Outcome:
    """Segment all scans; one that fails costs itself, and the exit code."""
    from contextlib import closing

    from data_cache.files import write_csv
    from data_cache.outputs import csv_mark, require_replaceable
    from liverseg.console import complain, progress_bar, say, warn
    from liverseg.inference.batch import predict_scans
    from liverseg.inference.predict import STATISTICS, Prediction

    if options.statistics:
        require_replaceable(out / STATISTICS, csv_mark("scan", "liver_ml", "tumour_ml"), command="predict")
    done: list[Prediction] = []
    failed: dict[str, str] = {}
    with progress_bar() as bar, closing(predict_scans(scans, out, predictor, options)) as outcomes:
        task = bar.add_task("predict", total=len(scans), note="")
        for scan, outcome in zip(scans, outcomes, strict=True):
            if isinstance(outcome, Prediction):
                done.append(outcome)
                _print_prediction(scan, outcome)
            elif in_debug() and not isinstance(outcome, LiversegError):
                raise outcome
            else:  # of whatever kind: one scan must not end a night's batch
                failed[str(scan.path)] = in_words(outcome, "predict", about=str(scan.path))
                complain(failed[str(scan.path)])
            bar.update(task, advance=1, note=visible(scan.name))
    warn_of_units([(str(prediction.image), prediction.notes) for prediction in done])
    rows = [prediction.row() for prediction in done]
    if len(rows) > 1:
        _print_rows(rows)
    if options.statistics and rows:
        write_csv(out / STATISTICS, rows)
        say(f"wrote {out / STATISTICS}")
    doubtful = [p.label.name.removesuffix(".nii.gz") for p in done if not p.plausibility.plausible]
    if doubtful:
        warn(f"not plausible, {len(doubtful)} of {pluralise(len(scans), 'scan')}: {', '.join(doubtful)}")
    return Outcome(result={"scans": done, "failed": failed}, complete=len(done) == len(scans))


def _print_prediction(scan: ScanInput, prediction: Prediction) -> None:
    from liverseg.console import say, warn

    warn_of_scan(str(scan.path), prediction.notes)
    for reason in prediction.plausibility.reasons:
        warn(f"{scan.path}: not plausible: {reason}")
    say(prediction.line())


def _print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    from liverseg.console import console, table

    headers = ("scan", "liver mL", "tumour mL", "lesions", "doubtful", "plausible", "seconds")
    cells = [
        (
            row["scan"],
            f"{row['liver_ml']:.0f}",
            f"{row['tumour_ml']:.1f}",
            str(row["lesions"]),
            str(row["doubtful"]),
            "yes" if row["plausible"] else "NO",
            f"{row['seconds']:.1f}",
        )
        for row in rows
    ]
    console.print(table("predicted", headers, cells))


def _check_dicom_seg(paths: Sequence[Path]) -> None:
    """Refuse what cannot have a segmentation before the network is loaded, not after a night's work."""
    from liverseg.inference.dicom_seg import require_highdicom
    from liverseg.inference.inputs import find_scans

    others = [scan.path for scan in find_scans(paths) if not scan.is_dicom and not scan.refusal]
    if others:
        raise click.UsageError(
            f"--dicom-seg refers to the files of a DICOM series, and {others[0]} is not a folder or zip of one: "
            "leave out the option or the scan"
        )
    require_highdicom()


@click.command()
@click.argument("run", type=FOLDER)
@click.argument("file", type=FILE)
@click.option(
    "--licence", help="Terms of the weights, stored in the file. Default: those of the training data."
)
def export(run: Path, file: Path, licence: str | None) -> Outcome:
    """Write the best network of RUN to one FILE to share: weights, configuration, spec, labels and scores.

    \b
    Example: liverseg export runs/liver liver.safetensors
    """
    from liverseg.console import say, warn
    from liverseg.inference.model_file import describe, export_model
    from liverseg.measure.summary import SUMMARY

    export_model(run, file, licence=licence)
    about = describe(file)
    scores = run / "evaluation" / SUMMARY
    if about["evaluation"] is None and scores.exists():
        warn(
            f"{scores}: not of these weights alone, so left out: run liverseg evaluate again to export scores"
        )
    say(f"wrote {file} ({file.stat().st_size / 2**20:.1f} MiB)")
    say(f"epoch {about['epoch']}, mean validation Dice {about['validation_dice']:.3f}; {about['licence']}")
    return Outcome(result={"file": file, "header": about})


COMMANDS = (predict, export)
