"""Adapters in memory: as many as there is room for, the least recently used leaves first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import final

from trexport.errors import ArtifactError, UsageError
from trexport.models.adapters import BoundAdapter
from trexport.session.form import Prepared
from trlora.errors import nearest


@final
@dataclass(frozen=True)
class _Source:
    """Where an adapter came from, so that it can come again."""

    argument: str
    sha256: str


@final
class AdapterStore:
    """A bounded number of prepared adapters by name. One that has left is read again, from where it was, when it is asked
    for; a file that has changed since is refused. Safe to use from several threads.

    Args:
        capacity: how many are kept.
        open_one: opens an `ADAPTER[=STRENGTH]` argument.
        prepare: makes it ready for the graph.
    """

    def __init__(
        self,
        capacity: int,
        open_one: Callable[[str], BoundAdapter],
        prepare: Callable[[str, BoundAdapter], Prepared],
    ) -> None:
        if capacity < 1:
            raise UsageError(f"room for {capacity} adapters asked for, expected at least 1")
        self.capacity = capacity
        self._open, self._prepare = open_one, prepare
        self._sources: dict[str, _Source] = {}
        self._kept: OrderedDict[str, Prepared] = OrderedDict()
        self._mutex = threading.Lock()

    def names(self) -> list[str]:
        """All that were loaded, in memory or not."""
        with self._mutex:
            return list(self._sources)

    def kept(self) -> list[str]:
        """Those in memory, the least recently used first."""
        with self._mutex:
            return list(self._kept)

    def load(self, name: str, argument: str, pinned: Collection[str] = ()) -> Prepared:
        """Open an adapter and keep it under a name; one of that name is replaced.

        Args:
            pinned: names that must not leave.

        Raises:
            ArtifactError, CheckpointError: it is refused; what was there under the name stays.
            UsageError: no room, for all that are in memory are pinned.
        """
        bound = self._open(argument)
        return self._keep(name, _Source(argument, bound.sha256), self._prepare(name, bound), pinned)

    def get(self, name: str, pinned: Collection[str] = ()) -> Prepared:
        """An adapter by name; read again where it has left.

        Raises:
            UsageError: none of that name was loaded.
            ArtifactError: its file has changed since.
        """
        with self._mutex:
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._kept[name]
            source = self._sources.get(name)
            known = list(self._sources)
        if source is None:
            raise UsageError(f"no adapter {name!r} is loaded, there are {known}{nearest(name, known)}")
        bound = self._open(source.argument)
        if bound.sha256 != source.sha256:
            raise ArtifactError(f"{source.argument}: changed since it was loaded as {name!r}; load it again")
        return self._keep(name, source, self._prepare(name, bound), pinned)

    def forget(self, name: str) -> None:
        """Drop an adapter. Raises `UsageError` where there is none."""
        with self._mutex:
            if self._sources.pop(name, None) is None:
                raise UsageError(f"no adapter {name!r} is loaded, there are {list(self._sources)}")
            self._kept.pop(name, None)

    def _keep(self, name: str, source: _Source, prepared: Prepared, pinned: Collection[str]) -> Prepared:
        with self._mutex:
            others = [other for other in self._kept if other != name]
            leaving = [other for other in others if other not in pinned][: max(0, len(others) + 1 - self.capacity)]
            if len(others) - len(leaving) + 1 > self.capacity:
                raise UsageError(
                    f"no room for {name!r}: {self.capacity} adapters are in memory and all of them in use; deactivate one, "
                    "or open the session with a greater capacity"
                )
            for other in leaving:
                del self._kept[other]
            self._kept[name] = prepared
            self._kept.move_to_end(name)
            self._sources[name] = source
        return prepared
