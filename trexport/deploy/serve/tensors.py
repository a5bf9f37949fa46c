"""Tensors between Triton and torch. Numbers cross by DLPack; only text needs numpy."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trexport.errors import MissingError


def triton() -> Any:
    """`triton_python_backend_utils`, which there is only inside the server."""
    return importlib.import_module("triton_python_backend_utils")


def from_triton(tensor: Any) -> Tensor:
    """A `pb_utils.Tensor` of numbers, on the memory of Triton: copy what is to stay."""
    return torch.from_dlpack(tensor.to_dlpack())


def to_triton(name: str, tensor: Tensor) -> Any:
    """A `pb_utils.Tensor` on the memory of a tensor on the CPU."""
    pb_utils = triton()

    return pb_utils.Tensor.from_dlpack(name, tensor.detach().cpu().contiguous())


def text_from_triton(tensor: Any) -> list[list[str]]:
    """A `pb_utils.Tensor` of (batch, n) strings. Raises `UnicodeDecodeError` for what is no UTF-8."""
    return [[item.decode("utf-8") for item in row] for row in tensor.as_numpy().tolist()]


def text_to_triton(name: str, rows: list[list[str]]) -> Any:
    """(batch, n) strings as a `pb_utils.Tensor`."""
    pb_utils = triton()

    return pb_utils.Tensor(name, np.array([[item.encode("utf-8") for item in row] for row in rows], dtype=np.object_))


def check_bridge() -> None:
    """Read values that come from foreign memory, as those of a request do: an array that was made of a numpy array is only
    handed back, and proves nothing.

    Raises:
        MissingError: others come out. The stub of Triton 2.51 was built before numpy 2 and misreads strides in silence.
    """
    numbers, texts = [1.5, -2.0, 3.25], [["a", "bc"]]
    try:
        there = to_triton("probe", torch.tensor(numbers))
        found = (
            there.as_numpy().tolist(),
            from_triton(there).tolist(),
            text_from_triton(text_to_triton("probe", texts)),
        )
    except Exception as error:  # whatever the stub makes of memory that it misreads
        raise _no_bridge(f"{type(error).__name__}: {error}") from error
    if found != (numbers, numbers, texts):
        raise _no_bridge(f"{numbers} came back as {found[0]}")


def _no_bridge(seen: str) -> MissingError:
    return MissingError(
        f"this Triton's python stub cannot exchange values with numpy {np.__version__} ({seen}), and would answer with "
        "wrong ones; give the server a Python environment with numpy below 2 (trexport deploy triton --python-env)"
    )
