"""trlora's own checkpoints."""

from __future__ import annotations

from typing import final

from trexport.formats.content import Content
from trlora import Adapter, load_adapter
from trlora.config import FORMAT


@final
class TrloraFormat:
    """A folder whose config says `"format": "trlora"`, or a file with the header metadata key `trlora`."""

    name = "trlora"

    def recognises(self, content: Content) -> bool:
        return FORMAT in content.metadata or (content.path.is_dir() and "format" in content.config)

    def read(self, content: Content) -> Adapter:
        return load_adapter(content.path)
