"""What LyCORIS and kohya's scripts add to biases and to the weights of normalisations."""

from __future__ import annotations

from torch import Tensor

from trlora import CheckpointError

_LEAVES = {"w_norm": "weight", "b_norm": "bias", "diff_b": "bias"}
"""Leaf → the parameter of the module that it is added to."""


def take_offsets(path: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the offsets of a module out of its tensors: parameter name → tensor. A `diff` of one dimension is the weight of a
    normalisation's, any other a layer's.

    Raises:
        CheckpointError: a shape that no such parameter has.
    """
    leaves = dict(_LEAVES)
    if "diff" in tensors and tensors["diff"].ndim == 1:
        leaves["diff"] = "weight"
    found: dict[str, Tensor] = {}
    for leaf, parameter in leaves.items():
        if leaf not in tensors:
            continue
        tensor = tensors.pop(leaf)
        if tensor.ndim != 1:
            raise CheckpointError(f"{path}: {leaf} has shape {tuple(tensor.shape)}, expected one dimension")
        if f"{path}.{parameter}" in found:
            raise CheckpointError(f"{path}: {leaf} changes the {parameter}, which another tensor changes too")
        found[f"{path}.{parameter}"] = tensor
    return found
