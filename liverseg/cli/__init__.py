"""The command ``liverseg``."""

from liverseg.cli.main import main

__all__ = ["main"]
