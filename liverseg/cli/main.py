"""The group of all commands: each parses, builds a configuration, calls one function and prints.

A command imports what it needs when it runs: ``liverseg --help`` must not load torch, which takes a second.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from liverseg.cli import applying, caching, checking, data, laboratory, learning, measuring, scoring
from liverseg.cli.failures import in_words

INTERRUPTED = 130


class _Commands(click.Group):
    """Turns every failure into one line and an exit code: 1 for a failure, 2 for wrong usage, 130 when interrupted."""

    def invoke(self, ctx: click.Context) -> Any:
        if ctx.params["debug"]:
            return super().invoke(ctx)
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except KeyboardInterrupt:
            message = "interrupted: finished work is kept; run the same command again to resume"
            code = INTERRUPTED
        except Exception as failure:
            message, code = in_words(failure, ctx.invoked_subcommand), 1
        from liverseg.console import complain

        complain(message)
        sys.exit(code)


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="liverseg")
def main(debug: bool) -> None:
    """Liver and liver-tumour segmentation from abdominal CT.

    \b
    liverseg preprocess data/Task03_Liver data/liver.zarr
    liverseg train      data/liver.zarr runs/liver --config configs/liver.toml
    liverseg evaluate   data/liver.zarr runs/liver --raw data/Task03_Liver
    liverseg report     runs/liver
    liverseg predict    runs/liver scan.nii.gz --out segmentations
    """


for command in (
    *checking.COMMANDS,
    *data.COMMANDS,
    *caching.COMMANDS,
    *learning.COMMANDS,
    *laboratory.COMMANDS,
    *applying.COMMANDS,
    *scoring.COMMANDS,
    *measuring.COMMANDS,
):
    main.add_command(command)
