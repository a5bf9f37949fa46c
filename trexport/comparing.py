"""Two adapters side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trexport.formats import method_of, ranks_of, read_adapter
from trexport.inspecting import Inspection
from trexport.models.adapters import adapter_path, split_strength
from trlora import Adapter, LayerParts


def compare(one: str, other: str) -> Inspection:
    """What two adapters have in common, and how far apart they are where that can be told without a base.

    Args:
        one, other: `ADAPTER[=STRENGTH]`.

    Returns:
        facts as pairs, and for each layer of either: where it is, the cosine of the two residuals as matrices, and
        `‖s_a·Δ_a − s_b·Δ_b‖_F / ‖s_a·Δ_a‖_F`; likewise `‖T_a − T_b‖_F / ‖T_a − I‖_F` of the transforms.

    Raises:
        CheckpointError: one is refused.
    """
    names = [split_strength(argument) for argument in (one, other)]
    adapters = [read_adapter(adapter_path(name)) for name, _ in names]
    strengths = [
        adapter.config.strength if strength is None else strength
        for adapter, (_, strength) in zip(adapters, names, strict=True)
    ]
    a, b = adapters
    both = [path for path in a.layers if path in b.layers]
    facts = {
        "format": [adapter.format for adapter in adapters],
        "method": [method_of(adapter) for adapter in adapters],
        "ranks": [str(ranks_of(adapter)) for adapter in adapters],
        "strength": strengths,
        "layers": [len(adapter.layers) for adapter in adapters],
        "parameters": [adapter.parameters for adapter in adapters],
        "layers_of_both": len(both),
        "same": _same(a, b) and strengths[0] == strengths[1],
    }
    with torch.no_grad():
        rows = [_row(path, a.layers[path], b.layers[path], strengths) for path in both]
    rows += [(path, "the first only", "", "", "") for path in a.layers if path not in b.layers]
    rows += [(path, "the second only", "", "", "") for path in b.layers if path not in a.layers]
    columns = ("layer", "of", "cosine of Δ", "distance of Δ", "distance of T")
    return Inspection(f"{one}, {other}", "two adapters", facts, columns, rows)


def _same(a: Adapter, b: Adapter) -> bool:
    """Whether they have the same tensors under the same names."""
    first, second = a.tensors(), b.tensors()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def _row(path: str, a: LayerParts, b: LayerParts, strengths: Sequence[float]) -> tuple[str, str, str, str, str]:
    cosine = distance = turned = ""
    if a.residual is not None and b.residual is not None:
        if (a.residual.in_features, a.residual.out_features) != (b.residual.in_features, b.residual.out_features):
            return path, "both, of other shapes", "", "", ""
        pairs = []
        for parts, strength in zip((a, b), strengths, strict=True):
            assert parts.residual is not None
            left, right = parts.residual.low_rank()
            pairs.append((strength * left.double(), right.double()))
        first, second, common = (_inner(pairs[i], pairs[j]) for i, j in ((0, 0), (1, 1), (0, 1)))
        if first > 0:
            distance = f"{math.sqrt(max(0.0, first - 2 * common + second) / first):.3f}"
            cosine = f"{common / math.sqrt(first * second):.3f}" if second > 0 else ""
    if a.transform is not None and b.transform is not None and a.transform.features == b.transform.features:
        one, other = a.transform.matrix().double(), b.transform.matrix().double()
        moved = (one - torch.eye(len(one), dtype=one.dtype)).norm()
        turned = f"{((one - other).norm() / moved).item():.3f}" if moved > 0 else ""
    return path, "both", cosine, distance, turned


def _inner(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """`⟨L_a·R_aᵀ, L_b·R_bᵀ⟩` without the products."""
    return float(((a[0].T @ b[0]) * (a[1].T @ b[1])).sum())
