"""(IA)³ (arXiv 2205.05638)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import final

from torch import Tensor

from trexport.formats.peft.config import PeftConfig
from trexport.formats.peft.method import take
from trlora import AdapterSpec, CheckpointError, LayerParts, SpecError


@final
class Ia3:
    """A scale for every input of a feed-forward layer; for every output of any other, bias included."""

    leaves = ("ia3_l",)

    def check(self, config: PeftConfig) -> None:
        pass

    def layer(self, path: str, tensors: Mapping[str, Tensor], config: PeftConfig) -> LayerParts:
        scale = take(path, tensors, "ia3_l", (2, 4))
        inside = _is_feedforward(path, config.fields.get("feedforward_modules") or [])
        wanted = (1, scale.shape[1]) if inside or scale.ndim == 4 else (scale.shape[0], 1)
        if tuple(scale.shape) != (*wanted, *(1,) * (scale.ndim - 2)):
            side = "inputs" if inside else "outputs"
            raise CheckpointError(
                f"{path}: ia3_l has shape {tuple(scale.shape)}, expected a scale for its {side}, for feedforward_modules is "
                f"{config.fields.get('feedforward_modules')!r}"
            )
        kernel = (None, None) if scale.ndim == 4 else ()
        part = "transform" if inside else "magnitude"
        fields = {"type": "diagonal"} if inside else {"type": "scale", "bias": True}
        spec = AdapterSpec.from_dict({part: fields})
        return LayerParts.from_tensors(path, spec, {part: {"scale": scale.flatten()}}, kernel)


def _is_feedforward(path: str, modules: object) -> bool:
    """PEFT's rule: a regular expression for the whole path, or any of a list of endings."""
    if isinstance(modules, str):
        return re.fullmatch(modules, path) is not None
    if not isinstance(modules, list):
        raise SpecError(f"feedforward_modules is {modules!r}, expected a list or a regular expression")
    return any(path.endswith(str(ending)) for ending in modules)
