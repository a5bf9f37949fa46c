"""Alternating least squares over the cores of tensor rings: each step is the exact optimum of one core, the others held.

Every core's normal equations are small (a mode times squared ranks at most), for they split over the indices that the core
does not see. So a sweep costs about as much as a few products of the target with a matrix of R² columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trlora.fit.solve import improved
from trlora.ring import chain_from_cores, open_chain


def sweep_residual_(target: Tensor, row_cores: Sequence[Tensor], column_cores: Sequence[Tensor]) -> None:
    """Lower `‖target − Δ‖_F` over the cores of a tensor-ring residual, one after another, in place.

    Args:
        target: (out, in), float64.
        row_cores, column_cores: see `trlora.ring.delta_from_cores`.
    """
    _sweep_half_(target, row_cores, column_cores)
    _sweep_half_(target.T, column_cores, row_cores)


def _sweep_half_(target: Tensor, cores: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """The cores of one side. With the other side's chain C[j], `Δ[i, j] = Σ_ab P[i][a, b]·C[j][b, a]`."""
    other = chain_from_cores(others).transpose(1, 2)  # (columns, a, b)
    first, last = other.shape[1:]
    flat = other.flatten(1)
    gram = (flat.T @ flat).view(first, last, first, last)
    met = target @ flat  # all that the cores see of the target
    modes = [core.shape[0] for core in cores]
    for d, core in enumerate(cores):
        before = chain_from_cores(cores[:d]) if d else _eye(first)  # (lower, a, r)
        after = chain_from_cores(cores[d + 1 :]) if d + 1 < len(cores) else _eye(last)  # (upper, r', b)
        left = torch.einsum("lar,lAR->arAR", before, before)
        right = torch.einsum("usb,uSB->sbSB", after, after)
        half = torch.einsum("arAR,abAB->rRbB", left, gram)
        normal = torch.einsum("rRbB,sbSB->rsRS", half, right)
        part = met.view(math.prod(modes[d + 1 :]), modes[d], math.prod(modes[:d]), first, last)
        part = torch.einsum("uilab,usb->ilas", part, after)
        wanted = torch.einsum("ilas,lar->rsi", part, before)
        size = core.shape[1] * core.shape[2]
        better = improved(normal.reshape(size, size), wanted.reshape(size, -1), core.flatten(1).T)
        core.copy_(better.T.reshape(core.shape))


def sweep_transform_(cores: Sequence[Tensor], gram: Tensor, cross: Tensor) -> None:
    """Lower `‖target − W·T‖_F` over the cores of a square tensor-ring matrix T, one after another, in place.

    Args:
        cores: D tensors `(I_d, I_d, R_d, R_{d+1})`, float64.
        gram: `WᵀW`, (in, in).
        cross: `Wᵀ·target`, (in, in).
    """
    modes = [core.shape[0] for core in cores]
    slow_first = modes[::-1]
    gram, cross = gram.view(slow_first * 2), cross.view(slow_first * 2)
    count = len(cores)
    for d, core in enumerate(cores):
        following = [(d + k) % count for k in range(1, count)]
        around = open_chain([cores[e] for e in following]) if following else _eye(core.shape[3])[None]
        around = around.transpose(2, 3)  # (i, j, r, r') of the other modes, so that T = Σ core[r, r']·around[r, r']
        others, size = around.shape[0], core.shape[2] * core.shape[3]
        own = modes[d]
        # axes of a matrix over (slow … fast)²: the core's own mode first, then the others as `open_chain` flattens them
        order = [count - 1 - e for e in [d, *reversed(following)]]
        order = order + [count + axis for axis in order]
        h = gram.permute(order).reshape(own, others, own, others)
        b = cross.permute(order).reshape(own, others, own, others)
        flat = around.permute(0, 2, 3, 1).reshape(others * size, others)
        met = (flat @ flat.T).view(others, size, others, size)
        normal = torch.einsum("ipIP,paPA->iaIA", h, met).reshape(own * size, own * size)
        wanted = torch.einsum("ipjq,pqa->iaj", b, around.reshape(others, others, size)).reshape(own * size, own)
        current = core.permute(0, 2, 3, 1).reshape(own * size, own)
        better = improved(normal, wanted, current).view(own, core.shape[2], core.shape[3], own)
        core.copy_(better.permute(0, 3, 1, 2))


def _eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)[None]
