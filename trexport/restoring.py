"""ONNX Runtime's adapter files, as `trexport adapter` writes them, back to adapters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trexport.backends.onnxruntime import read_adapter_file
from trexport.errors import ArtifactError
from trexport.formats.content import listed
from trexport.graph.ops import MAGNITUDE_OPS, RESIDUAL_OPS, TRANSFORM_OPS, MemberOp
from trexport.graph.ops.slots import STRENGTH
from trlora import Adapter, AdapterSpec, CheckpointError, LayerParts
from trlora.spec import PARTS

FORMAT = "adapter file of ONNX Runtime"
_SLOT = re.compile(r"adapter_\d+\.")
_OPS: dict[str, Mapping[str, type[MemberOp]]] = {
    "transform": TRANSFORM_OPS,
    "residual": RESIDUAL_OPS,
    "magnitude": MAGNITUDE_OPS,
    "output_transform": TRANSFORM_OPS,
}
_ByLayer = dict[str, dict[str, dict[str, Tensor]]]
"""Tensors by layer, part and name."""


def restored_adapter(path: Path) -> Adapter:
    """The adapter of a file that `trexport adapter --for` a factored artifact has written. Members are what the graph takes:
    alphas are multiplied in, ranks stay as they were padded, and parts that change nothing are gone.

    Raises:
        ArtifactError: a damaged file, none of trexport's, of a bank, with several adapters, or with tensors that no member
            has.
        MissingError: ONNX Runtime is not installed.
    """
    tensors, _ = read_adapter_file(path)
    slots: dict[str, _ByLayer] = {}
    strengths: dict[str, float] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        slot = _SLOT.match(key)
        prefix = "" if slot is None else slot[0]
        name = key.removeprefix(prefix)
        if name == STRENGTH and tensor.numel() == 1:
            strengths[prefix] = float(tensor)
            continue
        part = max(PARTS, key=lambda part: name.rfind(f".{part}."))
        layer, found, leaf = name.rpartition(f".{part}.")
        if not (found and layer and leaf) or tensor.dtype != torch.float32 or not tensor.isfinite().all():
            unknown.append(key)
        else:
            slots.setdefault(prefix, {}).setdefault(layer, {}).setdefault(part, {})[leaf] = tensor
    if unknown:
        raise ArtifactError(
            f"{path}: {len(unknown)} of {len(tensors)} tensors are none that trexport adapter writes, finite ones in "
            f"float32 called <module>.<part>.<tensor>: {listed(unknown)}"
        )
    if not strengths:
        raise ArtifactError(f"{path}: no {STRENGTH} inside, as in a file for a bank, which holds stacks of adapters")
    active = [prefix for prefix, strength in strengths.items() if strength != 0] or list(strengths)[:1]
    if len(active) > 1:
        raise ArtifactError(f"{path}: {len(active)} adapters inside, of {', '.join(sorted(active))}; expected one")
    return _adapter(slots.get(active[0], {}), strengths[active[0]], path)


def _adapter(by_layer: _ByLayer, strength: float, path: Path) -> Adapter:
    layers: dict[str, LayerParts] = {}
    for layer, parts in by_layer.items():
        specs: dict[str, Any] = {}
        members: dict[str, dict[str, Tensor]] = {}
        for part, tensors in parts.items():
            ordered = dict(sorted(tensors.items(), key=lambda item: _natural(item[0])))
            try:
                op = next(op for op in _OPS[part].values() if op.telling in ordered)
                if _changes_nothing(op, ordered):
                    continue
                specs[part], members[part] = op.restored(ordered)
            except StopIteration:
                raise ArtifactError(f"{path}: {layer}.{part}: of no member that is known: {listed(ordered)}") from None
            except (KeyError, IndexError, ValueError, ArtifactError) as error:
                raise ArtifactError(f"{path}: {layer}.{part}: {error}") from error
        if not members:
            continue
        try:
            layers[layer] = LayerParts.from_tensors(layer, AdapterSpec.from_dict(specs), members)
        except CheckpointError as error:
            raise ArtifactError(f"{path}: {error}") from error
    return Adapter.of(layers, strength, None, str(path), FORMAT)


def _changes_nothing(op: type[MemberOp], tensors: Mapping[str, Tensor]) -> bool:
    """Whether they are what a place without an adapter holds."""
    neutral = op({name: tuple(tensor.shape) for name, tensor in tensors.items()}).neutral()
    return all(torch.equal(neutral[name], tensor) for name, tensor in tensors.items())


def _natural(name: str) -> tuple[str, int]:
    """`core.10` after `core.9`."""
    stem, _, number = name.rpartition(".")
    return (stem, int(number)) if number.isdigit() else (name, 0)
