"""`trexport convert`: an adapter in another form."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from trexport.errors import TrexportError, UsageError
from trexport.formats import left_out, read_adapter
from trexport.formats.writers import WRITERS, Pair
from trexport.models.adapters import adapter_path, split_strength
from trexport.models.base import Base
from trexport.restoring import is_adapter_file, restored_adapter
from trlora import Adapter, CheckpointError, LayerAdapter, LayerParts, save_adapter
from trlora.layers import weight_change

TRLORA = "trlora"
TARGETS = (TRLORA, *WRITERS)


@final
@dataclass(frozen=True)
class LayerConversion:
    """What became of a layer."""

    path: str
    rank: int
    relative_error: float
    """`‖Δ − Δ_r‖_F / ‖Δ‖_F`, Δ what the adapter makes of the layer's weight; 0 where it is exact."""
    norm: float
    """`‖Δ‖_F`."""


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
        done = tuple(LayerConversion(path, 0, 0.0, 0.0) for path in adapter.layers)
        return Conversion(adapter.format, to, done, _notes(adapter))
    writer = WRITERS[to]
    if writer.single_file and out.suffix != ".safetensors":
        raise UsageError(f"{out}: --to {to} is one file, expected a name that ends in .safetensors")
    if adapter.offsets:
        raise UsageError(
            f"{len(adapter.offsets)} biases and weights of normalisations are changed, {next(iter(adapter.offsets))} first, "
            "which no LoRA holds: only --to trlora"
        )
    weights = _weights(adapter, base)
    pairs: dict[str, Pair] = {}
    layers: list[LayerConversion] = []
    for path, parts in adapter.layers.items():
        pairs[path], layer = _pair(path, parts, chosen, weights.get(path), rank, dtype)
        layers.append(layer)
    found = Conversion(adapter.format, to, tuple(layers), _notes(adapter))
    if max_error is not None and found.relative_error > max_error:
        worst = max(layers, key=lambda layer: layer.relative_error)
        raise TrexportError(
            f"relative error {found.relative_error:.3g}, at most {max_error:g} is allowed; the worst layer is {worst.path} "
            f"with {worst.relative_error:.3g}: give a greater --rank"
        )
    if not dry_run:
        writer(out, pairs, adapter.metadata, overwrite=overwrite)
    return found


def _notes(adapter: Adapter) -> tuple[str, ...]:
    """What is not converted."""
    return (left_out(adapter.components),) if adapter.components else ()


def _weights(adapter: Adapter, base: Base | None) -> dict[str, Callable[[], Tensor]]:
    """How to read the weights of the adapted layers, where there is a base.

    Raises:
        CheckpointError: the adapter does not fit the base.
    """
    if base is None:
        return {}
    adapter.bind(base.weight_shapes())
    files = {entry.name: file for file in base.weights for entry in file.entries}

    def reader(name: str) -> Callable[[], Tensor]:
        return lambda: files[name].tensor(name)

    return {path: reader(f"{path}.weight") for path in adapter.layers}


def _pair(
    path: str,
    parts: LayerParts,
    strength: float,
    weight: Callable[[], Tensor] | None,
    rank: int | None,
    dtype: torch.dtype,
) -> tuple[Pair, LayerConversion]:
    """A layer as a LoRA, and what that costs."""
    low_rank_is_all = parts.transform is None and parts.magnitude is None and parts.residual is not None
    w0 = None if weight is None else weight()
    kernel = _kernel_of(path, parts, w0)
    with torch.no_grad():
        if low_rank_is_all:
            assert parts.residual is not None
            left, right = (factor.double() for factor in parts.residual.double().low_rank())
            left = left * strength
        else:
            if w0 is None:
                raise UsageError(f"{path}: its transform or magnitude depends on the weight; give --base")
            left, right = _change(parts.on(tuple(w0.shape)), w0, strength)
        norm = float(_norm(left, right))
        exact = left.shape[1]
        if low_rank_is_all and (rank is None or exact <= rank):
            error = 0.0
        else:
            if rank is None:
                raise UsageError(f"{path}: no LoRA of a small rank is equal to it; give --rank")
            left, right = _truncated(left, right, rank)
            kept = float(_norm(left, right))
            error = math.sqrt(max(0.0, norm**2 - kept**2)) / norm if norm else 0.0
    down = right.T.reshape(right.shape[1], right.shape[0] // math.prod(kernel), *kernel)
    up = left.reshape(*left.shape, *(1 for _ in kernel))
    pair = Pair(down.to(dtype).contiguous(), up.to(dtype).contiguous())
    for tensor in (pair.down, pair.up):
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{path}: not finite in {str(dtype).removeprefix('torch.')}; choose another --dtype")
    return pair, LayerConversion(path, pair.rank, error, norm)


def _change(adapter: LayerAdapter, weight: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """What an adapter does to a weight, (out, in) and the identity: Δ·I."""
    change = weight_change(weight.double(), [(adapter.double(), strength)], torch.float64)
    flat = weight.flatten(1).double()
    change = torch.zeros_like(flat) if change is None else change.flatten(1)
    return change, torch.eye(flat.shape[1], dtype=torch.float64)


def _norm(left: Tensor, right: Tensor) -> Tensor:
    """`‖left·rightᵀ‖_F` without the product."""
    return ((left.T @ left) * (right.T @ right)).sum().clamp(min=0).sqrt()


def _truncated(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors of a rank, by singular values (Eckart and Young); the singular values shared evenly."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right)
    u, sizes, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    root = sizes[:rank].sqrt()
    return q_left @ (u[:, :rank] * root), q_right @ (vh[:rank].T * root)


_LINEAR = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "time_emb_proj", "linear_1", "linear_2")


def _kernel_of(path: str, parts: LayerParts, weight: Tensor | None) -> tuple[int, ...]:
    """The kernel of the layer's convolution, () of a linear layer.

    Raises:
        UsageError: neither the adapter, nor the base, nor the name tells.
    """
    if weight is not None:
        return tuple(weight.shape[2:])
    if parts.kernel is not None and None not in parts.kernel:
        return tuple(int(size) for size in parts.kernel if size is not None)
    if parts.kernel is None and path.endswith(tuple(f".{name}" for name in _LINEAR)):
        return ()
    raise UsageError(f"{path}: a linear layer or a convolution? The adapter does not tell; give --base")


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
