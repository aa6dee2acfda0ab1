"""Who may import whom, what a fresh interpreter loads, and which names are public."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

from data_cache import errors

PACKAGES = ("data_cache", "pipeline", "liverseg")
HEAVY = {"torch", "matplotlib", "nibabel", "scipy", "zarr", "loky"}


def sources(package: str) -> Iterator[Path]:
    yield from sorted((REPOSITORY / package).rglob("*.py"))


def imported_packages(path: Path) -> set[str]:
    """The first part of every name that a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                found |= {name.name.split(".")[0] for name in names}
            case ast.ImportFrom(module=str(module), level=0):
                found.add(module.split(".")[0])
            case ast.ImportFrom(level=level) if level:
                raise AssertionError(f"{path}:{node.lineno}: a relative import hides its package")
    return found


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("data_cache", {"pipeline", "liverseg", "torch", "nibabel"}),
        ("pipeline", {"liverseg", "torch"}),
    ],
)
def test_imports_never_point_back(package: str, forbidden: set[str]) -> None:
    files = list(sources(package))
    assert len(files) > 5
    for path in files:
        assert not imported_packages(path) & forbidden, path


# From the ground up: what stands on a floor imports from its own floor and from those before it, never from a later one.
FLOORS = (
    ("console", "device", "errors", "version"),
    ("measure", "model"),
    ("pictures",),
    ("training",),
    ("inference",),
    ("evaluation",),
    ("laboratory", "bench"),
    ("results",),
    ("api",),
    ("cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imported_rooms(path: Path) -> set[str]:
    """The rooms of liverseg/ that a file imports from, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                modules = [name.name for name in names]
            case ast.ImportFrom(module="liverseg", names=names):
                modules = [f"liverseg.{name.name}" for name in names]
            case ast.ImportFrom(module=str(module)):
                modules = [module]
            case _:
                continue
        found |= {module.split(".")[1] for module in modules if module.startswith("liverseg.")}
    return found


def test_no_room_imports_from_a_floor_above() -> None:
    entrances = {"__init__", "__main__"}
    for path in sources("liverseg"):
        room = path.relative_to(REPOSITORY / "liverseg").parts[0].removesuffix(".py")
        if room in entrances:
            continue
        upwards = {other for other in imported_rooms(path) if FLOOR_OF[other] > FLOOR_OF[room]}
        beside = {other for other in imported_rooms(path) - {room} if FLOOR_OF[other] == FLOOR_OF[room]}
        assert not upwards | beside, f"{path}: imports {upwards | beside} from {room}"


def test_measure_is_numpy_only() -> None:
    for path in sources("liverseg/measure"):
        assert not imported_packages(path) & {"torch", "matplotlib", "zarr", "nibabel"}, path
        assert imported_rooms(path) <= {"measure"}, path


def test_one_package_knows_nibabel() -> None:
    for package in PACKAGES:
        for path in sources(package):
            if path.parent != REPOSITORY / "pipeline" / "nifti":
                assert "nibabel" not in imported_packages(path), path


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after ``statement``."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/")
    return {name.split(".")[0] for name in json.loads(run.stdout.splitlines()[-1])}


@pytest.mark.parametrize(
    "module", ["pipeline.build", "pipeline.prepare", "pipeline.restore", "data_cache.reader"]
)
def test_workers_load_no_torch(module: str) -> None:
    loaded = loaded_by(f"import {module}")
    assert "liverseg" not in loaded
    assert not loaded & {"torch", "matplotlib"}


def test_the_cache_alone_loads_neither_pipeline_nor_nibabel() -> None:
    loaded = loaded_by("import data_cache.reader, data_cache.writer, data_cache.inspection")
    assert not loaded & {"pipeline", "liverseg", "nibabel", "torch", "loky"}


def test_help_loads_nothing_heavy() -> None:
    loaded = loaded_by("from liverseg.cli import main\nmain(['--help'], standalone_mode=False)")
    assert "click" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("package", PACKAGES)
def test_init_is_a_sentence_and_names(package: str) -> None:
    for path in sources(package):
        if path.name != "__init__.py":
            continue
        first, *rest = ast.parse(path.read_text(encoding="utf-8")).body
        assert isinstance(first, ast.Expr), path
        for node in rest:
            is_all = isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
            assert is_all or isinstance(node, ast.ImportFrom), f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (
            "pipeline.nifti",
            {
                "NO_UNIT",
                "CorruptStreamError",
                "FileAxis",
                "NiftiImage",
                "VolumeHeader",
                "VolumeStream",
                "read_canonical",
                "from_canonical",
                "label_image",
                "read_planes",
                "temporary_nifti",
                "to_canonical",
                "write_labels",
                "write_map",
                "write_slices",
                "write_volume",
            },
        ),
        ("pipeline.phantom", {"Anatomy", "PhantomSpec", "draw_anatomy", "render", "write_phantoms"}),
        ("liverseg.cli", {"main"}),
        (
            "liverseg",
            {
                "Cache",
                "Progress",
                "Run",
                "Scores",
                "__version__",
                "errors",
                "evaluate",
                "load",
                "preprocess",
                "train",
            },
        ),
        ("liverseg.errors", {name for name in vars(errors) if name.endswith("Error")}),
    ],
)
def test_public_names(module: str, names: set[str]) -> None:
    loaded = importlib.import_module(module)
    assert set(loaded.__all__) == names
    assert all(hasattr(loaded, name) for name in names)


def test_every_error_is_in_the_drawing() -> None:
    classes = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, Exception)]
    assert errors.__doc__ is not None
    for error in classes:
        assert issubclass(error, errors.LiversegError)
        line = next(line for line in errors.__doc__.splitlines() if f"{error.__name__} " in line)
        # Three characters of the drawing for each step away from the root.
        depth = error.__mro__.index(errors.LiversegError)
        assert line.index(error.__name__) == 4 * depth, error
