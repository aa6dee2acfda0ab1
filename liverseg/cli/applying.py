"""Commands that apply and score a trained run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from data_cache.errors import LiversegError
from liverseg.cli.common import FOLDER

if TYPE_CHECKING:
    from liverseg.inference.evaluate import CaseEvaluation


@click.command()
@click.argument("run", type=FOLDER)
@click.argument("cache", type=FOLDER)
@click.option("--raw", required=True, type=FOLDER, help="The data set that CACHE was built from.")
@click.option("--out", type=FOLDER, help="Default: RUN/evaluation.")
@click.option(
    "--case", "cases", multiple=True, help="Score this case; repeatable. Default: all never trained on."
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, …")
def evaluate(
    run: Path, cache: Path, raw: Path, out: Path | None, cases: tuple[str, ...], device: str
) -> None:
    """Score RUN in native space on the cases of CACHE that it was never trained on.

    Writes scores.csv, summary.json and one overlay picture a case. Each case is scored as a user gets it
    (predicted crop), with the label's crop, and for what the grid itself allows.

    \b
    Example: liverseg evaluate runs/liver data/liver.zarr --raw data/Task03_Liver
    """
    from data_cache.reader import CacheStore
    from liverseg.console import complain, progress_bar, say, warn
    from liverseg.inference.evaluate import choose_cases
    from liverseg.inference.evaluate import evaluate as score
    from liverseg.inference.segment import load_predictor
    from liverseg.training.split import load_split

    predictor, split, store = load_predictor(run, device=device), load_split(run), CacheStore.open(cache)
    case_ids, unseen = choose_cases(store, split, cases)
    if not unseen:
        warn("some of these cases were trained on: their scores say how well they were learnt, no more")
    out = out or run / "evaluation"
    with progress_bar() as bar:
        task = bar.add_task("evaluate", total=len(case_ids), note="")

        def report(case_id: str, result: CaseEvaluation | LiversegError) -> None:
            bar.update(task, advance=1, note=case_id)
            if isinstance(result, LiversegError):
                complain(f"{case_id}: {result}")

        scored = score(predictor, store, split, case_ids=case_ids, raw=raw, out=out, report=report)
    _print_scores(scored, unseen=unseen)
    say(f"wrote scores.csv, summary.json and {len(scored)} overlays to {out}")
    if len(scored) < len(case_ids):
        sys.exit(1)


def _print_scores(scored: list[CaseEvaluation], *, unseen: bool) -> None:
    from liverseg.console import console, number, say, table
    from liverseg.inference.evaluate import CLASSES, score_row, summarise

    if not scored:
        return
    headers = ("case", "liver Dice", "HD95 mm", "mL", "of mL", "tumour Dice", "HD95 mm", "mL", "of mL")
    kind = "never trained on" if unseen else "TRAINED ON"
    rows = map(score_row, scored)
    console.print(table(f"native space, predicted crop, cases {kind}", headers, rows))
    summary = summarise(scored)
    means = [
        (
            name,
            str(summary[name]["n_cases_with_it"]),
            *(
                f"{number(m['mean'])} [{number(m['low95'])}, {number(m['high95'])}]"
                for m in (summary[name][key] for key in ("dice", "dice_with_label_crop", "dice_grid_ceiling"))
            ),
            number(summary[name]["hd95_mm"]["mean"], 1),
        )
        for name in CLASSES
    ]
    columns = ("mean over cases [95 %]", "cases", "Dice", "label's crop", "grid's ceiling", "HD95 mm")
    console.print(table("summary (cases that have it)", columns, means))
    say(f"rule: {summary['rule']}")


@click.command()
@click.argument("run", type=FOLDER)
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=FOLDER, help="One label file per image, on its grid.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, …")
def predict(run: Path, images: tuple[Path, ...], out: Path, device: str) -> None:
    """Segment NIfTI IMAGES with the best network of RUN: one label file per image, on the image's own grid.

    An image that cannot be read is reported and does not stop the others.

    \b
    Example: liverseg predict runs/liver scan1.nii.gz scan2.nii.gz --out segmentations
    """
    from liverseg.console import complain, progress_bar, say, warn
    from liverseg.inference.predict import predict_file
    from liverseg.inference.segment import load_predictor

    predictor = load_predictor(run, device=device)
    failures = 0
    with progress_bar() as bar:
        task = bar.add_task("predict", total=len(images), note="")
        for image in images:
            bar.update(task, note=image.name)
            try:
                result = predict_file(image, out, predictor)
            except LiversegError as failure:
                complain(str(failure))
                failures += 1
            else:
                for note in result.notes:
                    warn(f"{image}: {note}")
                say(result.line())
            bar.update(task, advance=1)
    if failures:
        sys.exit(1)


COMMANDS = (evaluate, predict)
