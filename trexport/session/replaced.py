"""Swappable engines: their adapted weights are merged in torch and replaced in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import final

import safetensors
import safetensors.torch

from trexport.artifact import ADAPTED_NAME, Artifact
from trexport.backends import Device
from trexport.errors import ArtifactError
from trexport.graph.ops.slots import Slot
from trexport.models.adapters import BoundAdapter
from trexport.session.form import AdapterForm, Prepared
from trlora.swap import PreparedAdapter, SwapReport, WeightWriter


@final
class ReplacedForm(AdapterForm):
    """The adapted weights are the buffers: activating adapters computes `W0·(I + Σ s_k (T_k − I)) + Σ s_k Δ_k` in float32 on
    the engine's device, from the pristine weights beside the engine, and rounds once.

    `trlora.swap` does it; `report` tells how the last time.

    Raises:
        ArtifactError: the pristine weights are not there, or not those of the slot's layers.
    """

    report: SwapReport

    def __init__(self, artifact: Artifact, slot: Slot, device: Device) -> None:
        self._slot = slot
        file = artifact.model_folder / ADAPTED_NAME
        try:
            stored = safetensors.torch.load_file(file)
        except (safetensors.SafetensorError, OSError) as error:
            raise ArtifactError(f"{file}: the weights before any adapter cannot be read ({error})") from error
        missing = [path for path in slot.layers if f"{path}.weight" not in stored]
        if missing:
            raise ArtifactError(f"{file}: {missing[0]}.weight is not in it; build the engine again")
        pristine = {path: stored[f"{path}.weight"].to(device) for path in slot.layers}
        self.buffers = {f"{path}.weight": tensor.clone() for path, tensor in pristine.items()}
        self._writer = WeightWriter(pristine, {path: self.buffers[f"{path}.weight"] for path in slot.layers})

    def slots(self) -> Sequence[Slot]:
        return [self._slot]

    def prepare(self, name: str, adapter: BoundAdapter) -> Prepared:
        return replace(super().prepare(name, adapter), on_device=self._writer.prepare(adapter.layers))

    def write(self, active: Sequence[tuple[Prepared, float]]) -> None:
        pairs = [(_on_device(prepared), strength) for prepared, strength in active]
        self.report = self._writer.write(pairs)
        wrong = self._writer.not_finite(pairs)
        if wrong is not None:
            given = {prepared.name: strength for prepared, strength in active}
            raise ArtifactError(
                f"{wrong}.weight: not finite with {given}; the strengths are too great for this precision"
            )


def _on_device(prepared: Prepared) -> PreparedAdapter:
    assert prepared.on_device is not None  # by `ReplacedForm.prepare`
    return prepared.on_device
