"""Layers of adapters as LoRAs, exact or the best of a rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from trexport.errors import UsageError
from trexport.formats.writers import Pair
from trexport.models.adapters import as_text_names
from trexport.models.base import Base
from trexport.models.pipeline import text_encoders_of
from trlora import Adapter, CheckpointError, LayerAdapter, LayerParts
from trlora.layers import weight_change


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


def full_path(model: str, path: str) -> str:
    """A layer's path, with the component that it is of before it."""
    return f"{model}.{path}" if model else path


def pairs_of(
    model: str, adapter: Adapter, strength: float, base: Base | None, rank: int | None, dtype: torch.dtype
) -> tuple[dict[str, Pair], list[LayerConversion]]:
    """What is for one model as LoRAs: a text encoder, or the UNet, whose name is empty."""
    if adapter.offsets:
        raise UsageError(
            f"{len(adapter.offsets)} biases and weights of normalisations are changed, "
            f"{full_path(model, next(iter(adapter.offsets)))} first, which no LoRA holds: only --to trlora"
        )
    weights = _weights(model, adapter, base)
    pairs: dict[str, Pair] = {}
    done: list[LayerConversion] = []
    for path, parts in adapter.layers.items():
        pairs[path], layer = _pair(full_path(model, path), parts, strength, weights.get(path), rank, dtype)
        done.append(layer)
    return pairs, done


def _weights(model: str, adapter: Adapter, base: Base | None) -> dict[str, Callable[[], Tensor]]:
    """How to read the weights of the adapted layers, where there is a base, and where it has the model.

    Raises:
        CheckpointError: the adapter does not fit the base.
    """
    if base is not None and model:
        base = (text_encoders_of(base) or {}).get(model)
    if base is None:
        return {}
    named = replace(adapter, layers=as_text_names(adapter.layers, base.shapes())) if model else adapter
    replace(named, components={}).bind(base.weight_shapes())
    files = {entry.name: file for file in base.weights for entry in file.entries}

    def reader(name: str) -> Callable[[], Tensor]:
        return lambda: files[name].tensor(name)

    return {path: reader(f"{name}.weight") for path, name in zip(adapter.layers, named.layers, strict=True)}


def _pair(
    path: str,
    parts: LayerParts,
    strength: float,
    weight: Callable[[], Tensor] | None,
    rank: int | None,
    dtype: torch.dtype,
) -> tuple[Pair, LayerConversion]:
    """A layer as a LoRA, and what that costs."""
    beside = (parts.transform, parts.output_transform, parts.magnitude)
    low_rank_is_all = parts.residual is not None and all(part is None for part in beside)
    w0 = None if weight is None else weight()
    kernel = _kernel_of(path, parts, w0)
    with torch.no_grad():
        if low_rank_is_all:
            assert parts.residual is not None
            left, right = (factor.double() for factor in parts.residual.double().low_rank())
            left = left * strength
        else:
            if w0 is None:
                raise UsageError(f"{path}: what its transforms or its magnitude do depends on the weight; give --base")
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


_LINEAR = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "time_emb_proj",
    "linear_1",
    "linear_2",
    "q_proj",
    "k_proj",
    "v_proj",
    "out_proj",
    "fc1",
    "fc2",
)


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
