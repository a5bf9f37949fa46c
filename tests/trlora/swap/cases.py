"""Adapters and layers that the swap kernel takes or leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.helpers import trained
from trlora import AdapterSpec, LayerAdapter


@dataclass(frozen=True)
class Case:
    """An adapter for layers of some shapes."""

    name: str
    shapes: tuple[tuple[int, int], ...]
    transform: dict[str, Any]
    residual: dict[str, Any]
    amount: float = 0.1
    """How far its parameters are moved."""
    trained: bool = True
    """Moved at random; otherwise as trained from its start, where the slices of a transform's cores stay equal."""

    def __str__(self) -> str:
        return self.name

    def adapters(self, seed: int = 1) -> dict[str, LayerAdapter]:
        spec = AdapterSpec.from_dict({"transform": self.transform, "residual": self.residual})
        made = {}
        for number, (rows, columns) in enumerate(self.shapes):
            adapter = LayerAdapter.from_spec(spec, columns, rows, torch.Generator().manual_seed(seed))
            adapter = trained(adapter, seed + 10 * number, self.amount)
            if not self.trained:
                with torch.no_grad():
                    for core in adapter.transform.parameters():
                        core.copy_(core.mean((2, 3), keepdim=True).expand_as(core))
            made[f"layer{number}"] = adapter.float()
        return made

    def weights(self, dtype: torch.dtype, seed: int = 5) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            f"layer{number}": (0.1 * torch.randn(*shape, generator=generator)).to(dtype)
            for number, shape in enumerate(self.shapes)
        }


RING2 = {"type": "tensor_ring", "rank": 2}
KERNEL = [
    Case("tlora", ((24, 128), (40, 128)), RING2, {"type": "tensor_ring", "rank": 6}),
    Case("slices equal", ((24, 128),), RING2, {"type": "tensor_ring", "rank": 2}, trained=False),
    Case(
        "order 2", ((17, 96),), {"type": "tensor_ring", "order": 2, "rank": [2, 1], "modes": [16, 6]}, {"type": "none"}
    ),
    Case(
        "order 4",
        ((8, 160),),
        {"type": "tensor_ring", "order": 4, "rank": [1, 2, 3, 2], "modes": [2, 8, 2, 5]},
        {
            "type": "tensor_ring",
            "order": 4,
            "rank": [2, 3, 1, 4, 2, 5, 3, 2],
            "modes": {"row": [2, 2, 2, 1], "column": [2, 8, 2, 5]},
        },
    ),
    Case(
        "order 1",
        ((9, 48),),
        {"type": "tensor_ring", "order": 1, "rank": 2},
        {"type": "tensor_ring", "order": 1, "rank": [2, 3]},
        amount=0.03,
    ),
    Case("wide ring", ((24, 128),), RING2, {"type": "tensor_ring", "rank": 9}),  # of low rank for the kernel
    Case("with lora", ((24, 128), (33, 128)), RING2, {"type": "low_rank", "rank": 4, "alpha": 7.0}),
    Case("lora", ((24, 128), (33, 320)), {"type": "identity"}, {"type": "low_rank", "rank": 20}),
    Case("lora, long rows", ((5, 2560),), {"type": "identity"}, {"type": "low_rank", "rank": 2}),
    Case("ring alone", ((24, 128),), {"type": "identity"}, {"type": "tensor_ring", "rank": 6}),
    Case("transform alone", ((24, 128),), RING2, {"type": "none"}),
    Case("diagonal", ((24, 64),), {"type": "diagonal"}, {"type": "none"}),
    Case("oft", ((24, 64),), {"type": "block_orthogonal", "block_size": 8}, {"type": "low_rank", "rank": 2}),
    Case("hadamard", ((24, 64),), {"type": "identity"}, {"type": "hadamard", "rank": 2}),
]
"""Taken by the kernel, whole."""
