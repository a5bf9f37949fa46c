"""Taking the tensors of one member (a transform or a residual) out of what a checkpoint holds for its layer.

Every function removes what it takes, so that what is left over at the end is what nobody knows. Keys are local to the
member (`core.0`); the checkpoint reader puts the layer's path in front of the messages.
"""

from __future__ import annotations

from torch import Tensor

from trlora.errors import CheckpointError


def take(tensors: dict[str, Tensor], key: str, dims: int) -> Tensor:
    """Remove and return `tensors[key]`, which must have `dims` dimensions.

    Raises:
        CheckpointError: the key is missing, or the tensor has another number of dimensions.
    """
    if key not in tensors:
        raise CheckpointError(f"{key}: missing; found {sorted(tensors) or 'nothing'}")
    tensor = tensors.pop(key)
    if tensor.ndim != dims:
        raise CheckpointError(f"{key}: shape {tuple(tensor.shape)} found, expected {dims} dimensions")
    return tensor


def take_sequence(tensors: dict[str, Tensor], stem: str, dims: int, count: int) -> list[Tensor]:
    """Remove and return `stem.0` … `stem.<count−1>`, each of `dims` dimensions.

    Raises:
        CheckpointError: one is missing, or has another number of dimensions.
    """
    return [take(tensors, f"{stem}.{d}", dims) for d in range(count)]


def contradiction(field: str, stated: object, found: object) -> CheckpointError:
    """The error for a config that says something else than the tensors' own shapes."""
    leave = " or set modes to null" if field == "modes" else ""
    return CheckpointError(
        f"{field}: the config says {stated!r}, the tensors have {found!r}; correct the config{leave}"
    )
