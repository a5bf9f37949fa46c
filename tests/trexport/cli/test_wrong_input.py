"""Section by section what users hand in by mistake: each has one clear message, the right exit code, and leaves nothing."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.trexport.helpers import copy_of, leftovers, run_cli
from trexport.models.writer import SafetensorsWriter

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def truncate(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return (_explode, (str(self.path),))


def _explode(path: str) -> None:
    Path(path).touch()


def rename(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER.replace('to_q', 'to_p')}.transform.core.0"] = tensors.pop(f"{LAYER}.transform.core.0")


WRONG: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "truncated": (truncate, ["truncated"]),
    "corrupt": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 5000), [WEIGHTS]),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), [WEIGHTS]),
    "a pickle, renamed": (lambda f: torch.save(Bomb(f / "boom"), f / WEIGHTS), ["pickle"]),
    "core missing": (
        lambda f: edit_tensors(f, lambda t: t.pop(f"{LAYER}.transform.core.1")),
        [f"{LAYER}.transform.core.1", "missing"],
    ),
    "core of a wrong shape": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{LAYER}.residual.row_core.0": torch.zeros(3, 6, 6)})),
        [LAYER],
    ),
    "core of a wrong rank": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{LAYER}.transform.core.0": torch.zeros(4, 4, 3, 2)})),
        [f"{LAYER}.transform.core"],
    ),
    "NaN inside": (
        lambda f: edit_tensors(f, lambda t: t[f"{LAYER}.residual.column_core.2"].view(-1)[3:4].fill_(float("nan"))),
        [f"{LAYER}.residual.column_core.2", "NaN"],
    ),
    "unknown key": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{LAYER}.transform.cor.0": torch.zeros(2)})),
        [f"{LAYER}.transform.cor.0", "core.0"],
    ),
    "unknown module": (lambda f: edit_tensors(f, rename), ["to_p"]),
    "newer format": (lambda f: edit_config(f, format_version=2), ["format_version 2"]),
    "another format": (lambda f: edit_config(f, format="peft"), ["peft"]),
    "config contradicts": (
        lambda f: edit_config(
            f, default={"transform": {"type": "tensor_ring", "rank": 3}, "residual": {"type": "none"}}
        ),
        ["rank"],
    ),
    "no config": (lambda f: (f / CONFIG).unlink(), [CONFIG]),
    "config no JSON": (lambda f: (f / CONFIG).write_text("{"), [CONFIG]),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("command", ["merge", "onnx"])
def test_a_bad_adapter(
    case: str, command: str, unet_folder: Path, adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, words = WRONG[case]
    adapter = copy_of(adapter_folder, tmp_path / "adapter")
    damage(adapter)
    assert run_cli([command, unet_folder, adapter, "-o", tmp_path / "out"]) == 1
    error = capsys.readouterr().err
    assert error.count("Error: ") == 1
    assert "Traceback" not in error
    assert all(word in error for word in [str(adapter), *words]), error
    assert leftovers(tmp_path) == ["adapter"]
    assert not (adapter / "boom").exists()


def test_an_adapter_for_another_architecture(
    adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(["merge", "sample:digits", adapter_folder, "-o", tmp_path / "out"]) == 1
    error = capsys.readouterr().err
    assert "does not fit the base" in error
    assert "features" in error or "no such linear layer" in error
    assert leftovers(tmp_path) == []


def test_a_truncated_base(
    unet_folder: Path, adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = copy_of(unet_folder, tmp_path / "base")
    (file,) = base.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    assert run_cli(["merge", base, adapter_folder, "-o", tmp_path / "out"]) == 1
    assert file.name in capsys.readouterr().err
    file.unlink()
    assert run_cli(["onnx", base, adapter_folder, "-o", tmp_path / "out"]) == 1
    assert "no weights" in capsys.readouterr().err
    assert leftovers(tmp_path) == ["base"]


def test_a_full_disk(
    unet_folder: Path, adapter_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def full(self: SafetensorsWriter, tensor: Tensor) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SafetensorsWriter, "write", full)
    assert run_cli(["merge", unet_folder, adapter_folder, "-o", tmp_path / "out"]) == 1
    assert "disk is full" in capsys.readouterr().err
    assert leftovers(tmp_path) == []
