"""The contract of a PEFT method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from trexport.formats.peft.config import PeftConfig
from trlora import CheckpointError, LayerParts


class Method(Protocol):
    """How a method's layers are read."""

    @property
    def leaves(self) -> tuple[str, ...]:
        """How its keys end, after the module's path."""
        ...

    def check(self, config: PeftConfig) -> None:
        """Raises `SpecError` for what changes the result and cannot be expressed."""
        ...

    def layer(self, path: str, tensors: Mapping[str, Tensor], config: PeftConfig) -> LayerParts:
        """One layer from its tensors, by leaf.

        Raises:
            CheckpointError, SpecError: one is missing, or they do not fit.
        """
        ...


def take(path: str, tensors: Mapping[str, Tensor], leaf: str, dims: tuple[int, ...]) -> Tensor:
    """A tensor that has to be there, of one of some numbers of dimensions.

    Raises:
        CheckpointError: it is missing, or has another number.
    """
    if leaf not in tensors:
        raise CheckpointError(f"{path}: {leaf} is missing beside {', '.join(sorted(tensors))}")
    tensor = tensors[leaf]
    if tensor.ndim not in dims:
        wanted = " or ".join(map(str, dims))
        raise CheckpointError(f"{path}: {leaf} has shape {tuple(tensor.shape)}, expected {wanted} dimensions")
    return tensor


def kernel_of(tensor: Tensor) -> tuple[int, ...]:
    """The kernel of a convolution's tensor, () of a linear layer's."""
    return tuple(tensor.shape[2:])
