"""Many scans at once: each gets what it gets alone, in order, with bounded memory, whatever happens to the others."""

from __future__ import annotations

import gc
import gzip
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import tree_bytes
from tiny import TinyWorld

from data_cache.errors import VolumeError
from liverseg.cli import main
from liverseg.inference import batch, predict
from liverseg.inference.batch import predict_scans
from liverseg.inference.inputs import find_scans
from liverseg.inference.predict import Prediction, predict_scan
from liverseg.inference.segment import Predictor, load_predictor, segment
from pipeline.held import HeldBlock
from pipeline.memory import held_bytes
from pipeline.prepare import read_scan

PATIENCE_S = 20.0


@pytest.fixture
def scans(tiny_world: TinyWorld) -> list[Path]:
    return sorted((tiny_world.raw / "imagesTr").glob("*.nii.gz"))[:4]


@pytest.fixture
def predictor(tiny_run: Path) -> Predictor:
    return load_predictor(tiny_run, device="cpu")


def watch(monkeypatch: pytest.MonkeyPatch, call: Callable[[str, int], None]) -> None:
    """Call ``call(what, number)`` before and after the stages of each scan, which are numbered as they are read."""
    numbers: dict[int, int] = {}  # by the address of a header; one that is gone may leave its own to another
    was_read: list[int] = []
    read, work, write = read_scan, segment, predict._write

    def watched_read(path: Path, spec: Any) -> Any:
        number = len(was_read)
        call("read", number)
        held = read(path, spec)
        numbers[id(held.header)] = number
        was_read.append(number)
        call("was read", number)
        return held

    def watched_segment(held: Any, predictor: Predictor) -> Any:
        call("network", numbers[id(held.header)])
        return work(held, predictor)

    def watched_write(label: Path, found: Any, held: Any, *rest: Any) -> Any:
        number = numbers[id(held.header)]
        call("write", number)
        written = write(label, found, held, *rest)
        call("was written", number)
        return written

    monkeypatch.setattr(predict, "read_scan", watched_read)
    monkeypatch.setattr(predict, "segment", watched_segment)
    monkeypatch.setattr(predict, "_write", watched_write)


def test_each_scan_gets_what_it_gets_alone_in_order(
    scans: list[Path], predictor: Predictor, tmp_path: Path
) -> None:
    inputs = find_scans(scans)
    together = list(predict_scans(inputs, tmp_path / "together", predictor))
    for scan, found in zip(inputs, together, strict=True):
        alone = predict_scan(scan, tmp_path / "alone", predictor)
        assert isinstance(found, Prediction)
        assert (found.image, found.liver_ml, found.tumour_ml) == (scan.path, alone.liver_ml, alone.tumour_ml)
        assert found.plausibility == alone.plausibility
    assert tree_bytes(tmp_path / "together") == tree_bytes(tmp_path / "alone")


