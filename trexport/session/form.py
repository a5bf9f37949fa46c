"""The contract of a form: how adapters get into a graph that is already loaded."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from trexport.errors import ArtifactError, UsageError
from trexport.graph.ops.slots import Slot
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


class AbstractBank(AdapterForm):
    """A form in which every sample takes one of several adapters, each in a place of its own."""

    places: int

    @abstractmethod
    def put(self, place: int, prepared: Prepared) -> None:
        """Copy an adapter into a place, counted from 1: place 0 is for none.

        Raises:
            ArtifactError: what is written there would not be finite. The place is not to be used then.
        """

    def write(self, active: Sequence[tuple[Prepared, float]]) -> None:
        """Nothing: what is active is put into a place, and chosen for every sample."""
        if len(active) > 1:
            raise UsageError(f"{len(active)} adapters to be active at once, a bank takes one a sample")
