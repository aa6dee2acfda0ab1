"""The documentation does what it says: its commands and Python run, its links lead somewhere, its notebook is executed."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import REPOSITORY
from test_dicom import write_series
from tiny import TinyWorld

from liverseg.cli import main

PAGES = (
    "README.md",
    *(f"docs/{name}.md" for name in ("getting-started", "cache-format", "uncertainty", "scoring", "report")),
)
# Not run here, and why; also not the commands of the pages that are not in PAGES, which are torchrun and make.
NOT_RUN = {
    "liverseg download": "27 GB",
    "liverseg score segmentations data/Task03_Liver/labelsTs": "labels that the Decathlon keeps",
    "make": "it installs into the repository; its targets are looked up below",
    "git clone": "the address is the reader's",
    "docker": "not on every machine; the test of the Dockerfile's steps looks at what it runs",
}
TINY = "[data]\nfolds = 3\n[model]\nbase_channels = 1\n[optim]\nepochs = 1\nsteps_per_epoch = 1\n"


def blocks(page: str, kind: str) -> list[str]:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


def commands(page: str) -> Iterator[str]:
    """Every line of its shell blocks."""
    for block in blocks(page, "sh"):
        for line in block.splitlines():
            command = line.split(" #")[0].strip()
            if command and not any(command.startswith(f"{words} ") for words in NOT_RUN):
                yield command


@pytest.fixture(scope="module")
def home(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a user's: phantoms in place of the Decathlon, and configurations of a network of one channel."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(tiny_world.raw, folder / "data" / "Task03_Liver")
    shutil.copy(tiny_world.raw / "imagesTs" / "liver_6.nii.gz", folder / "scan.nii.gz")
    pytest.importorskip("pydicom")
    nifti = nib.Nifti1Image.from_filename(folder / "scan.nii.gz")
    voxels_zyx = np.asarray(nifti.dataobj).astype(np.int16).transpose(2, 1, 0)
    write_series(folder / "dicom" / "CT_0042", voxels_zyx, np.asarray(nifti.affine))
    (folder / "configs").mkdir()
    for path in (REPOSITORY / "configs").glob("*.toml"):
        (folder / "configs" / path.name).write_text(TINY)
    return folder


def test_commands_and_python_of_all_pages_run_in_their_order(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    # README first segments, as a reader does who has a network, and then trains.
    ordered = sorted(commands("README.md"), key=lambda command: command.split()[1] in ("predict", "view"))
    for page in PAGES:
        for command in ordered if page == "README.md" else commands(page):
            program, *arguments = shlex.split(command)
            assert program == "liverseg", f"{page}: {command}: run it, or name it in NOT_RUN"
            result = CliRunner().invoke(main, arguments)
            assert result.exit_code == 0, f"{page}: {command}\n{result.output}\n{result.exception!r}"
        for block in blocks(page, "python"):
            scope: dict[str, Any] = {}
            if "liverseg.train" in block:
                block = f"import liverseg\n{block}"
            exec(compile(block, page, "exec"), scope)
    assert (home / "segmentation.nii.gz").exists()
    assert scope["view"].image_zyx.shape == (64, 128, 128) or page != "docs/cache-format.md"


def test_the_notebook_runs_and_has_no_outputs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    notebook = json.loads((REPOSITORY / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    scope: dict[str, Any] = {}
    shown = []
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        source = "".join(cell["source"])
        # Minutes become seconds.
        source = source.replace("6, 2, 20", "3, 1, 1").replace("(96, 96, 64)", "(40, 40, 40)")
        *body, last = ast.parse(source).body
        if isinstance(last, ast.Expr):
            exec(compile(ast.Module(body, type_ignores=[]), "notebook", "exec"), scope)
            shown.append(eval(compile(ast.Expression(last.value), "notebook", "eval"), scope))
        else:
            exec(compile(source, "notebook", "exec"), scope)
    pages = [value._repr_html_() for value in shown if hasattr(value, "_repr_html_")]
    assert len(pages) == 4  # a cache, a run, scores, a segmentation
    assert "<svg" in pages[1]
    assert "data:image/png" in pages[3]


def documents() -> list[Path]:
    return [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")]


def test_troubleshooting_quotes_what_the_program_says() -> None:
    """Each message in italics, in the parts between what differs from case to case."""
    source = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("liverseg", "pipeline", "data_cache")
        for path in (REPOSITORY / folder).rglob("*.py")
    )
    text = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [
        words
        for row in re.findall(r"^\| (.*?) \|", text, re.MULTILINE)
        for words in re.findall(r"\*(.+?)\*", row)
    ]
    assert len(quoted) > 8
    for words in quoted:
        parts = [part.strip() for part in re.split(r"…|\d[\d.]*", words)]
        for part in parts:
            assert len(part) < 7 or part in source, f"{words}: {part!r} is said nowhere"


def test_links_lead_somewhere() -> None:
    for page in documents():
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if not target.startswith(("http:", "https:")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_is_short_and_names_every_page() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 110
    for page in (REPOSITORY / "docs").glob("*.md"):
        assert f"docs/{page.name}" in text, page.name


def test_named_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):.*## ", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for page in documents():
        for words in re.findall(
            r"(?:^|`)make ((?:[a-z]+ ?)+)`?", page.read_text(encoding="utf-8"), re.MULTILINE
        ):
            named = (
                words.split() if f"`make {words}`" in page.read_text(encoding="utf-8") else words.split()[:1]
            )
            assert set(named) <= targets, f"{page.name}: make {words}"


def test_the_tumour_is_spelt_as_in_the_code() -> None:
    for page in (*documents(), REPOSITORY / "CITATION.cff"):
        assert not re.search(r"\btumors?\b", page.read_text(encoding="utf-8"), re.IGNORECASE), page.name


def test_what_is_not_run_is_still_in_the_documentation() -> None:
    lines = [line for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]
    for words in NOT_RUN:
        assert any(line.startswith(f"{words} ") for line in lines), words


def test_the_image_and_ci_run_what_the_repository_has() -> None:
    """The steps of the Dockerfile and of the workflow, without docker: paths exist, scripts parse, targets are make's."""
    steps = [line.split() for line in (REPOSITORY / "Dockerfile").read_text().splitlines() if line]
    ((source, target),) = [words[1:] for words in steps if words[0] == "COPY"]
    assert (REPOSITORY / source).is_dir()
    ignored = set((REPOSITORY / ".dockerignore").read_text().split())
    assert not ignored & {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        ".ci",
        "liverseg",
        "pipeline",
        "data_cache",
    }
    scripts = [words[1].removeprefix(f"{target}/") for words in steps if words[0] == "RUN"]
    workflow = (REPOSITORY / ".github" / "workflows" / "check.yml").read_text()
    commands = [part.strip() for run in re.findall(r"- run: (.+)", workflow) for part in run.split("&&")]
    scripts += [command for command in commands if not command.startswith("sudo apt-get ")]
    assert scripts == [".ci/install", ".ci/run"]
    for script in scripts:
        assert os.access(REPOSITORY / script, os.X_OK), script
        subprocess.run(["bash", "-n", REPOSITORY / script], check=True)
    (made,) = re.findall(r"make (\w+)$", (REPOSITORY / ".ci" / "run").read_text(), re.MULTILINE)
    assert re.search(rf"^{made}:.*## ", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    (entry,) = [json.loads(" ".join(words[1:])) for words in steps if words[0] == "ENTRYPOINT"]
    assert f'\n{entry[0]} = "liverseg.cli:main"\n' in (REPOSITORY / "pyproject.toml").read_text()


def test_commands_that_docs_name_exist() -> None:
    for page in documents():
        if page.name in ("EXPERIMENTS.md", "CHANGELOG.md"):
            continue  # they tell of earlier versions
        for name in re.findall(r"`liverseg ([a-z]+)", page.read_text(encoding="utf-8")):
            assert name in main.commands, f"{page.name}: liverseg {name}"


def test_no_file_of_the_repository_is_large() -> None:
    for folder in ("docs", "examples", "tests", "configs", ".github"):
        for path in (REPOSITORY / folder).rglob("*"):
            assert not path.is_file() or path.stat().st_size < 600_000, path
