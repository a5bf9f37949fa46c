"""The contract of a method in kohya's and LyCORIS' files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from trexport.formats.peft.method import take
from trlora import CheckpointError, LayerParts


class Method(Protocol):
    """How a method's layers are read. The method of each layer is told by its own tensors."""

    @property
    def telling(self) -> str:
        """A leaf that only this method has."""
        ...

    @property
    def leaves(self) -> tuple[str, ...]:
        """All that it may have."""
        ...

    def layer(self, path: str, tensors: Mapping[str, Tensor]) -> LayerParts:
        """One layer from its tensors, by leaf.

        Raises:
            CheckpointError, SpecError: one is missing, they do not fit, or they cannot be expressed.
        """
        ...


def alpha_of(path: str, tensors: Mapping[str, Tensor], rank: int) -> float:
    """The alpha, the rank where there is none or zero, as kohya's scripts and LyCORIS have it."""
    if "alpha" not in tensors:
        return float(rank)
    return number_of(path, tensors, "alpha") or float(rank)


def number_of(path: str, tensors: Mapping[str, Tensor], leaf: str) -> float:
    """A tensor's one number. Raises `CheckpointError` for another number of them."""
    if tensors[leaf].numel() != 1:
        raise CheckpointError(f"{path}: {leaf} has shape {tuple(tensors[leaf].shape)}, expected one number")
    return float(tensors[leaf])


def norm_of(path: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, object], dict[str, Tensor]] | None:
    """DoRA's magnitude: its spec and its tensors; None where there is none.

    Raises:
        CheckpointError: norms of inputs, which LyCORIS knows too.
    """
    if "dora_scale" not in tensors:
        return None
    scale = take(path, tensors, "dora_scale", (2, 4))
    if scale.numel() != scale.shape[0]:
        raise CheckpointError(
            f"{path}: dora_scale has shape {tuple(scale.shape)}: norms of the inputs (wd_on_out=False) are not read, only "
            "norms of the outputs, (out, 1)"
        )
    return {"type": "norm"}, {"norm": scale.flatten()}
