"""What to rewrite in a UNet, and with which kernels."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, final

import torch

from trexport.models.rows import Rows

Kernels = Literal["torch", "triton"]
Attention = Literal["default", "cudnn"]

PROJECTIONS = ("self_attention", "cross_attention", "time_embedding")
"""The rewrites that make one product of several."""
ALL = ("self_attention", "cross_attention", "projection", "time_embedding", "group_norm", "upsampling")
"""The names of all rewrites, see `trexport.models.fused.REWRITES`."""


@final
@dataclass(frozen=True)
class FuseOptions:
    """How to rewrite a UNet."""

    rewrites: tuple[str, ...] = ALL
    """`upsampling` wants heights and widths that halve at every level without a rest."""
    kernels: Kernels = "torch"
    """Of normalisations: torch's own operators, or ours in Triton (CUDA; on the CPU in Triton's interpreter only)."""
    attention: Attention = "default"
    """`cudnn`: for heads of at most 128 channels, see `trexport.models.fused.attention`."""
    replaceable: Collection[str] = ()
    """Paths of layers whose weights are replaced later. `upsampling` leaves them; of those that the other rewrites stack,
    `FuseReport.placements` tell where they are."""

    def to_dict(self) -> dict[str, Any]:
        return {"rewrites": list(self.rewrites), "kernels": self.kernels, "attention": self.attention}


def options_for(device: torch.device | str, dtype: torch.dtype) -> FuseOptions:
    """What was measured to be best on a device: on compute capability 9.0, in half precision, all rewrites with our kernels
    (give the exported program to `join_` then) and cuDNN's attention; elsewhere the projections in one product each.
    """
    device = torch.device(device)
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    if not hopper or dtype not in (torch.float16, torch.bfloat16):
        return FuseOptions(PROJECTIONS)
    return FuseOptions(ALL, "triton", "cudnn" if torch.backends.cudnn.is_available() else "default")


@final
@dataclass(frozen=True)
class Outcome:
    """What a rewrite did."""

    replaced: int
    """Places that were rewritten."""
    left: Mapping[str, int] = field(default_factory=dict)
    """Reason → how many places were left alone for it."""
    placements: Mapping[str, Rows] = field(default_factory=dict)
    """Linear layer that is no more → where its weight is now."""


@final
@dataclass(frozen=True)
class FuseReport:
    """What was done to a UNet."""

    options: FuseOptions
    outcomes: Mapping[str, Outcome]
    """By rewrite."""

    @property
    def placements(self) -> dict[str, Rows]:
        """Linear layer that is no more → where its weight is now."""
        return {path: rows for outcome in self.outcomes.values() for path, rows in outcome.placements.items()}

    def to_dict(self) -> dict[str, Any]:
        return self.options.to_dict() | {
            "replaced": {name: outcome.replaced for name, outcome in self.outcomes.items()},
            "left": {name: dict(outcome.left) for name, outcome in self.outcomes.items() if outcome.left},
        }
