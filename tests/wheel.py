"""Build the wheel, install it without its dependencies in an empty environment, and import all three packages.

A script and not a test, since it needs `build` and some seconds: `make check` runs it. The packages of the running
environment are made importable by a .pth file, so that nothing is downloaded and yet liverseg comes from the wheel.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("data_cache", "liverseg", "pipeline")
PROBE = """
import importlib, pkgutil, sys
from importlib.metadata import version
for name in ("data_cache", "pipeline", "liverseg"):
    package = importlib.import_module(name)
    assert package.__file__.startswith(sys.prefix), f"{name} comes from {package.__file__}, not from the wheel"
    for module in pkgutil.walk_packages(package.__path__, f"{name}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
print("liverseg", version("liverseg"), "imports from its wheel")
"""


def main() -> None:
    """Exit non-zero where the wheel lacks a module."""
    with tempfile.TemporaryDirectory() as folder:
        build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, str(ROOT)]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
        (wheel,) = Path(folder).glob("*.whl")
        environment = Path(folder) / "empty"
        venv.create(environment)
        site = next(environment.glob("lib/python*/site-packages"))
        zipfile.ZipFile(wheel).extractall(site)
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        # -P keeps the working tree off sys.path; a .pth file is read after the wheel's own folder.
        subprocess.run([str(environment / "bin" / "python"), "-P", "-c", PROBE], check=True, cwd=folder)


if __name__ == "__main__":
    main()
