"""The adapted weights of a swappable ONNX artifact as its own `merge.onnx` computes them, for runtimes without our code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trexport.adapter_file import swappable_of
from trexport.artifact import Artifact
from trexport.backends import Device
from trexport.backends.onnxruntime import bound_run, open_session
from trexport.errors import ArtifactError
from trexport.graph.ops.slots import STRENGTH
from trexport.graph.swappable import MERGE_NAME, merged_name
from trexport.models.adapters import BoundAdapter
from trexport.pristine import copy_of, stored_weights


def merged_by_file(artifact: Artifact, adapters: Sequence[BoundAdapter], device: Device) -> dict[str, Tensor]:
    """The weights by parameter name, in the artifact's precision; without adapters those of the base. ONNX Runtime computes
    them on the CPU.

    Raises:
        ArtifactError: an adapter does not fit, or a weight would not be finite.
    """
    slot = swappable_of(artifact).slot
    weights = {name: copy_of(stored) for name, stored in stored_weights(artifact, slot).items()}
    adapters = [adapter for adapter in adapters if adapter.strength]  # zero does not silence what overflows
    if adapters:
        each = [slot.tensors(adapter.layers, adapter.strength, adapter.name) for adapter in adapters]
        inputs = {name: torch.stack([tensors[name] for tensors in each]) for name in each[0] if name != slot.strength}
        inputs[STRENGTH] = torch.tensor([adapter.strength for adapter in adapters], dtype=torch.float32)
        outputs = {merged_name(path): weights[f"{path}.weight"] for path in slot.layers}
        # what the weights are reshaped into would be kept beside them
        session = open_session(str(artifact.onnx_path.with_name(MERGE_NAME)), "cpu", fold_constants=False)
        bound_run(session, inputs, outputs, "cpu")()
    for name, weight in weights.items():
        if not weight.sum(dtype=torch.float32).isfinite():  # it is where all its terms are
            given = {adapter.name: adapter.strength for adapter in adapters}
            raise ArtifactError(f"{name}: not finite with {given}; the strengths are too great for this precision")
    return {name: weight.to(device) for name, weight in weights.items()}
