"""Is there room for what is going to be written?"""

from __future__ import annotations

import shutil
from pathlib import Path

from trexport.errors import TrexportError


def check_disk(out: Path, size_bytes: int) -> None:
    """Raise `TrexportError` when the disk of `out` has less free space than `size_bytes`."""
    parent = next(path for path in [out, *out.absolute().parents] if path.exists())
    free = shutil.disk_usage(parent).free
    if free < size_bytes:
        raise TrexportError(
            f"{out}: the disk has {free / 1e9:.2f} GB free, the result needs {size_bytes / 1e9:.2f} GB; free some, "
            "or choose another folder"
        )
