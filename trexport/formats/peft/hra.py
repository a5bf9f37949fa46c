"""HRA (arXiv 2405.17484)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from trexport.formats.peft.config import PeftConfig
from trexport.formats.peft.method import take
from trlora import AdapterSpec, LayerParts


@final
class Hra:
    """`W' = W0·H_1 ··· H_r`, reflections along the columns of `hra_u` (in, r), which `apply_GS` orthogonalises first."""

    leaves = ("hra_u",)

    def check(self, config: PeftConfig) -> None:
        pass

    def layer(self, path: str, tensors: Mapping[str, Tensor], config: PeftConfig) -> LayerParts:
        vectors = take(path, tensors, "hra_u", (2,)).T
        if config.flag("apply_GS", False):
            vectors = _orthogonalised(vectors.double()).to(vectors.dtype)
        spec = AdapterSpec.from_dict({"transform": {"type": "householder", "rank": config.rank(path)}})
        return LayerParts.from_tensors(path, spec, {"transform": {"vectors": vectors.contiguous()}})


def _orthogonalised(vectors: Tensor) -> Tensor:
    """Each vector less its parts along those before it (Gram–Schmidt). Reflections along orthogonal vectors commute, and
    their product is `I − 2·Σ u·uᵀ`, PEFT's."""
    unit: list[Tensor] = []
    for vector in vectors:
        for earlier in unit:
            vector = vector - (earlier @ vector) * earlier
        unit.append(vector / torch.linalg.vector_norm(vector))
    return torch.stack(unit)
