"""`trexport convert`: an adapter in another form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch

from trexport.as_lora import LayerConversion, full_path, pairs_of
from trexport.errors import TrexportError, UsageError
from trexport.formats import left_out, read_adapter
from trexport.formats.content import is_adapter_file
from trexport.formats.writers import WRITERS, Pair
from trexport.models.adapters import adapter_path, split_strength
from trexport.models.base import Base
from trexport.restoring import restored_adapter
from trlora import save_adapter

TRLORA = "trlora"
TARGETS = (TRLORA, *WRITERS)


@final
@dataclass(frozen=True)
class Conversion:
    """What a conversion did, or would do."""

    source: str
    to: str
    layers: tuple[LayerConversion, ...]
    notes: tuple[str, ...]

    @property
    def exact(self) -> bool:
        return all(layer.relative_error == 0 for layer in self.layers)

    @property
    def relative_error(self) -> float:
        """Of all layers together."""
        whole = sum(layer.norm**2 for layer in self.layers)
        lost = sum((layer.relative_error * layer.norm) ** 2 for layer in self.layers)
        return math.sqrt(lost / whole) if whole else 0.0


def convert(
    argument: str,
    out: Path,
    to: str,
    *,
    base: Base | None = None,
    rank: int | None = None,
    max_error: float | None = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Conversion:
    """Write an adapter as another format.

    To trlora's own it is always exact. A LoRA of others is exact where the transform is the identity and there is no
    magnitude, in as many ranks as the residual has (R² for a tensor ring of rank R); what is more, or is cut by `rank`, is
    the best approximation of that rank, by a singular value decomposition of what the adapter does to the weight.

    Args:
        argument: `ADAPTER[=STRENGTH]`, or an adapter file of ONNX Runtime that trexport wrote; a LoRA has no strength of
            its own, so it is multiplied in.
        to: one of `TARGETS`.
        base: the weights, without which a transform cannot be expressed.
        rank: the greatest rank.
        max_error: relative error of all layers together that is refused, before anything is written.

    Raises:
        UsageError: an unknown target, or a base or rank that is needed and not given.
        CheckpointError: the adapter is refused.
        TrexportError: a greater error.
        FileExistsError: `out` is there.
    """
    if to not in TARGETS:
        raise UsageError(f"--to {to}: expected one of {', '.join(TARGETS)}")
    name, strength = split_strength(argument)
    source = adapter_path(name)
    adapter = restored_adapter(source) if is_adapter_file(source) else read_adapter(source)
    if out.exists() and not overwrite and (out.is_file() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists; choose another name, or pass --overwrite")
    chosen = adapter.config.strength if strength is None else strength
    if to == TRLORA:
        if rank is not None or max_error is not None:
            raise UsageError("--rank and --max-error are for a LoRA of others; trlora's own form is exact")
        if not dry_run:
            save_adapter(adapter.with_strength(chosen), out, overwrite=overwrite)
        models = {"": adapter, **adapter.components}.items()
        done = tuple(
            LayerConversion(full_path(model, path), 0, 0.0, 0.0) for model, part in models for path in part.layers
        )
        return Conversion(adapter.format, to, done, ())
    writer = WRITERS[to]
    if writer.single_file and out.suffix != ".safetensors":
        raise UsageError(f"{out}: --to {to} is one file, expected a name that ends in .safetensors")
    taken = adapter.components if writer.text_encoders else {}
    notes = (left_out(adapter.components),) if adapter.components and not writer.text_encoders else ()
    pairs: dict[str, dict[str, Pair]] = {}
    layers: list[LayerConversion] = []
    for model, part in {"": adapter, **taken}.items():
        pairs[model], done = pairs_of(model, part, chosen, base, rank, dtype)
        layers += done
    if not layers:
        raise UsageError(
            f"nothing for the UNet or transformer inside, and --to {to} has no place for what is: {', '.join(notes)}"
        )
    found = Conversion(adapter.format, to, tuple(layers), notes)
    if max_error is not None and found.relative_error > max_error:
        worst = max(layers, key=lambda layer: layer.relative_error)
        raise TrexportError(
            f"relative error {found.relative_error:.3g}, at most {max_error:g} is allowed; the worst layer is {worst.path} "
            f"with {worst.relative_error:.3g}: give a greater --rank"
        )
    if not dry_run:
        writer(out, pairs.pop(""), pairs, adapter.metadata, overwrite=overwrite)
    return found


def summary(conversion: Conversion) -> Mapping[str, object]:
    """For `--json`."""
    return {
        "source": conversion.source,
        "to": conversion.to,
        "layers": len(conversion.layers),
        "exact": conversion.exact,
        "relative_error": conversion.relative_error,
        "errors": {layer.path: layer.relative_error for layer in conversion.layers},
        "ranks": {layer.path: layer.rank for layer in conversion.layers},
        "left_out": list(conversion.notes),
    }
