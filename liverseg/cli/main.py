"""The group of all commands: each one parses its arguments, calls one function, prints the result and returns it.

A command imports what it needs when it runs: ``liverseg --help`` must not load torch, which takes a second.
"""

from __future__ import annotations

import io
import sys
from typing import Any

import click

from data_cache.text import visible
from liverseg.cli import (
    applying,
    caching,
    checking,
    data,
    laboratory,
    learning,
    measuring,
    scoring,
    viewing,
)
from liverseg.cli.arguments import misplaced
from liverseg.cli.failures import in_words
from liverseg.cli.outcome import Outcome, as_json

INTERRUPTED = 130
CONTINUES = ("preprocess", "download", "overfit", "tune")  # they skip what is done
CALLED = "liverseg.called"
# What --help shows together; a test finds every command in exactly one.
GROUPS = {
    "Data": ("download", "phantom", "check", "preprocess", "verify", "inspect", "fingerprint", "fidelity"),
    "Learn": ("train", "config", "overfit", "tune", "evaluate", "compare", "pool", "score"),
    "Apply": ("predict", "export"),
    "Look": ("report", "view", "bench"),
}


class _Commands(click.Group):
    """Turns every failure into one line and an exit code: 1 for a failure, 2 for wrong usage, 130 when interrupted."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run a command; a terminal or a file that is not UTF-8 gets escapes, not an error."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, **options)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """click's, remembered for hints."""
        name, command, rest = super().resolve_command(ctx, args)
        ctx.meta[CALLED] = (command, list(rest))
        return name, command, rest

    def invoke(self, ctx: click.Context) -> None:
        """Run a command; its result is printed as JSON if that was asked for."""
        if ctx.params["debug"]:
            _finish(super().invoke(ctx), ctx)
            return
        try:
            _finish(super().invoke(ctx), ctx)
            return
        except (click.exceptions.Exit, click.Abort):
            raise
        except click.UsageError as failure:
            lines = "\n".join(map(visible, failure.format_message().split("\n")))
            raise click.UsageError(lines + (_early(failure, ctx) or _hint(ctx)), ctx=failure.ctx) from None
        except KeyboardInterrupt:
            message, code = _interrupted(ctx.invoked_subcommand), INTERRUPTED
        except Exception as failure:
            message, code = in_words(failure, ctx.invoked_subcommand) + _hint(ctx), 1
        from liverseg.console import complain

        complain(message)
        sys.exit(code)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands by what they are for, each with its whole first sentence."""
        for title, names in GROUPS.items():
            commands = [(name, self.get_command(ctx, name)) for name in names]
            rows = [(name, command.get_short_help_str(limit=400)) for name, command in commands if command]
            with formatter.section(title):
                formatter.write_dl(rows)


def _finish(outcome: Any, ctx: click.Context) -> None:
    """Print the result as JSON if that was asked for; exit with 1 where a part of it failed."""
    if not isinstance(outcome, Outcome):
        return
    if ctx.params["json"]:
        click.echo(as_json(outcome, command=str(ctx.invoked_subcommand)))
    if not outcome.complete:
        sys.exit(1)


def _early(failure: click.UsageError, ctx: click.Context) -> str:
    """A hint where an option of all commands stands behind its command; empty for another failure."""
    names = [name for param in ctx.command.params for name in param.opts]
    if not isinstance(failure, click.NoSuchOption) or failure.option_name not in names:
        return ""
    return f" (it goes before the command: liverseg {failure.option_name} {ctx.invoked_subcommand} …)"


def _interrupted(command: str | None) -> str:
    if command == "train":
        return "interrupted: finished work is kept; add --resume to the same command to continue"
    if command in CONTINUES:
        return "interrupted: finished work is kept; run the same command again to continue"
    return "interrupted: finished work is kept; the same command begins again"


def _hint(ctx: click.Context) -> str:
    command, arguments = ctx.meta.get(CALLED, (None, []))
    hint = "" if command is None else misplaced(command, ctx, arguments)
    return f" ({hint})" if hint else ""


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("--quiet", is_flag=True, help="Print errors and warnings only.")
@click.option(
    "--verbose", is_flag=True, help="Also print a line per finished case, and every file of a warning."
)
@click.option(
    "--json",
    is_flag=True,
    help="Print the result as one JSON object and nothing else; progress and warnings go to stderr.",
)
@click.version_option(package_name="liverseg")
@click.pass_context
def main(ctx: click.Context, /, *, quiet: bool, verbose: bool, json: bool, **_: bool) -> None:
    """Liver and liver-tumour segmentation from abdominal CT.

    \b
    liverseg preprocess data/Task03_Liver data/liver.zarr
    liverseg train      data/liver.zarr runs/liver --config configs/liver.toml
    liverseg evaluate   data/liver.zarr runs/liver --raw data/Task03_Liver
    liverseg report     runs/liver
    liverseg predict    runs/liver scan.nii.gz --out segmentations

    --quiet, --verbose and --json go before the command: liverseg --json evaluate …
    """
    if quiet and verbose:
        raise click.UsageError("--quiet and --verbose exclude each other")
    if quiet or verbose or json:
        from liverseg.console import Output, choose_output

        choose_output(Output(quiet=quiet, verbose=verbose, json=json))
        ctx.call_on_close(lambda: choose_output(Output()))


for command in (
    *checking.COMMANDS,
    *data.COMMANDS,
    *caching.COMMANDS,
    *learning.COMMANDS,
    *laboratory.COMMANDS,
    *applying.COMMANDS,
    *scoring.COMMANDS,
    *measuring.COMMANDS,
    *viewing.COMMANDS,
):
    main.add_command(command)
