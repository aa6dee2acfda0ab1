"""``python -m liverseg``."""

from liverseg.cli import main

main()
