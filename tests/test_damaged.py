"""A damaged case of a store is reported, never stops the others, and makes the exit code 1."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny import TinyWorld

import liverseg
from data_cache.errors import CacheError
from data_cache.reader import CacheStore
from liverseg.cli import main

Run = Callable[..., Result]
META = "liver_3/zarr.json"
BROKEN = {
    "no JSON": (META, b"{", "cannot be read"),
    "an empty file": (META, b"", "cannot be read"),
    "a list": (META, b"[]", "lacks what liverseg preprocess writes"),
    "null": (META, b"null", "lacks what liverseg preprocess writes"),
    "no attributes": (META, b'{"attributes": null}', "lacks what liverseg preprocess writes"),
    "foreign attributes": (META, b'{"attributes": {"a": 1}}', "lacks what liverseg preprocess writes"),
    "nested": (META, b"[" * 100_000, "nested too deeply"),
    "an array's": ("liver_3/scan/image/zarr.json", b"{}", "metadata has changed since it was written"),
}


@pytest.fixture
def run() -> Run:
    return lambda *arguments: CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def cache(tiny_world: TinyWorld, tmp_path: Path) -> Path:
    shutil.copytree(tiny_world.cache, tmp_path / "cache.zarr")
    return tmp_path / "cache.zarr"


@pytest.fixture
def bad(cache: Path) -> Path:
    (cache / META).write_bytes(b"{")
    return cache


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def words(result: Result) -> str:
    return " ".join(result.output.split())


@pytest.mark.parametrize(("name", "content", "what"), BROKEN.values(), ids=list(BROKEN))
def test_a_store_opens_without_its_damaged_cases(cache: Path, name: str, content: bytes, what: str) -> None:
    whole = CacheStore.open(cache)
    (cache / name).write_bytes(content)
    store = CacheStore.open(cache, skip_damaged=True)
    assert store.case_ids == tuple(case for case in whole.case_ids if case != "liver_3")
    assert list(store.damaged) == ["liver_3"]
    for use in (
        lambda: CacheStore.open(cache),
        lambda: store.meta("liver_3"),
        lambda: store.read("liver_3", "scan"),
    ):
        with pytest.raises(CacheError, match=f"liver_3.*{what}|{what}.*liver_3") as caught:
            use()
        assert "liverseg verify" in str(caught.value)
        assert "liverseg preprocess" in str(caught.value)


def test_several_damaged_cases_are_named(bad: Path) -> None:
    (bad / "liver_5" / "zarr.json").write_bytes(b"[]")
    with pytest.raises(CacheError, match=r"2 cases are damaged \(liver_3, liver_5\): run liverseg verify"):
        CacheStore.open(bad)
    assert list(CacheStore.open(bad, skip_damaged=True).damaged) == ["liver_3", "liver_5"]


@pytest.mark.parametrize("content", [b"[]", b"null", b'{"attributes": null}', b"{"])
def test_a_damaged_root_is_still_an_error_that_says_what_to_do(cache: Path, content: bytes) -> None:
    (cache / "zarr.json").write_bytes(content)
    with pytest.raises(CacheError, match="name another folder, or, if it is a cache, run liverseg verify"):
        CacheStore.open(cache, skip_damaged=True)


def test_inspect_shows_the_others(run: Run, bad: Path, tmp_path: Path) -> None:
    result = run("inspect", bad)
    assert result.exit_code == 1
    assert "liver_3: " in result.output
    assert all(f"liver_{n}" in result.output for n in (0, 1, 2, 4, 5))
    two = run("inspect", bad, "liver_1", "liver_3")
    assert two.exit_code == 1
    assert "liver_1" in two.output
    assert "liver_3/zarr.json: cannot be read" in words(two).replace("liver_3/ ", "liver_3/")
    assert run("inspect", bad, "liver_1").exit_code == 0
    picture = run("inspect", bad, "liver_3", "--png", tmp_path / "a.png")
    assert (picture.exit_code, (tmp_path / "a.png").exists()) == (1, False)


def test_a_page_shows_the_others(run: Run, bad: Path, tmp_path: Path) -> None:
    flip(bad / "liver_1" / "scan" / "image" / "c" / "0" / "0" / "0")
    result = run("inspect", bad, "--html", tmp_path / "page.html")
    assert result.exit_code == 1
    assert "liver_1: " in result.output
    assert "liver_3: " in result.output
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "liver_0" in page
    assert "liver_1" not in page
    assert "4 of 5 cases" in page
    alone = run("inspect", bad, "liver_1", "--html", tmp_path / "none.html")
    assert (alone.exit_code, (tmp_path / "none.html").exists()) == (1, False)


@pytest.mark.parametrize("command", ["fingerprint", "fidelity"])
def test_measuring_goes_on(run: Run, tiny_world: TinyWorld, bad: Path, tmp_path: Path, command: str) -> None:
    out = tmp_path / "numbers.json"
    raw = (tiny_world.raw,) if command == "fidelity" else ()
    result = run(command, *raw, bad, "--json", out, "--jobs", 1)
    assert result.exit_code == 1, result.output
    assert "liver_3: " in result.output
    content = json.loads(out.read_text())
    assert (content["n_cases"] if command == "fingerprint" else len(content["cases"])) == 5


def test_evaluating_goes_on(
    run: Run, tiny_world: TinyWorld, tiny_run: Path, bad: Path, tmp_path: Path
) -> None:
    common = (
        "evaluate",
        bad,
        tiny_run,
        "--raw",
        tiny_world.raw,
        "--device",
        "cpu",
        "--out",
        tmp_path / "out",
    )
    one = run(*common, "--case", "liver_1")
    assert one.exit_code == 0, one.output
    damaged = run(*common, "--case", "liver_3")
    assert damaged.exit_code == 1
    assert "cannot be read" in words(damaged)
    result = run("--json", *common)
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert list(told["failed"]) == ["liver_3"]
    assert told["cases"]
    scores = liverseg.evaluate(
        bad, tiny_run, raw=tiny_world.raw, device="cpu", out=tmp_path / "api", progress=False
    )
    assert list(scores.failed) == ["liver_3"]
    assert len(scores.cases) == len(told["cases"])


def test_training_refuses_a_store_with_a_damaged_case(run: Run, bad: Path, tmp_path: Path) -> None:
    result = run("train", bad, tmp_path / "run", "--set", "device=cpu")
    assert result.exit_code == 1
    assert "cannot be read" in words(result)
    assert not (tmp_path / "run").exists()


def test_verify_marks_the_case_for_preprocess(run: Run, bad: Path) -> None:
    assert run("verify", bad).exit_code == 1
    assert [path.parent.name for path in bad.glob("*/rebuild.txt")] == ["liver_3"]
