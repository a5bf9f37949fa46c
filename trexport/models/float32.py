"""What float32 means here: 24 bits in every product, on a GPU too."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from trexport.io_spec import ModelSpec


def is_float32(spec: ModelSpec) -> bool:
    """Whether a model gives float32 out, so that nobody expects less of what is inside."""
    return any(tensor.dtype == "fp32" for tensor in spec.outputs)


@contextmanager
def full_float32(wanted: bool = True) -> Iterator[None]:
    """Products and convolutions of float32 on CUDA without TF32, whose eleven bits are a relative error of 4e-4 of a UNet's
    step; torch lets cuDNN take it unless told otherwise. The switches are the process's: they are as before when the last
    of several threads has left.

    Args:
        wanted: do nothing otherwise.
    """
    if not wanted:
        yield
        return
    with _MUTEX:
        # the first one inside finds the switches as they were; the others have nothing to make undone
        _INSIDE.append(_switch_off() if not _INSIDE else _INSIDE[0])
    try:
        yield
    finally:
        with _MUTEX:
            switch_back = _INSIDE.pop()
            if not _INSIDE:
                switch_back()


_MUTEX = threading.Lock()
_INSIDE: list[Callable[[], None]] = []
"""For each who is inside what makes the switches as they were before all of them."""


def _switch_off() -> Callable[[], None]:
    """Returns what undoes it. torch has two ways to say so, and refuses to read the older one, as its compiler and its
    exporter do, where the newer one says something else: both are set, the older one where it can be read."""
    cudnn: Any = torch.backends.cudnn
    switches: list[Any] = [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn]
    products = _answer(torch.get_float32_matmul_precision)
    convolutions = _answer(lambda: cudnn.allow_tf32)
    newer = [switch.fp32_precision for switch in switches]
    if products is not None:
        torch.set_float32_matmul_precision("highest")
    if convolutions is not None:
        cudnn.allow_tf32 = False
    for switch in switches:
        if switch.fp32_precision == "tf32":
            switch.fp32_precision = "ieee"

    def back() -> None:
        if products is not None:
            torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            cudnn.allow_tf32 = convolutions
        for switch, precision in zip(switches, newer, strict=True):
            if switch.fp32_precision != precision:
                switch.fp32_precision = precision

    return back


_T = TypeVar("_T")


def _answer(ask: Callable[[], _T]) -> _T | None:
    try:
        return ask()
    except RuntimeError:
        return None
