"""Float32 that is float32: no TF32 in what is compared and measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.trexport.helpers import SIZES
from trexport.backends import BACKENDS, TorchModel
from trexport.backends.onnxruntime import exact
from trexport.models.base import Base
from trexport.models.model import random_feeds
from trexport.parity.reference import Reference
from trexport.precision import full_float32


def switches() -> tuple[str, str]:
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]


def _fail_with_full_float32() -> None:
    with full_float32():
        assert switches() == ("ieee", "ieee")
        raise KeyError


@pytest.mark.parametrize("older", [True, False], ids=["by the older switch", "by the newer"])
def test_the_switches_are_as_before_afterwards(older: bool) -> None:
    before = switches()
    try:
        if older:
            torch.backends.cuda.matmul.allow_tf32 = True
        else:
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        asked = switches()
        with pytest.raises(KeyError):
            _fail_with_full_float32()
        assert switches() == asked
        assert not older or torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = before  # type: ignore[attr-defined]


def test_torch_and_the_reference_compute_with_them(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []
    convolution = torch.nn.Conv2d.forward

    def forward(self: torch.nn.Conv2d, x: torch.Tensor) -> Any:
        seen.append(switches())
        return convolution(self, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", forward)
    feeds = random_feeds(base.architecture.spec("fp32"), SIZES, seed=1)
    with BACKENDS["torch"].load(TorchModel(base, (), "fp32"), "cpu") as runner:
        runner(feeds)
    of_torch = len(seen)
    Reference(base, [], "cpu").plain(feeds)
    assert 0 < of_torch < len(seen)
    assert set(seen) == {("ieee", "ieee")}


@pytest.mark.parametrize(("dtype", "options"), [("fp32", {"use_tf32": "0"}), ("fp16", {}), ("bf16", {})])
def test_options_of_onnx_runtime(base: Base, dtype: Any, options: dict[str, str]) -> None:
    assert exact(base.architecture.spec(dtype)) == options
