"""What an artifact must equal: PyTorch in float32, the adapters attached and never merged, their offsets added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast, final

import torch
from torch import Tensor, nn

from trexport.backends import Device
from trexport.models.adapters import BoundAdapter
from trexport.models.base import Base
from trexport.models.unet import attach_all_, call_unet, load_unet, with_offsets
from trexport.progress import SILENT, Progress
from trlora import adapted_modules, set_strengths_


@final
class Reference:
    """The base with its adapters factored, and the base without them, as one model in memory."""

    def __init__(
        self, base: Base, adapters: Sequence[BoundAdapter], device: Device, *, progress: Progress = SILENT
    ) -> None:
        self._model = cast(nn.Module, load_unet(base, "fp32", progress=progress))
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

    def adapted(self, feeds: Mapping[str, Tensor]) -> Tensor:
        """One step with all the adapters, float32 on the CPU."""
        return self._run(feeds)

    def plain(self, feeds: Mapping[str, Tensor]) -> Tensor:
        """One step without them."""
        return self._only(None, feeds)

    def mixed(self, feeds: Mapping[str, Tensor], chosen: Sequence[int | None]) -> Tensor:
        """Every sample drawn alone, with one of the adapters.

        Args:
            chosen: for each sample the number of its adapter, from 0; None for the base.
        """
        if len(set(chosen)) == 1:
            return self._only(chosen[0], feeds)
        rows = []
        for row, number in enumerate(chosen):
            alone = {name: tensor[row : row + 1] if tensor.dim() else tensor for name, tensor in feeds.items()}
            rows.append(self._only(number, alone))
        return torch.cat(rows)

    def _only(self, number: int | None, feeds: Mapping[str, Tensor]) -> Tensor:
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

    def _run(self, feeds: Mapping[str, Tensor]) -> Tensor:
        allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        try:
            with torch.inference_mode():
                return call_unet(self._model, {k: v.to(self._device, torch.float32) for k, v in feeds.items()}).cpu()
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed
