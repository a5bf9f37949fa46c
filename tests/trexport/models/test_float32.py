"""Float32 that is float32: no TF32 in what is compared and measured."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trexport.helpers import SIZES
from trexport.artifact import Artifact
from trexport.backends import BACKENDS, OnnxFile, TorchModel, onnxruntime
from trexport.backends.aoti.runner import AotInductorRunner
from trexport.backends.onnxruntime import exact
from trexport.models.base import Base
from trexport.models.float32 import full_float32
from trexport.models.model import random_feeds
from trexport.parity.reference import Reference

PRODUCTS: Any = torch.backends.cuda.matmul
CUDNN: Any = torch.backends.cudnn
CONVOLUTIONS: Any = CUDNN.conv


def in_tf32() -> list[bool]:
    return [switch.fp32_precision == "tf32" for switch in (PRODUCTS, CONVOLUTIONS)]


def told() -> list[Any]:
    """What every switch says, the older ones too, which torch reads itself; an error is an answer."""

    def asked(ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except RuntimeError:
            return "refused"

    older = [torch.get_float32_matmul_precision, lambda: PRODUCTS.allow_tf32, lambda: CUDNN.allow_tf32]
    return [PRODUCTS.fp32_precision, CONVOLUTIONS.fp32_precision, *(asked(ask) for ask in older)]


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """Switches as torch has them at its start, whatever other tests have left."""
    before = CUDNN.allow_tf32
    PRODUCTS.allow_tf32, CUDNN.allow_tf32 = False, True
    yield
    PRODUCTS.fp32_precision, CONVOLUTIONS.fp32_precision, CUDNN.rnn.fp32_precision = "none", "tf32", "tf32"
    torch.set_float32_matmul_precision("highest")
    CUDNN.allow_tf32 = True
    CUDNN.allow_tf32 = before
    assert (PRODUCTS.allow_tf32, CUDNN.allow_tf32) == (False, before)


def by_the_older() -> None:
    PRODUCTS.allow_tf32 = True


def high() -> None:
    torch.set_float32_matmul_precision("high")


def medium() -> None:
    torch.set_float32_matmul_precision("medium")


def by_the_newer() -> None:
    PRODUCTS.fp32_precision = "tf32"


def off_for_convolutions() -> None:
    CUDNN.allow_tf32 = False


def nothing() -> None: ...


@pytest.mark.parametrize("set_", [nothing, by_the_older, high, medium, by_the_newer, off_for_convolutions])
def test_the_switches_are_as_before_afterwards(set_: Callable[[], None]) -> None:
    set_()
    before = told()
    with pytest.raises(KeyError):
        _fail_with_full_float32()
    assert told() == before


def test_a_switch_for_everything() -> None:
    """In a process of its own: torch cannot be told to forget it."""
    lines = (
        "import torch",
        "from tests.trexport.models.test_float32 import in_tf32, told",
        "from trexport.models.float32 import full_float32",
        "torch.backends.fp32_precision = 'tf32'",
        "before = told()",
        "with full_float32(): print(in_tf32())",
        "print(told() == before)",
    )
    found = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert found.stdout.split("\n") == ["[False, False]", "True", ""]


def _fail_with_full_float32() -> None:
    refused = "refused" in told()
    with full_float32():
        assert in_tf32() == [False, False]
        if not refused:  # who asks by the older switches, as torch's compiler and exporter do, is answered
            assert told()[2:] == ["highest", False, False]
            with CUDNN.flags(enabled=False):
                pass
        raise KeyError


def test_several_at_once() -> None:
    before, first, second = told(), full_float32(), full_float32()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert in_tf32() == [False, False]
    second.__exit__(None, None, None)
    assert told() == before
    with full_float32(wanted=False):
        assert told() == before


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_packages_are_run_with_them(base: Base, dtype: Any) -> None:
    seen: list[list[bool]] = []

    def package(**inputs: Tensor) -> Tensor:
        seen.append(in_tf32())
        return torch.zeros(1)

    runner = object.__new__(AotInductorRunner)
    runner.spec, runner.device = base.architecture.spec(dtype), "cpu"
    runner._model, runner._given = package, {}
    runner._run({})
    assert seen == [[False, dtype == "fp16"]]


def test_torch_and_the_reference_compute_with_them(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[bool]] = []
    convolution = torch.nn.Conv2d.forward

    def forward(self: torch.nn.Conv2d, x: torch.Tensor) -> Any:
        seen.append(in_tf32())
        return convolution(self, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", forward)
    feeds = random_feeds(base.architecture.spec("fp32"), SIZES, seed=1)
    assert in_tf32() == [False, True]
    with BACKENDS["torch"].load(TorchModel(base, (), "fp32"), "cpu") as runner:
        runner(feeds)
    of_torch = len(seen)
    Reference(base, [], "cpu").plain(feeds)
    assert 0 < of_torch < len(seen)
    assert all(one == [False, False] for one in seen)


@pytest.mark.parametrize("half", [False, True])
def test_onnx_runtime_s_cuda_provider_is_told(
    half: bool, onnx_artifact: Artifact, half_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the graph is rewritten or not."""
    artifact = half_artifact if half else onnx_artifact
    told: list[Any] = []
    opened = onnxruntime.open_session

    def spied(*args: Any, **options: Any) -> Any:
        told.append(options["provider"].get("use_tf32"))
        return opened(*args, **options)

    monkeypatch.setattr(onnxruntime, "open_session", spied)
    source = OnnxFile(artifact.onnx_path, artifact.manifest.io)
    for passes in ((), ("neutral",)):
        onnxruntime.OnnxRuntime(passes=passes).load(source, "cpu").close()
    assert told == ([None, None] if half else ["0", "0"])


@pytest.mark.parametrize(("dtype", "options"), [("fp32", {"use_tf32": "0"}), ("fp16", {}), ("bf16", {})])
def test_options_of_onnx_runtime(base: Base, dtype: Any, options: dict[str, str]) -> None:
    assert exact(base.architecture.spec(dtype)) == options
