"""The contract of a form: how adapters get into a graph that is already loaded."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from trexport.errors import ArtifactError, UsageError
from trexport.graph.ops.slots import Slot
from trexport.io_spec import ADAPTER_INDEX, ADAPTER_STRENGTH
from trexport.models.adapters import BoundAdapter
from trlora.swap import PreparedAdapter, SwapReport


@final
@dataclass(frozen=True)
class Prepared:
    """An adapter as the inputs of one graph."""

    name: str
    strength: float
    """Its own, for who gives none."""
    fits: Mapping[int, Mapping[str, Tensor]]
    """Slot number → the slot's inputs, strength left out; only the slots that it fits."""
    on_device: PreparedAdapter | None = None
    """For a form that writes weights."""

    @property
    def size_bytes(self) -> int:
        return max(sum(tensor.nbytes for tensor in tensors.values()) for tensors in self.fits.values())


class AdapterForm(ABC):
    """Device buffers that a graph reads in every run, and how to fill them."""

    buffers: dict[str, Tensor]
    """By input name; overwritten in place, never replaced."""
    graph: bytes | None = None
    """The graph that reads them, where it is not the artifact's own."""

    @property
    def report(self) -> SwapReport | None:
        """How weights were written the last time, of forms that write them."""
        return None

    @abstractmethod
    def slots(self) -> Sequence[Slot]:
        """The places for adapters."""

    @abstractmethod
    def write(self, active: Sequence[tuple[Prepared, float]]) -> None:
        """Fill the buffers for these adapters at these strengths; none of them is the base, to the last bit. Always from
        what is pristine, so that what was there before leaves no trace.

        Raises:
            UsageError: more than the form takes at once, or a choice that does not fit together.
            ArtifactError: the result is not finite. The buffers are to be written again then.
        """

    def prepare(self, name: str, adapter: BoundAdapter) -> Prepared:
        """An adapter's tensors for every slot that it fits.

        Raises:
            ArtifactError: it fits none.
        """
        fits: dict[int, dict[str, Tensor]] = {}
        first: ArtifactError | None = None
        for number, slot in enumerate(self.slots()):
            try:
                tensors = slot.tensors(adapter.layers, adapter.strength, adapter.name)
            except ArtifactError as error:
                first = first or error
                continue
            del tensors[slot.strength]
            fits[number] = tensors
        if not fits and first is not None:
            raise first
        return Prepared(name, adapter.strength, fits)


def placed(active: Sequence[tuple[Prepared, float]], slots: Sequence[Slot]) -> dict[int, tuple[Prepared, float]]:
    """Which slot each adapter goes into, of a graph that has one for each at once.

    Raises:
        UsageError: more adapters than slots, or no way in which all fit.
    """
    if len(active) > len(slots):
        raise UsageError(f"{len(active)} adapters to be active at once, this graph takes {len(slots)}")
    for places in itertools.permutations(range(len(slots)), len(active)):
        taken = dict(zip(places, active, strict=True))
        if all(place in prepared.fits for place, (prepared, _) in taken.items()):
            return taken
    names = [prepared.name for prepared, _ in active]
    raise UsageError(f"{names} do not fit into this graph's slots together; export for them")


Sample = tuple[Prepared, float] | None
"""What one sample of a batch is drawn with: an adapter at a strength, or the base."""


class AbstractBank(AdapterForm):
    """A form in which every sample takes one of several adapters."""

    places: int
    """How many adapters a batch may have."""
    batch = 1
    """The samples that a run has at least."""

    @abstractmethod
    def chosen(self, samples: Sequence[Sample]) -> dict[str, Tensor] | None:
        """What is to be fed so that each sample is drawn as wanted; None where something is to be written first. Changes
        nothing, so that runs may ask at once."""

    @abstractmethod
    def choose(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Write what is not there yet, and tell what is to be fed. Nobody else is to look at the buffers meanwhile.

        Raises:
            ArtifactError: what would be written is not finite. What is drawn with it is written again before the next run.
        """

    @abstractmethod
    def fill(self, adapters: Sequence[tuple[Prepared, float]], turns: Sequence[int | None]) -> None:
        """For who feeds the graph alone: adapters in their order, so that samples can be drawn with those that `turns` names
        in turn by their numbers, from 0, None being the base."""

    @abstractmethod
    def rewrite(self, prepared: Prepared, strength: float) -> None:
        """Write an adapter so that every sample can be drawn with it, whether or not it is there: what a change costs."""

    @abstractmethod
    def adapter_bytes(self) -> int:
        """What each adapter takes that is held."""

    def sample_bytes(self) -> int:
        """What the samples take, however many adapters there are."""
        return 0

    def write(self, active: Sequence[tuple[Prepared, float]]) -> None:
        """What is active is chosen for every sample, as many as are known to come."""
        if len(active) > 1:
            raise UsageError(f"{len(active)} adapters to be active at once, a bank takes one a sample")
        self.choose([active[0] if active else None] * self.batch)


class PlacedBank(AbstractBank):
    """A bank with places that the graph chooses from by number. Adapters stay in theirs until others need them. Of those
    that a batch does not ask for, the one gives way that was put there first; batches that find all in place change no
    order, others move what they find to the end."""

    def __init__(self, places: int) -> None:
        self.places = places
        self._places: dict[str, tuple[int, Prepared]] = {}
        """Name → the place it lies in, from 1, and what lies there."""

    @abstractmethod
    def put(self, place: int, prepared: Prepared) -> None:
        """Copy an adapter into a place, counted from 1: place 0 is for none.

        Raises:
            ArtifactError: what is written there would not be finite. The place is not to be used then.
        """

    def chosen(self, samples: Sequence[Sample]) -> dict[str, Tensor] | None:
        if not all(sample is None or self._lies(sample[0]) for sample in samples):
            return None
        index = [0 if sample is None else self._places[sample[0].name][0] for sample in samples]
        strengths = [0.0 if sample is None else sample[1] for sample in samples]
        return {
            ADAPTER_INDEX: torch.tensor(index, dtype=torch.int64),
            ADAPTER_STRENGTH: torch.tensor(strengths, dtype=torch.float32),
        }

    def choose(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        wanted = {sample[0].name: sample[0] for sample in samples if sample is not None}
        for name, prepared in wanted.items():
            if self._lies(prepared):
                self._places[name] = self._places.pop(name)  # used just now: the last to give way
                continue
            taken = {place for place, _ in self._places.values()}
            if name in self._places:
                place, _ = self._places.pop(name)
            elif len(taken) < self.places:
                place = next(place for place in range(1, self.places + 1) if place not in taken)
            else:
                place, _ = self._places.pop(next(other for other in self._places if other not in wanted))
            self.put(place, prepared)
            self._places[name] = (place, prepared)
        feeds = self.chosen(samples)
        assert feeds is not None
        return feeds

    def fill(self, adapters: Sequence[tuple[Prepared, float]], turns: Sequence[int | None]) -> None:
        for place, (prepared, _) in enumerate(adapters, 1):  # which of them a sample takes, the graph is told
            self.put(place, prepared)

    def rewrite(self, prepared: Prepared, strength: float) -> None:
        self._places = {}
        self.put(1, prepared)
        self._places[prepared.name] = (1, prepared)

    def adapter_bytes(self) -> int:
        return sum(stack[0].nbytes for stack in self.buffers.values())

    def _lies(self, prepared: Prepared) -> bool:
        """Whether this very adapter lies in a place, not an older one of its name."""
        return prepared.name in self._places and self._places[prepared.name][1] is prepared