def test_reading_and_writing_go_on_while_the_network_works(
    scans: list[Path], predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scan 1 waits in the network until 2 is read and 0 written; meanwhile nobody reads a third one ahead."""
    happened, lock = set[tuple[str, int]](), threading.Condition()
    missed: list[str] = []

    def call(what: str, number: int) -> None:
        with lock:
            happened.add((what, number))
            lock.notify_all()
            if (what, number) == ("network", 1):
                wanted = {("was read", 2), ("was written", 0)}
                if not lock.wait_for(lambda: wanted <= happened, timeout=PATIENCE_S):
                    missed.append(f"{wanted - happened} did not happen")
                if lock.wait_for(lambda: ("read", 3) in happened, timeout=0.2):
                    missed.append("two scans were read ahead")

    watch(monkeypatch, call)
    outcomes = list(predict_scans(find_scans(scans), tmp_path, predictor))
    assert all(isinstance(outcome, Prediction) for outcome in outcomes)
    assert not missed


def test_a_scan_too_large_for_the_free_memory_waits_until_the_others_are_written(
    scans: list[Path], predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[tuple[str, int]] = []
    watch(monkeypatch, lambda what, number: happened.append((what, number)))
    needed = max(map(held_bytes, scans))
    monkeypatch.setattr(batch, "free_bytes", lambda: int(needed / batch.READ_AHEAD_SHARE) - 1)
    list(predict_scans(find_scans(scans[:3]), tmp_path, predictor))
    stages = ("read", "was read", "network", "write", "was written")
    assert happened == [(stage, number) for number in range(3) for stage in stages]


def test_what_a_scan_needs_is_known_from_its_header(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((30, 20, 10), dtype=np.int16), np.eye(4))
    nib.save(image, tmp_path / "a.nii.gz")
    # 6000 voxels of 2 bytes, and 8 copies of a block, which here is all of them.
    assert held_bytes(tmp_path / "a.nii.gz") == 12_000 + 8 * 12_000
    (tmp_path / "b.nii.gz").write_bytes(b"no scan")
    assert held_bytes(tmp_path / "b.nii.gz") == 0


@pytest.mark.parametrize(("samples", "is_held"), [(0, False), (2, True)])
def test_voxels_are_let_go_before_writing_unless_samples_need_them(
    scans: list[Path],
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    samples: int,
    is_held: bool,
) -> None:
    alive: list[int] = []

    def count(what: str, _: int) -> None:
        if what == "write":
            alive.append(sum(type(thing) is HeldBlock for thing in gc.get_objects()))

    watch(monkeypatch, count)
    predictor = load_predictor(tiny_run, tiny_run, device="cpu", samples=samples)
    predict_scan(find_scans(scans[:1])[0], tmp_path, predictor)
    assert [n > 0 for n in alive] == [is_held]


def test_what_fails_costs_itself_alone(
    scans: list[Path], predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One scan that is missing, one that fails in the network, one while it is written; the last is segmented."""

    def call(what: str, number: int) -> None:
        if (what, number) in (("network", 0), ("write", 1)):
            raise RuntimeError(f"{what} failed")

    watch(monkeypatch, call)
    inputs = find_scans([tmp_path / "missing.nii.gz", *scans[:3]])
    missing, network, write, found = predict_scans(inputs, tmp_path / "out", predictor)
    assert isinstance(missing, VolumeError)
    assert (str(network), str(write)) == ("network failed", "write failed")
    assert isinstance(found, Prediction)
    assert set(tree_bytes(tmp_path / "out")) == {scans[2].name}


def write_dicom(image: Path, folder: Path) -> None:
    from test_dicom import write_series

    nifti = nib.Nifti1Image.from_filename(image)
    voxels_zyx = np.asarray(nifti.dataobj).astype(np.int16).transpose(2, 1, 0)
    write_series(folder, voxels_zyx, np.asarray(nifti.affine))


def test_an_interrupted_batch_leaves_whole_files_and_nothing_else(
    scans: list[Path], tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interruption comes while one scan is in the network, one is being written, and one is converted and read."""
    pytest.importorskip("pydicom")
    write_dicom(scans[2], tmp_path / "CT_2")
    was_read, interrupted = threading.Event(), threading.Event()

    def call(what: str, number: int) -> None:
        if (what, number) == ("was read", 2):
            was_read.set()
        if (what, number) == ("network", 1):
            assert was_read.wait(PATIENCE_S)
            interrupted.set()
            raise KeyboardInterrupt
        if (what, number) == ("write", 0):
            assert interrupted.wait(PATIENCE_S)

    watch(monkeypatch, call)
    out = tmp_path / "out"
    arguments = ["predict", tiny_run, *scans[:2], tmp_path / "CT_2", scans[3], "--out", out]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 130
    assert "interrupted: finished work is kept; the same command begins again" in result.output
    # Neither a label in part nor what the series was converted to.
    assert set(tree_bytes(out)) == {scans[0].name}
    gzip.decompress((out / scans[0].name).read_bytes())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("read", "write"))]


def test_a_converted_series_is_gone_after_each_scan(
    scans: list[Path], predictor: Predictor, tmp_path: Path
) -> None:
    pytest.importorskip("pydicom")
    for number in range(2):
        write_dicom(scans[number], tmp_path / f"CT_{number}")
    (tmp_path / "CT_1" / "0000.dcm").unlink(missing_ok=True)
    broken = next(iter(sorted((tmp_path / "CT_1").iterdir())))
    broken.write_bytes(broken.read_bytes()[:200])
    shutil.copy(scans[2], tmp_path / "last.nii.gz")
    inputs = find_scans([tmp_path / "CT_0", tmp_path / "CT_1", tmp_path / "last.nii.gz"])
    first, second, third = predict_scans(inputs, tmp_path / "out", predictor)
    assert isinstance(first, Prediction)
    assert isinstance(second, VolumeError)
    assert isinstance(third, Prediction)
    assert set(tree_bytes(tmp_path / "out")) == {"CT_0.nii.gz", "last.nii.gz"}
