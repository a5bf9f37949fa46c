"""A fitted adapter as the start of a greater one: the same weights, and room to move."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trlora.layers import LayerAdapter
from trlora.residuals import LowRankResidual, TensorRingResidual
from trlora.transforms import LowRankTransform, TensorRingTransform

_ROOM = 0.1
"""Size of the new entries that do not count yet, against those that do."""


def grow_(adapter: LayerAdapter, small: LayerAdapter, generator: torch.Generator) -> bool:
    """Set an adapter to the same `Uᵀ·W0·T + Δ` as a smaller one of the same members.

    Returns:
        False where a member has another size and no way to hold the smaller one; the adapter is then of no use.
    """
    return all(
        _grow_part_(part, smaller, generator)
        for part, smaller in (
            (adapter.transform, small.transform),
            (adapter.residual, small.residual),
            (adapter.output_transform, small.output_transform),
        )
    )


def _grow_part_(part: nn.Module, small: nn.Module, generator: torch.Generator) -> bool:
    if type(part) is not type(small):
        return False
    if isinstance(part, TensorRingTransform) and isinstance(small, TensorRingTransform):
        return _grow_ring_(list(part.core), list(small.core), generator)
    if isinstance(part, TensorRingResidual) and isinstance(small, TensorRingResidual):
        return _grow_ring_([*part.row_core, *part.column_core], [*small.row_core, *small.column_core], generator)
    if isinstance(part, (LowRankResidual, LowRankTransform)) and isinstance(small, (LowRankResidual, LowRankTransform)):
        rank = small.lora_A.weight.shape[0]
        if rank > part.lora_A.weight.shape[0]:
            return False
        part.lora_B.weight.data.zero_()
        part.lora_B.weight.data[:, :rank] = small.lora_B.weight.data * (small.scaling / part.scaling)
        part.lora_A.weight.data[:rank] = small.lora_A.weight.data
        return True
    mine, others = dict(part.named_parameters()), dict(small.named_parameters())
    if {name: value.shape for name, value in mine.items()} != {name: value.shape for name, value in others.items()}:
        return False
    for name, value in mine.items():
        value.data.copy_(others[name])
    return True


def _grow_ring_(cores: list[Tensor], small: list[Tensor], generator: torch.Generator) -> bool:
    """Cores (…, R_d, R_{d+1}). No way round the ring leads from the old ranks to the new ones, so that these add nothing;
    the ways back are open, so that the next step may close them."""
    if any(a.shape[:-2] != b.shape[:-2] for a, b in zip(cores, small, strict=True)):
        return False
    if any(a.shape[axis] < b.shape[axis] for a, b in zip(cores, small, strict=True) for axis in (-2, -1)):
        return False
    for d, (core, old) in enumerate(zip(cores, small, strict=True)):
        first, last = old.shape[-2:]
        size = float(old.detach().abs().max())
        noise = torch.randn(core.shape, generator=generator, dtype=torch.float64) * (_ROOM * size)
        noise[..., :first, :] = 0
        if d == 0:
            noise[..., first:, last:] = 0  # nor round among the new ones alone
        core.data.copy_(noise)
        core.data[..., :first, :last] = old
    return True
