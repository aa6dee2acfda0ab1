"""Commands that apply a trained run to scans, and hand it on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from data_cache.errors import LiversegError
from liverseg.cli.common import DRAWN, FILE, FOLDER

ANY = click.Path(path_type=Path)


@click.command()
@click.argument("run", type=ANY)
@click.argument("scans", nargs=-1, required=True, type=ANY)
@click.option("--out", required=True, type=FOLDER, help="One label file per scan, on its grid.")
@click.option("--with", "others", multiple=True, type=ANY, help="Average with this run, too; repeatable.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, …")
@click.option("--fast", is_flag=True, help="The coarse pass alone: one look at each scan.")
@click.option("--tta", is_flag=True, help="Average three looks through different depth windows.")
@click.option(
    "--samples",
    default=0,
    type=click.IntRange(min=0),
    metavar="N",
    help="Draw N segmentations a scan: also write maps and a JSON file of what is doubtful.",
)
@click.option("--preview", is_flag=True, help="Also write a picture a scan.")
@click.option("--statistics", is_flag=True, help="Also write volumes and times as a JSON file a scan.")
@click.option(
    "--dicom-seg", is_flag=True, help="Also write a DICOM Segmentation a series; SCANS are then all DICOM."
)
def predict(
    run: Path,
    scans: tuple[Path, ...],
    out: Path,
    others: tuple[Path, ...],
    device: str,
    fast: bool,
    tta: bool,
    samples: int,
    preview: bool,
    statistics: bool,
    dicom_seg: bool,
) -> None:
    """Segment SCANS with RUN, a training run or a file of `liverseg export`: one label a scan, on its own grid.

    A scan is a NIfTI file, a folder of NIfTI files, or a folder or zip of one DICOM series. One that cannot be
    read is reported and does not stop the others.

    With --samples the answer is the mean of N segmentations, drawn as the run was trained to (model.stochastic: dropout
    kept on, or a stochastic segmentation network) or one from each of several runs (--with). Beside each label, a folder
    NAME_uncertainty: maps of predictive entropy, mutual information and tumour probability on the scan's grid, and uncertainty.json:
    volumes with 5-95 % intervals, possible lesions with their probability, and one number to sort a worklist by.

    \b
    Example: liverseg predict runs/liver scan1.nii.gz scan2.nii.gz --out segmentations
             liverseg predict model.safetensors dicom/CT_0042 --out segmentations --preview --statistics
             liverseg predict runs/ssn scan1.nii.gz --out segmentations --samples 16
             liverseg predict runs/a --with runs/b --with runs/c scan1.nii.gz --out segmentations --samples 3
    """
    from liverseg.console import complain, progress_bar, say, warn
    from liverseg.inference.inputs import find_scans
    from liverseg.inference.predict import predict_scan
    from liverseg.inference.segment import load_predictor

    if tta and (fast or samples):
        raise click.UsageError(f"--tta and --{'fast' if fast else 'samples'} exclude each other")
    if dicom_seg:
        _check_dicom_seg(scans)
    predictor = load_predictor(run, *others, device=device, fast=fast, tta=tta, samples=samples)
    if predictor.n_drawn != samples:
        warn(DRAWN.format(predictor.n_drawn, samples))
    found = find_scans(scans)
    failures = 0
    with progress_bar() as bar:
        task = bar.add_task("predict", total=len(found), note="")
        for scan in found:
            bar.update(task, note=scan.name)
            try:
                result = predict_scan(
                    scan, out, predictor, preview=preview, statistics=statistics, dicom_seg=dicom_seg
                )
            except LiversegError as failure:
                complain(str(failure))
                failures += 1
            else:
                for note in result.notes:
                    warn(f"{scan.path}: {note}")
                say(result.line())
            bar.update(task, advance=1)
    if failures:
        sys.exit(1)


def _check_dicom_seg(paths: Sequence[Path]) -> None:
    """Before the network is loaded: a whole night's folder should not end in this message."""
    from liverseg.inference.dicom_seg import require_highdicom
    from liverseg.inference.inputs import find_scans

    others = [scan.path for scan in find_scans(paths) if not scan.is_dicom]
    if others:
        raise click.UsageError(
            f"--dicom-seg refers to the files of a DICOM series, and {others[0]} is no folder or zip of one: "
            "leave the option or the scan out"
        )
    require_highdicom()


@click.command()
@click.argument("run", type=FOLDER)
@click.argument("file", type=FILE)
@click.option(
    "--licence", help="Terms of the weights, kept in the file. Default: those of the training data."
)
def export(run: Path, file: Path, licence: str | None) -> None:
    """Write the best network of RUN as one FILE to hand on: weights, configuration, spec, labels and scores.

    \b
    Example: liverseg export runs/liver liver.safetensors
    """
    from liverseg.console import say
    from liverseg.inference.model_file import LICENCE_NOTE, describe, export_model

    export_model(run, file, licence=LICENCE_NOTE if licence is None else licence)
    about = describe(file)
    say(f"wrote {file} ({file.stat().st_size / 2**20:.1f} MiB)")
    say(f"epoch {about['epoch']}, mean validation Dice {about['validation_dice']:.3f}; {about['licence']}")


COMMANDS = (predict, export)
