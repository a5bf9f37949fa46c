"""The contract of an adapter format."""

from __future__ import annotations

from typing import Protocol

from trexport.formats.content import Content
from trlora import Adapter


class AdapterFormat(Protocol):
    """How adapters of one kind are recognised and read. One file, or one folder of files, implements it."""

    @property
    def name(self) -> str:
        """As people call it."""
        ...

    def recognises(self, content: Content) -> bool:
        """Whether this is of the format, from keys, metadata and config; never from names of files. Damaged content of the
        format is recognised too, so that `read` can say what is wrong."""
        ...

    def read(self, content: Content) -> Adapter:
        """The adapter, in members of trlora's families.

        Raises:
            CheckpointError: it is damaged, or cannot be expressed; the message says why.
        """
        ...
