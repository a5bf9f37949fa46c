"""Swappable engines: their adapted weights are merged in torch and replaced in place."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import final

import safetensors
import safetensors.torch
import torch

from trexport.artifact import ADAPTED_NAME, Artifact
from trexport.backends import Device
from trexport.errors import ArtifactError
from trexport.graph.ops.slots import Slot
from trexport.models.adapters import BoundAdapter
from trexport.session.form import AdapterForm, Prepared
from trlora.layers import weight_change


@final
class ReplacedForm(AdapterForm):
    """The adapted weights are the buffers: activating adapters computes `W0·(I + Σ s_k (T_k − I)) + Σ s_k Δ_k` in float32 on
    the engine's device, from the pristine weights beside the engine, and rounds once.

    Raises:
        ArtifactError: the pristine weights are not there, or not those of the slot's layers.
    """

    def __init__(self, artifact: Artifact, slot: Slot, device: Device) -> None:
        self._slot = slot
        self._device = device
        file = artifact.model_folder / ADAPTED_NAME
        try:
            stored = safetensors.torch.load_file(file)
        except (safetensors.SafetensorError, OSError) as error:
            raise ArtifactError(f"{file}: the weights before any adapter cannot be read ({error})") from error
        missing = [path for path in slot.layers if f"{path}.weight" not in stored]
        if missing:
            raise ArtifactError(f"{file}: {missing[0]}.weight is not in it; build the engine again")
        self._pristine = {f"{path}.weight": stored[f"{path}.weight"].to(device) for path in slot.layers}
        self.buffers = {name: tensor.clone() for name, tensor in self._pristine.items()}

    def slots(self) -> Sequence[Slot]:
        return [self._slot]

    def prepare(self, name: str, adapter: BoundAdapter) -> Prepared:
        prepared = super().prepare(name, adapter)
        own = deepcopy(dict(adapter.layers))  # a module is moved in place, and this one may be somebody else's
        return replace(prepared, layers={path: layer.to(self._device) for path, layer in own.items()})

    def write(self, active: Sequence[tuple[Prepared, float]]) -> None:
        with torch.no_grad():
            for path in self._slot.layers:
                pristine, buffer = self._pristine[f"{path}.weight"], self.buffers[f"{path}.weight"]
                pairs = [(prepared.layers[path], strength) for prepared, strength in active if path in prepared.layers]
                change = weight_change(pristine, pairs, torch.float32)
                buffer.copy_(pristine if change is None else change.add_(pristine))
            if not active:
                return
            sums = torch.stack([buffer.sum(dtype=torch.float32) for buffer in self.buffers.values()])
            if not bool(sums.isfinite().all()):
                wrong = next(name for name, total in zip(self.buffers, sums, strict=True) if not total.isfinite())
                given = {prepared.name: strength for prepared, strength in active}
                raise ArtifactError(f"{wrong}: not finite with {given}; the strengths are too great for this precision")
