"""Layers that are finished, kept beside the output until all are: a fit that was stopped goes on from them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, final

import safetensors.torch

from trexport.errors import TrexportError
from trlora import AdapterSpec, LayerParts
from trlora.checkpoint import read_safetensors
from trlora.files import atomic_file
from trlora.fit import LayerFit

_PLAN = "plan.json"


@final
@dataclass(frozen=True)
class StoredFit:
    """A fit of one layer, as it is on the disk."""

    parts: LayerParts
    parameters: int
    error: float
    change: float
    method: str


@final
class Store:
    """A folder of finished layers of one fit.

    Args:
        out: where the adapter is going to be; the folder lies beside it, hidden.
        plan: everything that the result depends on.
        restart: throw away what another plan has left there.

    Raises:
        TrexportError: another plan has left finished layers there, and `restart` is not set.
    """

    def __init__(self, out: Path, plan: Mapping[str, Any], *, restart: bool = False) -> None:
        self.folder = out.parent / f".{out.name}.fit"
        text = json.dumps(plan, indent=1, sort_keys=True)
        file = self.folder / _PLAN
        if self.folder.exists() and not (file.is_file() and file.read_text(encoding="utf-8") == text):
            if not restart and any(self.folder.glob("*.safetensors")):
                raise TrexportError(
                    f"{self.folder}: holds finished layers of another fit (other weights, members, sizes, targets or "
                    "options); give the same arguments to go on with it, or --restart to throw it away"
                )
            shutil.rmtree(self.folder)
        elif restart and self.folder.exists():
            shutil.rmtree(self.folder)
        if not file.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(file) as temporary:
                temporary.write_text(text, encoding="utf-8")

    def _file(self, path: str) -> Path:
        # a module's path may be longer than a file's name
        return self.folder / f"{hashlib.sha256(path.encode()).hexdigest()[:32]}.safetensors"

    def has(self, path: str) -> bool:
        return self._file(path).is_file()

    def write(self, path: str, fits: Sequence[LayerFit]) -> None:
        """Keep the fits of a layer."""
        tensors = {
            f"{number}.{key}": tensor.contiguous()
            for number, fit in enumerate(fits)
            for key, tensor in fit.adapter.state_dict().items()
        }
        records = [
            {"spec": fit.adapter.spec.to_dict(), "error": fit.error, "change": fit.change, "method": fit.method}
            for fit in fits
        ]
        with atomic_file(self._file(path)) as temporary:
            safetensors.torch.save_file(tensors, temporary, metadata={"fits": json.dumps(records)})

    def read(self, path: str) -> list[StoredFit]:
        """The fits of a layer that is finished."""
        tensors, metadata = read_safetensors(self._file(path))
        return [
            self._stored(path, number, record, tensors) for number, record in enumerate(json.loads(metadata["fits"]))
        ]

    def _stored(self, path: str, number: int, record: Mapping[str, Any], tensors: Mapping[str, Any]) -> StoredFit:
        parts: dict[str, dict[str, Any]] = {}
        count = 0
        for key, tensor in tensors.items():
            mine, _, name = key.partition(".")
            if mine == str(number):
                part, _, leaf = name.partition(".")
                parts.setdefault(part, {})[leaf] = tensor
                count += tensor.numel()
        spec = AdapterSpec.from_dict(record["spec"])
        return StoredFit(
            LayerParts.from_tensors(path, spec, parts), count, record["error"], record["change"], record["method"]
        )

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        """Leaves nothing where nothing was finished."""
        if self.folder.exists() and not any(self.folder.glob("*.safetensors")):
            self.remove()
