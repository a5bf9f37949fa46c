"""The weights of a swappable model before any adapter."""

from __future__ import annotations

import warnings

import onnx_ir as ir
import torch
from torch import Tensor

from trexport.artifact import Artifact
from trexport.errors import ArtifactError
from trexport.graph.ops.slots import Slot


def stored_weights(artifact: Artifact, slot: Slot) -> dict[str, ir.TensorProtocol]:
    """The weights of a slot's layers by parameter name, on the disk where they lie outside the model file.

    Raises:
        ArtifactError: the model lacks one.
    """
    initializers = ir.load(artifact.onnx_path).graph.initializers
    weights: dict[str, ir.TensorProtocol] = {}
    for path in slot.layers:
        name = f"{path}.weight"
        stored = initializers[name].const_value if name in initializers else None
        if stored is None:
            raise ArtifactError(f"{artifact.folder}: {name} is not in the model; export again")
        weights[name] = stored
    return weights


def copy_of(stored: ir.TensorProtocol) -> Tensor:
    """A stored weight in memory, in its own dtype."""
    return view_of(stored).clone()


def view_of(stored: ir.TensorProtocol) -> Tensor:
    """A stored weight in its own dtype where it lies, in the mapped file if it is in one: not to be written to."""
    elements = stored.numpy()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        if stored.dtype == ir.DataType.BFLOAT16:
            return torch.from_numpy(elements.view("int16")).view(torch.bfloat16)
        return torch.from_numpy(elements)
