"""Tucker form of LoCon and GLoRA: the kernel between the two matrices."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trexport.formats.peft.method import kernel_of, take
from trlora import CheckpointError


def with_mid(path: str, tensors: Mapping[str, Tensor], up: str, down: str, mid: str) -> tuple[Tensor, tuple[int, ...]]:
    """The lower matrix, (r, in) or (r, in, height, width), with `mid` (r, r, height, width) multiplied in where it is there,
    and the layer's kernel.

    Args:
        up, down, mid: the leaves.

    Raises:
        CheckpointError: it does not fit between the two.
    """
    lower, upper = tensors[down], tensors[up]
    kernel = kernel_of(lower)
    if mid not in tensors:
        return lower, kernel
    middle = take(path, tensors, mid, (4,))
    if tuple(middle.shape[:2]) != (upper.shape[1], lower.shape[0]) or set(kernel) != {1}:
        raise CheckpointError(
            f"{path}: {mid} has shape {tuple(middle.shape)}, expected (r, r, height, width) between "
            f"{tuple(upper.shape)} and {tuple(lower.shape)}"
        )
    whole = torch.einsum("abhw,bi->aihw", middle.double(), lower.flatten(1).double())
    return whole.to(lower.dtype), kernel_of(middle)
