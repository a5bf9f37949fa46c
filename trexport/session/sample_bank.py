"""A bank whose weights are written for each sample when the choice of adapters changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from trexport.backends import Device
from trexport.graph.ops.slots import Slot
from trexport.graph.passes.written_samples import samples_name
from trexport.io_spec import ADAPTER_INDEX, ADAPTER_STRENGTH
from trexport.session.form import AbstractBank, Prepared, Sample
from trexport.session.replaced import CopiedForm, ReplacedForm


@final
class SampleBank(CopiedForm, AbstractBank):
    """A bank of a factored model of a fixed batch with a weight for every sample in the place of cores. Samples keep what
    they were drawn with; what a run changes is written before it, at its very strength, as by `ReplacedForm`, and rounded
    once.

    Args:
        slot, pristine, device: as of `ReplacedForm`, of linear layers.
        places: adapters that a batch may have.
        batch: the samples of every run.
        graph: the model's, as `trexport.graph.passes.written_samples` makes it.
    """

    def __init__(
        self, slot: Slot, pristine: Mapping[str, Tensor], device: Device, places: int, batch: int, graph: bytes
    ) -> None:
        self.places, self.batch, self.graph = places, batch, graph
        self._one = ReplacedForm(slot, pristine, device)
        self.buffers = dict(zip(map(samples_name, slot.layers), self.stacks(batch), strict=True))
        self._held: list[Sample | object] = [None] * batch
        self._unread = {
            ADAPTER_INDEX: torch.zeros(batch, dtype=torch.int64),
            ADAPTER_STRENGTH: torch.zeros(batch, dtype=torch.float32),
        }

    def chosen(self, samples: Sequence[Sample]) -> dict[str, Tensor] | None:
        lies = all(_same(held, sample) for held, sample in zip(self._held, samples, strict=True))
        return self._unread if lies else None

    def choose(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        waiting = [
            row for row, (held, sample) in enumerate(zip(self._held, samples, strict=True)) if not _same(held, sample)
        ]
        while waiting:
            sample = samples[waiting[0]]
            rows = [row for row in waiting if _same(samples[row], sample)]
            self._write(rows, sample)
            waiting = [row for row in waiting if row not in rows]
        return self._unread

    def fill(self, adapters: Sequence[tuple[Prepared, float]], turns: Sequence[int | None]) -> None:
        numbers = [turns[row % len(turns)] for row in range(self.batch)]
        self.choose([None if number is None else adapters[number] for number in numbers])

    def rewrite(self, prepared: Prepared, strength: float) -> None:
        self._write(range(self.batch), (prepared, strength))

    def adapter_bytes(self) -> int:
        (slot,) = self.slots()
        return sum(tensor.nbytes for tensor in slot.neutral().values())

    def sample_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in [*self._one.buffers.values(), *self.buffers.values()])

    def _write(self, rows: Sequence[int], sample: Sample) -> None:
        for row in rows:
            self._held[row] = _NOTHING
        self._one.write([] if sample is None else [sample])
        self.copy(rows)
        for row in rows:
            self._held[row] = sample


_NOTHING = object()
"""What a row holds that is being written, or could not be."""


def _same(held: Sample | object, sample: Sample) -> bool:
    """Whether both are the base, or the very same adapter, not another of its name, at the same strength."""
    if held is None or sample is None:
        return held is sample
    return isinstance(held, tuple) and held[0] is sample[0] and held[1] == sample[1]
