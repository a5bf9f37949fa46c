"""One launch of the swap kernel: the layers of one width, with the same adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from trlora.swap.nvrtc import Kernel
from trlora.swap.packed import Packed, row_offsets
from trlora.swap.variant import MOST_ADAPTERS, Variant


def tiles_of(variant: Variant, rows: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """The kernel's work in its order: layer (or piece of one), first row, rows, where the layer's rows begin in L."""
    offsets, _ = row_offsets(rows)
    return [
        (layer * variant.pieces + piece, first, min(variant.block_rows, count - first), offsets[layer])
        for layer, count in enumerate(rows)
        for piece in range(variant.pieces)
        for first in range(0, count, variant.block_rows)
    ]


@final
class Launch:
    """Ready to be repeated with other strengths."""

    def __init__(
        self, kernel: Kernel, weights: Sequence[Tensor], outs: Sequence[Tensor], packed: Sequence[Packed]
    ) -> None:
        variant = kernel.variant
        device = weights[0].device
        rows = [weight.shape[0] for weight in weights]
        self.work = sum(weight.numel() for weight in weights) * (1 + sum(variant.terms))
        self._kernel = kernel
        tiles = tiles_of(variant, rows)
        most = kernel.resident_blocks
        each = -(-len(tiles) // most)
        self._blocks = -(-len(tiles) // each)
        self._wrong = torch.zeros(len(rows) * variant.pieces, dtype=torch.int32, device=device)
        self._pieces = variant.pieces
        self._keep = (list(weights), list(outs), list(packed))
        pointers = [
            [weight.data_ptr() + 2 * variant.width * piece for weight in tensors for piece in range(variant.pieces)]
            for tensors in (weights, outs)
        ]
        pointers += [
            [getattr(adapter, name).data_ptr() for adapter in packed] for name in ("p", "q", "left", "right", "last")
        ]
        tables = [torch.tensor(table, dtype=torch.int64, device=device) for table in pointers]
        work = torch.tensor(tiles, dtype=torch.int32, device=device)
        self._arguments = [*tables[:2], work, len(tiles), each, *tables[2:]]

    def __call__(self, strengths: Sequence[float]) -> None:
        """On torch's current stream, one strength an adapter."""
        self._wrong.zero_()
        given = [float(strength) for strength in strengths]
        self._kernel(self._blocks, [*self._arguments, self._wrong, *given, *[0.0] * (MOST_ADAPTERS - len(given))])

    def wrong(self) -> Tensor:
        """(layers,), int32: not 0 where the last launch wrote something that is not finite."""
        return self._wrong.unflatten(0, (-1, self._pieces)).amax(1)
