"""What an artifact must equal: PyTorch in float32, the adapters attached and never merged, their offsets added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from trexport.backends import Device
from trexport.models.adapters import BoundAdapter
from trexport.models.base import Base
from trexport.models.float32 import full_float32
from trexport.models.model import attach_all_, load_model, outputs_of, spread_timestep, with_offsets
from trexport.progress import SILENT, Progress
from trlora import adapted_modules, set_strengths_


@final
class Reference:
    """The base with its adapters factored, and the base without them, as one model in memory."""

    def __init__(
        self, base: Base, adapters: Sequence[BoundAdapter], device: Device, *, progress: Progress = SILENT
    ) -> None:
        self._model = load_model(base, "fp32", progress=progress)
        self._architecture = base.architecture
        self._spec = base.architecture.spec("fp32")
        attach_all_(self._model, adapters)
        self._model.to(device)
        self._device = device
        self._offsets = [adapter.adapter.offsets for adapter in adapters]
        parameters = dict(self._model.named_parameters())
        places = {name.replace(".base.", "."): name for name in parameters}  # inside an adapted layer
        self._changed = {name: parameters[places[name]] for offsets in self._offsets for name in offsets}
        self._pristine = {name: parameter.data for name, parameter in self._changed.items()}
        self.strengths = [adapter.strength for adapter in adapters]
        self._strengths = {f"adapter{index}": adapter.strength for index, adapter in enumerate(adapters)}
        self._set(self._strengths)

    def adapted(self, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The outputs of one step with all the adapters, float32 on the CPU."""
        return self._run(feeds)

    def plain(self, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Those of one step without them."""
        return self._only(None, feeds)

    def mixed(self, feeds: Mapping[str, Tensor], chosen: Sequence[int | None]) -> tuple[Tensor, ...]:
        """Every sample drawn alone, with one of the adapters.

        Args:
            chosen: for each sample the number of its adapter, from 0; None for the base.
        """
        if len(set(chosen)) == 1:
            return self._only(chosen[0], feeds)
        rows = []
        for row, number in enumerate(chosen):
            rows.append(self._only(number, self._architecture.rows(feeds, row, row + 1)))
        return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))

    def _only(self, number: int | None, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        only = {name: s if name == f"adapter{number}" else 0.0 for name, s in self._strengths.items()}
        self._set(only)
        try:
            return self._run(feeds)
        finally:
            self._set(self._strengths)

    def _set(self, strengths: Mapping[str, float]) -> None:
        named = {name for layer in adapted_modules(self._model).values() for name in layer.adapters}
        set_strengths_(self._model, {name: strength for name, strength in strengths.items() if name in named})
        for name, parameter in self._changed.items():
            pairs = [
                (offsets[name], strength)
                for offsets, strength in zip(self._offsets, strengths.values(), strict=True)
                if name in offsets
            ]
            parameter.data = with_offsets(self._pristine[name], pairs)

    def _run(self, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        with torch.inference_mode(), full_float32():
            feeds = spread_timestep(self._spec, feeds)
            wide = {n: t.float() if t.is_floating_point() else t for n, t in feeds.items()}
            found = outputs_of(self._model, {n: t.to(self._device) for n, t in wide.items()})
            return tuple(tensor.cpu() for tensor in found)
