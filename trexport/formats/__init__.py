"""Formats of adapters, recognised from their content. A new one is one file here, one line in `FORMATS`, one entry in the
tests."""

from __future__ import annotations

from pathlib import Path

from trexport.formats.base import AdapterFormat as AdapterFormat
from trexport.formats.content import Content as Content
from trexport.formats.content import listed, read_content
from trexport.formats.describe import method_of as method_of
from trexport.formats.describe import ranks_of as ranks_of
from trexport.formats.diffusers import DiffusersFormat
from trexport.formats.kohya import KohyaFormat
from trexport.formats.looks import looks_like as looks_like
from trexport.formats.looks import widths_of as widths_of
from trexport.formats.peft import PeftFormat
from trexport.formats.text import left_out as left_out
from trexport.formats.trlora import TrloraFormat
from trlora import Adapter, CheckpointError
from trlora.checkpoint import CONFIG_NAME

FORMATS: list[AdapterFormat] = [TrloraFormat(), PeftFormat(), KohyaFormat(), DiffusersFormat()]
"""The first that recognises a content reads it."""


def is_adapter(path: Path) -> bool:
    """Whether a format knows a file or folder, damaged or not. Raises `CheckpointError` for one that cannot be opened."""
    content = read_content(path)
    return any(adapter_format.recognises(content) for adapter_format in FORMATS)


def read_adapter(path: Path) -> Adapter:
    """Read an adapter of any format.

    Raises:
        CheckpointError: no format knows it, or the one that does refuses it.
    """
    content = read_content(path)
    for adapter_format in FORMATS:
        if adapter_format.recognises(content):
            return adapter_format.read(content)
    config = f"{CONFIG_NAME} with {sorted(content.config)}" if content.config else f"no {CONFIG_NAME}"
    raise CheckpointError(
        f"{path}: an adapter of no format that is known, with {config}; header metadata: "
        f"{listed(content.metadata) or 'none'}; {len(content.tensors)} keys: {listed(content.tensors) or 'none'}; formats: "
        f"{', '.join(adapter_format.name for adapter_format in FORMATS)}"
    )
