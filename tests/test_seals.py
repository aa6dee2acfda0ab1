"""Records that decide a claim: no flipped bit of a split, a history or an exported model goes unnoticed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import SPEC, TinyWorld, tiny_config

from data_cache.errors import ConfigError, LiversegError, RunError
from data_cache.files import write_csv
from data_cache.records import to_json
from liverseg.inference.model_file import export_model, load_trained
from liverseg.pictures.curves import read_history
from liverseg.training.checkpoint import (
    BEST,
    applicable_part,
    content_checksum,
    load_checkpoint,
    snapshot,
    write_checkpoint,
)
from liverseg.training.config import DataConfig
from liverseg.training.split import (
    SPLIT,
    Split,
    check_trained_on,
    load_split,
    make_split,
    save_split,
)
from liverseg.training.state import new_state

TRAIN = ("liver_0", "liver_1", "liver_2")
HASHES = tuple(digit * 64 for digit in "0af")
HISTORY = [{"epoch": n, "train_loss": 1 / n, "val_dice_liver": None if n == 2 else 0.5} for n in range(1, 6)]


def write_split(folder: Path) -> Path:
    save_split(Split(train=TRAIN, val=("liver_3",), train_sha256=HASHES), folder)
    return folder / SPLIT


def write_history(folder: Path) -> Path:
    write_csv(folder / "history.csv", HISTORY, sealed=True)
    return folder / "history.csv"


def history_of(path: Path) -> dict[str, Any]:
    return {key: np.nan_to_num(values, nan=-1).tolist() for key, values in read_history(path).items()}


def split_of(path: Path) -> Any:
    return to_json(load_split(path.parent))


RECORDS = pytest.mark.parametrize(
    ("write", "read"), [(write_split, split_of), (write_history, history_of)], ids=["split", "history"]
)


@RECORDS
@given(where=st.floats(0, 1, exclude_max=True))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_is_noticed_or_harmless(
    tmp_path: Path, write: Callable[[Path], Path], read: Callable[[Path], Any], where: float
) -> None:
    path = write(tmp_path)
    expected, content = read(path), bytearray(path.read_bytes())
    bit = int(where * 8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    try:
        assert read(path) == expected
    except RunError as failure:
        assert str(path) in str(failure)  # noqa: PT017 (either outcome is right)


def test_a_flipped_bit_of_a_checkpoint_is_noticed_or_harmless(tmp_path: Path) -> None:
    """Harmless is a bit that nothing is read from, such as the zip file's padding."""
    config, path = tiny_config(), tmp_path / BEST
    state = new_state(config, torch.device("cpu"))
    write_checkpoint(path, applicable_part(snapshot(state, config, SPEC)))
    expected, whole = content_checksum(load_checkpoint(path)), path.read_bytes()
    noticed = 0
    for bit in np.random.default_rng(0).integers(8 * len(whole), size=40).tolist():
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            assert content_checksum(load_checkpoint(path)) == expected, f"bit {bit}"
        except RunError as failure:
            assert str(path) in str(failure)  # noqa: PT017 (either outcome is right)
            noticed += 1
    assert noticed >= 20


def rewritten(path: Path, **changes: Any) -> None:
    split = Split(**{"train": TRAIN, "val": ("liver_3",), "train_sha256": HASHES, **changes})
    save_split(split, path.parent)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"val": ("liver_1", "liver_3")}, "liver_1 both trains and validates"),
        ({"train_sha256": HASHES[:2]}, "expected 3 hashes in train_sha256, found 2"),
        ({"train_sha256": (*HASHES[:2], "x" * 64)}, "expected 64 hexadecimal digits, found 'xxx"),
        ({"train_voxels": HASHES[:2]}, "expected 3 hashes in train_voxels, found 2"),
        ({"train_voxels": (*HASHES[:2], "y" * 64)}, "expected 64 hexadecimal digits, found 'yyy"),
    ],
)
def test_a_split_that_contradicts_itself_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    rewritten(write_split(tmp_path), **changes)
    with pytest.raises(RunError, match=words):
        load_split(tmp_path)


def test_a_split_without_its_checksum_is_refused(tmp_path: Path) -> None:
    path = write_split(tmp_path)
    content = json.loads(path.read_text())
    del content["checksum"]
    path.write_text(json.dumps(content))
    with pytest.raises(RunError, match="its checksum does not match its content: restore it"):
        load_split(tmp_path)


def test_cases_memorised_on_purpose_may_be_equal(tmp_path: Path) -> None:
    rewritten(write_split(tmp_path), val=TRAIN)
    assert load_split(tmp_path).val == TRAIN


def test_a_named_split_must_not_overlap(tiny_world: TinyWorld) -> None:
    config = DataConfig(train_cases=("liver_1", "liver_2"), val_cases=("liver_2", "liver_3"))
    with pytest.raises(ConfigError, match="liver_2 both trains and validates: list it once"):
        make_split(tiny_world.store, config, seed=0)


def test_another_image_of_the_same_name_is_refused(tiny_world: TinyWorld) -> None:
    split = make_split(tiny_world.store, DataConfig(), seed=0)
    check_trained_on(split, tiny_world.store)
    other = Split(train=split.train, val=split.val, train_sha256=("0" * 64, *split.train_sha256[1:]))
    with pytest.raises(RunError, match=f"the image of {split.train[0]} is not the one"):
        check_trained_on(other, tiny_world.store)
    with pytest.raises(RunError, match="lacks liver_77"):
        check_trained_on(Split(train=("liver_77",), val=(), train_sha256=("0" * 64,)), tiny_world.store)


@pytest.fixture(scope="module")
def exported(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_model(tiny_run, tmp_path_factory.mktemp("exported") / "model.safetensors")


@given(where=st.floats(0, 1, exclude_max=True), in_header=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_flipped_bit_of_an_exported_model_is_noticed(exported: Path, where: float, in_header: bool) -> None:
    content = bytearray(exported.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    bit = int(where * 8 * (header if in_header else len(content)))
    content[bit // 8] ^= 1 << bit % 8
    path = exported.with_name("flipped.safetensors")
    path.write_bytes(content)
    try:
        found = load_trained(path)
    except LiversegError as failure:
        assert str(path) in str(failure)  # noqa: PT017 (either outcome is right)
        return
    expected = load_trained(exported)
    assert (found.config, found.spec) == (expected.config, expected.spec)
    weights = expected.network.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in found.network.state_dict().items())


def test_weights_that_are_not_finite_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    path = export_model(run, tmp_path / "model.safetensors")
    load_trained(path)

    def spoilt(run: Path, name: str) -> dict[str, Any]:
        content: dict[str, Any] = load_checkpoint(run / name)
        next(iter(content["average"].values())).view(-1)[0] = float("nan")
        return content

    from liverseg.inference import model_file
    from liverseg.training.checkpoint import load_checkpoint

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_file, "load_checkpoint", lambda path: spoilt(path.parent, path.name))
        export_model(run, path)
    with pytest.raises(RunError, match="not finite"):
        load_trained(path)


def test_weights_of_another_tool_are_not_taken_for_ours(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(RunError, match="was not written by liverseg export"):
        load_trained(tmp_path / "a.safetensors")
