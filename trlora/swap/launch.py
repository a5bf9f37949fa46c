"""Launches of the swap kernel, each for the layers of one width with the same adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from trlora.swap.nvrtc import Bound, Kernel
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
    """Ready to be repeated with other strengths.

    Args:
        wrong: (layers · pieces,), int32: set where something that is not finite was written.
    """

    def __init__(
        self,
        kernel: Kernel,
        weights: Sequence[Tensor],
        outs: Sequence[Tensor],
        packed: Sequence[Packed],
        wrong: Tensor,
    ) -> None:
        variant = kernel.variant
        device = weights[0].device
        rows = [weight.shape[0] for weight in weights]
        self.work = sum(weight.numel() for weight in weights) * (1 + sum(variant.terms))
        tiles = tiles_of(variant, rows)
        most = kernel.resident_blocks
        each = -(-len(tiles) // most)
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
        arguments = [*tables[:2], work, len(tiles), each, *tables[2:], wrong]
        self._call = Bound(kernel, -(-len(tiles) // each), arguments, MOST_ADAPTERS)

    def __call__(self, strengths: Sequence[float], stream: torch.cuda.Stream) -> None:
        """One strength an adapter."""
        self._call([*strengths, *[0.0] * (MOST_ADAPTERS - len(strengths))], stream.cuda_stream)


@final
class Launches:
    """Those of one swap, the greatest on the caller's stream and the others beside it: their last blocks fill its gaps. The
    host is slower than a launch, so that little is left for it to do.

    Args:
        parts: for each launch the kernel, weights, buffers, and adapters.
    """

    def __init__(self, parts: Sequence[tuple[Kernel, Sequence[Tensor], Sequence[Tensor], Sequence[Packed]]]) -> None:
        self._pieces = [kernel.variant.pieces for kernel, weights, *_ in parts for _ in weights]
        counts = [len(weights) * kernel.variant.pieces for kernel, weights, *_ in parts]
        self._device = parts[0][1][0].device
        self._flags = torch.zeros(sum(counts), dtype=torch.int32, device=self._device)
        self._seen = torch.zeros(sum(counts), dtype=torch.int32, pin_memory=True)
        launches = [Launch(*part, wrong) for part, wrong in zip(parts, self._flags.split(counts), strict=True)]
        self._launches = sorted(launches, key=lambda launch: -launch.work)
        self._begun, *self._ended = [torch.cuda.Event() for _ in launches]

    def __len__(self) -> int:
        return len(self._launches)

    def __call__(self, strengths: Sequence[float], streams: Sequence[torch.cuda.Stream]) -> None:
        """On torch's current stream.

        Args:
            streams: to use beside it, one fewer than there are launches.
        """
        with torch.cuda.device(self._device):  # whose context the driver launches in
            self._call(strengths, streams)

    def _call(self, strengths: Sequence[float], streams: Sequence[torch.cuda.Stream]) -> None:
        current = torch.cuda.current_stream(self._device)
        self._flags.zero_()
        self._begun.record(current)
        first, *others = self._launches
        first(strengths, current)
        for launch, stream, ended in zip(others, streams, self._ended, strict=True):
            stream.wait_event(self._begun)
            launch(strengths, stream)
            ended.record(stream)
        for ended in self._ended:
            current.wait_event(ended)
        self._seen.copy_(self._flags, non_blocking=True)

    def wrong(self) -> list[bool]:
        """For each layer, in the order of the parts, whether the last call wrote something that is not finite. Waits for
        torch's current stream."""
        torch.cuda.current_stream(self._device).synchronize()
        if not self._seen.any():  # nearly always, and a look at every layer takes longer than the swap
            return [False] * len(self._pieces)
        return [bool(piece.any()) for piece in self._seen.split(self._pieces)]
