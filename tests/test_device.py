"""Which device is chosen, and what is said of it and of the libraries that compute on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny import TinyWorld

from liverseg import device as device_module
from liverseg.cli import main
from liverseg.device import choose_device, cudnn_warning

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(("version", "name"), [(90800, "9.8.0"), (91002, "9.10.2"), (91499, "9.14.99")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cudnn_with_a_fault_is_told_where_it_matters(
    monkeypatch: pytest.MonkeyPatch, version: int, name: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    words = cudnn_warning(CUDA, dtype)
    assert words is not None
    assert words.startswith(f"cuDNN {name} has a fault in 3-D convolutions in ")
    assert "install cuDNN 9.15 or newer" in words
    assert cudnn_warning(CUDA, None) is None  # float32 is right
    assert cudnn_warning(CPU, dtype) is None


@pytest.mark.parametrize("version", [90701, 91500, None])
def test_other_versions_of_cudnn_are_fine(monkeypatch: pytest.MonkeyPatch, version: int | None) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    assert cudnn_warning(CUDA, torch.bfloat16) is None


def test_mps_is_taken_only_by_name_and_then_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: Any, **__: Any) -> None:
        return None

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    monkeypatch.setattr(torch, "empty", nothing)
    monkeypatch.setattr(device_module, "check_kernels", nothing)
    with pytest.warns(UserWarning, match="mps lacks some 3-D operators"):
        assert choose_device("mps").type == "mps"


def test_training_and_predict_pass_the_warning_on(
    tiny_world: TinyWorld, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liverseg.training.train.cudnn_warning", lambda *_: "cuDNN is ill")
    monkeypatch.setattr(device_module, "cudnn_warning", lambda *_: "cuDNN is ill")
    arguments = ["train", tiny_world.cache, tmp_path / "run", "--config", tiny_run / "config.toml"]
    trained = CliRunner().invoke(main, [*map(str, arguments), "--set", "optim.epochs=1"])
    image = tiny_world.raw / "imagesTr" / "liver_0.nii.gz"
    predicted = CliRunner().invoke(
        main, ["predict", str(tiny_run), str(image), "--out", str(tmp_path / "out")]
    )
    for result in (trained, predicted):
        assert result.exit_code == 0, result.output
        assert result.output.count("warning: cuDNN is ill") == 1
