"""Float32 that is float32: no TF32 in what is compared and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

PRODUCTS: Any = torch.backends.cuda.matmul
CUDNN: Any = torch.backends.cudnn
CONVOLUTIONS: Any = CUDNN.conv


def in_tf32() -> list[bool]:
    return [switch.fp32_precision == "tf32" for switch in (PRODUCTS, CONVOLUTIONS)]


def told() -> list[Any]:
    """What every switch says, the older ones too, which torch reads itself; an error is an answer."""

    def asked(module: Any) -> Any:
        try:
            return module.allow_tf32
        except RuntimeError:
            return "refused"

    return [PRODUCTS.fp32_precision, CONVOLUTIONS.fp32_precision, asked(PRODUCTS), asked(CUDNN)]


@pytest.fixture
def untouched() -> Iterator[None]:
    """Switches as torch has them at its start."""
    assert (PRODUCTS.allow_tf32, CUDNN.allow_tf32) == (False, True)
    yield
    PRODUCTS.fp32_precision, CONVOLUTIONS.fp32_precision = "none", "tf32"
    torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]
    PRODUCTS.allow_tf32, CUDNN.allow_tf32 = False, True
    assert (PRODUCTS.allow_tf32, CUDNN.allow_tf32) == (False, True)


def by_the_older() -> None:
    PRODUCTS.allow_tf32 = True


def by_the_newer() -> None:
    PRODUCTS.fp32_precision = "tf32"


def for_everything() -> None:
    torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]


def off_for_convolutions() -> None:
    CUDNN.allow_tf32 = False


def nothing() -> None: ...


@pytest.mark.parametrize("set_", [nothing, by_the_older, by_the_newer, for_everything, off_for_convolutions])
@pytest.mark.usefixtures("untouched")
def test_the_switches_are_as_before_afterwards(set_: Callable[[], None]) -> None:
    set_()
    before = told()
    with pytest.raises(KeyError):
        _fail_with_full_float32()
    assert told() == before


def _fail_with_full_float32() -> None:
    answered = [one for one in told()[2:] if one != "refused"]
    with full_float32():
        assert in_tf32() == [False, False]
        if len(answered) == 2:  # who asks by the older switches, as torch's compiler and exporter do, is answered
            assert told()[2:] == [False, False]
            with CUDNN.flags(enabled=False):
                pass
        raise KeyError


@pytest.mark.usefixtures("untouched")
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


@pytest.mark.parametrize(("dtype", "options"), [("fp32", {"use_tf32": "0"}), ("fp16", {}), ("bf16", {})])
def test_options_of_onnx_runtime(base: Base, dtype: Any, options: dict[str, str]) -> None:
    assert exact(base.architecture.spec(dtype)) == options
