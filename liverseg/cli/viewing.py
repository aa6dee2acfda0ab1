"""Commands that show: any label on any scan, and every setting of a run."""

from __future__ import annotations

from pathlib import Path

import click

from liverseg.cli.common import FILE
from liverseg.cli.outcome import Outcome

ANY = click.Path(path_type=Path)


@click.command()
@click.argument("scan", type=ANY)
@click.argument("label", type=FILE)
@click.option(
    "--out", type=FILE, help="Default: NAME_view.html in the working directory, of the scan's name."
)
def view(scan: Path, label: Path, out: Path | None) -> Outcome:
    """Write one HTML file that shows LABEL, from any tool, on SCAN: contours in three planes, lesions to jump to.

    SCAN is a NIfTI file, or a folder or zip of one DICOM series; LABEL is a NIfTI file on its grid. Values 1 and 2 are
    liver and tumour; a label with other values shows its largest 15 by number. The page needs no server.

    \b
    Example: liverseg view scan.nii.gz segmentations/scan.nii.gz
             liverseg view dicom/CT_0042 totalsegmentator/liver.nii.gz --out liver.html
    """
    from liverseg.console import say, warn
    from liverseg.evaluation.view_label import view_label

    written, notes = view_label(scan, label, out)
    for note in notes:
        warn(note)
    say(f"wrote {written.line()}")
    return Outcome(result={"page": written, "notes": notes})


@click.command()
@click.argument("section", required=False)
@click.option("--markdown", is_flag=True, help="Print the page docs/configuration.md instead.")
def config(section: str | None, markdown: bool) -> Outcome:
    """List every setting of a run with its default and what it means: all, or those of one SECTION.

    \b
    Example: liverseg config
             liverseg config optim
    """
    from liverseg.console import console, table
    from liverseg.training.settings import list_settings, section_summary, settings_markdown

    settings = list_settings()
    sections = list(dict.fromkeys(setting.section for setting in settings))
    if section is not None and section not in sections:
        raise click.UsageError(f"no section {section!r}: choose one of {', '.join(filter(None, sections))}")
    chosen = sections if section is None else [section]
    if markdown and not console.quiet:
        click.echo(settings_markdown(), nl=False)
    for name in () if markdown else chosen:
        rows = [(s.key, s.default, s.meaning.replace("`", "")) for s in settings if s.section == name]
        title = section_summary(name).replace("`", "")
        console.print(table(title, ("--set", "default", "meaning"), rows, left=True))
    return Outcome(result={"settings": [setting for setting in settings if setting.section in chosen]})


COMMANDS = (view, config)
