"""The folder of adapters beside a served model, and what may be asked of it by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import final

from trexport.errors import UsageError
from trlora.errors import nearest

_NAME = re.compile(r"[^\s./\\=:\x00-\x1f][^/\\=:\x00-\x1f]{0,199}")
_SUFFIX = ".safetensors"
Signature = tuple[tuple[str, int, int], ...]


@final
class AdapterFolder:
    """Adapters by name: `NAME/`, or `NAME.safetensors`. Nothing outside the folder is ever named, links included."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()

    def names(self) -> list[str]:
        """What there is now."""
        if not self._folder.is_dir():
            return []
        found = (
            path.name.removesuffix(_SUFFIX)
            for path in self._folder.iterdir()
            if path.is_dir() or path.name.endswith(_SUFFIX)
        )
        return sorted({name for name in found if _NAME.fullmatch(name)})

    def find(self, name: str) -> Path:
        """The checkpoint of an adapter.

        Raises:
            UsageError: a name that no adapter can have, or that none has; the message lists those that there are.
        """
        if not _NAME.fullmatch(name):
            raise UsageError(f"adapter {name!r}: no name of an adapter, expected one of {self._listed()}")
        for path in (self._folder / name, self._folder / f"{name}{_SUFFIX}"):
            real = path.resolve()
            if real.is_relative_to(self._folder) and (real.is_dir() if path.name == name else real.is_file()):
                return path
        raise UsageError(f"no adapter {name!r}, there are {self._listed()}{nearest(name, self.names())}")

    def _listed(self) -> str:
        names = self.names()
        return f"{names[:10]}" + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def signature(checkpoint: Path) -> Signature:
    """Names, sizes and times of a checkpoint's files: differs where one was replaced."""
    files = sorted(checkpoint.iterdir()) if checkpoint.is_dir() else [checkpoint]
    return tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
