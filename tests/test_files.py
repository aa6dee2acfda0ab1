"""Files complete or not at all: leftovers of killed writers go, long names work, and no CSV cell is a formula."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_cache.files import (
    _remove_leftovers,
    parse_partial_name,
    partial_name,
    read_csv,
    read_json,
    read_toml,
    replacing,
    scratch_folder,
    write_csv,
    write_text,
)
from data_cache.processes import own_name

KILLED = """
import os, signal, sys
from pathlib import Path
from data_cache.files import replacing, scratch_folder
folder = Path(sys.argv[1])
with scratch_folder(folder) as scratch, replacing(folder / "a.txt") as file:
    (scratch / "scan.nii").write_text("a patient")
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("next_run", ["file", "folder"])
def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path, next_run: str) -> None:
    (tmp_path / ".another.host@1-1.partial").touch()
    (tmp_path / f"{partial_name('mine')}").touch()  # this process is alive
    kept = names(tmp_path)
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert len(names(tmp_path)) == len(kept) + 2
    if next_run == "file":
        write_text(tmp_path / "b.txt", "b")
        kept.append("b.txt")
    else:
        with scratch_folder(tmp_path) as folder:
            assert names(tmp_path) == sorted([*kept, folder.name])
    assert names(tmp_path) == sorted(kept)


def test_a_number_given_to_another_process_keeps_no_leftover(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    left = names(tmp_path)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        for name in left:  # as if the system had given the number of the killed process to this one
            path = tmp_path / name
            path.rename(tmp_path / re.sub(r"@\d+-", f"@{other.pid}-", name))
        assert len(left) == 2
        assert set(names(tmp_path)).isdisjoint(left)
        write_text(tmp_path / "b.txt", "b")
        assert names(tmp_path) == ["b.txt"]
        other.communicate(b"\n")


def test_the_file_of_a_running_process_stays(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        KILLED.replace("os.kill(os.getpid(), signal.SIGKILL)", "print(flush=True); input()"),
    ]
    with subprocess.Popen([*command, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        written = names(tmp_path)
        assert len(written) == 2
        write_text(tmp_path / "b.txt", "b")
        assert names(tmp_path) == sorted([*written, "b.txt"])
        other.communicate(b"\n")
    assert names(tmp_path) == ["a.txt", "b.txt"]


def test_a_folder_is_searched_for_leftovers_once(tmp_path: Path) -> None:
    before = _remove_leftovers.cache_info().misses
    for n in range(5):
        write_text(tmp_path / f"{n}.txt", "n")
    assert _remove_leftovers.cache_info().misses == before + 1


@given(name=st.text(min_size=1, max_size=300))
def test_a_partial_name_is_short_and_can_be_parsed(name: str) -> None:
    partial = partial_name(name)
    parsed = parse_partial_name(partial)
    assert len(os.fsencode(partial)) <= 255
    assert parsed is not None
    assert parsed[1] == own_name()
    assert parsed[0] == name or len(os.fsencode(name)) > 150


@pytest.mark.parametrize("name", [".a.partial", ".a.host@x-1.partial", ".a.other@12-1.partial", "a.txt"])
def test_other_names_are_not_leftovers(name: str) -> None:
    assert parse_partial_name(name) is None


def test_a_file_of_the_longest_name_is_written(tmp_path: Path) -> None:
    write_text(tmp_path / ("n" * 255), "long")
    assert names(tmp_path) == ["n" * 255]


def test_a_failing_block_leaves_the_older_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a.txt") as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert (names(tmp_path), (tmp_path / "a.txt").read_text()) == (["a.txt"], "old")


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "'=1", '=HYPERLINK("x")'])
def test_no_cell_is_a_formula(tmp_path: Path, cell: str) -> None:
    write_csv(tmp_path / "a.csv", [{"case": cell, "dice": -0.5}])
    with (tmp_path / "a.csv").open(newline="") as file:
        _, (written, number) = csv.reader(file)
    assert (written, number) == (f"'{cell}", "-0.5")
    assert read_csv(tmp_path / "a.csv") == [{"case": cell, "dice": "-0.5"}]


@given(cells=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_is_written_is_read(tmp_path: Path, cells: list[str]) -> None:
    write_csv(tmp_path / "a.csv", [{"case": cell, "other": "x"} for cell in cells])
    assert [row["case"] for row in read_csv(tmp_path / "a.csv")] == cells


@pytest.mark.parametrize("row", ["a", "a,b,c", '"a', "\xff,b"])
def test_a_damaged_table_is_refused(tmp_path: Path, row: str) -> None:
    (tmp_path / "a.csv").write_bytes(f"x,y\r\n{row}\r\n".encode("latin-1"))
    with pytest.raises(ValueError, match="expected|decode"):
        read_csv(tmp_path / "a.csv")


# ---- JSON and TOML

DEEP = {"list": "[" * 100_000, "object": '{"a":' * 100_000, "shallow enough to parse": "[" * 700 + "]" * 700}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_is_read_in_the_encodings_that_editors_write(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.json").write_text('{"name": "Leber, größer"}', encoding=encoding)
    assert read_json(tmp_path / "a.json") == {"name": "Leber, größer"}


@pytest.mark.parametrize("text", [DEEP["list"], DEEP["object"]], ids=["list", "object"])
def test_json_that_is_nested_too_deeply_is_a_fault_of_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("content", [b"", b"{", b'"\xff"', b"\xff\xfe\x00"])
def test_what_is_not_json_is_a_fault_of_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"."):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a = " + "{b = " * 100_000, "a = 1\na = 2"])
def test_toml_that_cannot_be_parsed_is_a_fault_of_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ValueError, match=r"."):
        read_toml(tmp_path / "a.toml")


def test_files_are_parsed_in_one_place_alone() -> None:
    """Elsewhere a file that is nested too deeply would end in a RecursionError."""
    files = [
        p for package in ("data_cache", "pipeline", "liverseg") for p in (REPOSITORY / package).rglob("*.py")
    ]
    parsing = re.compile(
        r"\b(json\.loads?|tomllib\.loads?)\b.*(read_text|read_bytes|open)|json\.load\b|import tomllib"
    )
    found = {p.name for p in files if parsing.search(p.read_text(encoding="utf-8"))}
    assert found == {"files.py"}
