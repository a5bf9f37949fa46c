"""Swappable models on a GPU, and swappable engines: their adapted weights are merged in torch and replaced in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import final

import safetensors
import safetensors.torch
from torch import Tensor

from trexport.artifact import ADAPTED_NAME, Artifact
from trexport.backends import Device
from trexport.errors import ArtifactError
from trexport.graph.ops.slots import Slot
from trexport.models.adapters import BoundAdapter
from trexport.session.form import AdapterForm, Prepared
from trlora.swap import PreparedAdapter, SwapReport, WeightWriter


@final
class ReplacedForm(AdapterForm):
    """The adapted weights are the buffers: activating adapters writes `W0·(I + Σ s_k (T_k − I)) + Σ s_k Δ_k` into them, from
    the pristine weights on the same device, rounded once. `trlora.swap` does it; `report` tells how the last time.

    Args:
        slot: the place for adapters.
        pristine: layer path → W0, the buffers' dtypes.
    """

    report: SwapReport

    def __init__(self, slot: Slot, pristine: Mapping[str, Tensor], device: Device) -> None:
        self._slot = slot
        on_device = {path: pristine[path].to(device) for path in slot.layers}
        self.buffers = {f"{path}.weight": tensor.clone() for path, tensor in on_device.items()}
        self._writer = WeightWriter(on_device, {path: self.buffers[f"{path}.weight"] for path in slot.layers})

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


def pristine_of_engine(artifact: Artifact, slot: Slot) -> dict[str, Tensor]:
    """The weights before any adapter that lie beside an engine, by layer path.

    Raises:
        ArtifactError: they are not there, or not those of the slot's layers.
    """
    file = artifact.model_folder / ADAPTED_NAME
    try:
        stored = safetensors.torch.load_file(file)
    except (safetensors.SafetensorError, OSError) as error:
        raise ArtifactError(f"{file}: the weights before any adapter cannot be read ({error})") from error
    missing = [path for path in slot.layers if f"{path}.weight" not in stored]
    if missing:
        raise ArtifactError(f"{file}: {missing[0]}.weight is not in it; build the engine again")
    return {path: stored[f"{path}.weight"] for path in slot.layers}
