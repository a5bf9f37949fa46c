"""Matrices in the order in which the lanes of a warp hold them for `mma.sync` (PTX ISA, "Matrix Fragments for mma.m16n8k16"
and "… mma.m16n8k8").

Lane l is of group g = l / 4 and thread t = l % 4 in it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rows_of_16(x: Tensor) -> Tensor:
    """The transpose of x as the first factor (A) of m16n8k16.

    Args:
        x: `(*batch, K, N)`, K and N multiples of 16.

    Returns:
        `(*batch, N/16, K/16, 32, 8)`: tile of N, step of K, lane, and a lane's eight values in the order of its registers.
    """
    group, thread = _lanes(x)
    register, half = torch.arange(4, device=x.device), torch.arange(2, device=x.device)
    row = group[:, None, None] + 8 * (register % 2)[None, :, None]
    column = 2 * thread[:, None, None] + half[None, None, :] + 8 * (register // 2)[None, :, None]
    row, column = torch.broadcast_tensors(row, column)
    tiles = _tiles(x, 16, 16).transpose(-3, -4)  # (*batch, N/16, K/16, 16 of K, 16 of N)
    return tiles[..., column, row].flatten(-2).contiguous()


def rows_of_8(x: Tensor) -> Tensor:
    """x as the first factor (A) of m16n8k8.

    Args:
        x: `(*batch, M, 8)`, M a multiple of 16.

    Returns:
        `(*batch, M/16, 32, 4)`.
    """
    group, thread = _lanes(x)
    register, half = torch.arange(2, device=x.device), torch.arange(2, device=x.device)
    row, column = torch.broadcast_tensors(
        group[:, None, None] + 8 * register[None, :, None], 2 * thread[:, None, None] + half[None, None, :]
    )
    return x.unflatten(-2, (-1, 16))[..., row, column].flatten(-2).contiguous()


def columns_of_8(x: Tensor) -> Tensor:
    """x as the second factor (B) of m16n8k16.

    Args:
        x: `(*batch, K, N)`, K a multiple of 16, N of 8.

    Returns:
        `(*batch, K/16, N/8, 32, 4)`: step of K, tile of N, lane, and a lane's four values.
    """
    group, thread = _lanes(x)
    register, half = torch.arange(2, device=x.device), torch.arange(2, device=x.device)
    row = 2 * thread[:, None, None] + half[None, None, :] + 8 * register[None, :, None]
    column = group[:, None, None]
    row, column = torch.broadcast_tensors(row, column)
    return _tiles(x, 16, 8)[..., row, column].flatten(-2).contiguous()


def padded(x: Tensor, *sizes: int) -> Tensor:
    """x with zeros behind its last dimensions, up to the sizes given."""
    result = x.new_zeros(*x.shape[: x.ndim - len(sizes)], *sizes)
    result[(..., *(slice(size) for size in x.shape[x.ndim - len(sizes) :]))] = x
    return result


def _lanes(x: Tensor) -> tuple[Tensor, Tensor]:
    lane = torch.arange(32, device=x.device)
    return lane // 4, lane % 4


def _tiles(x: Tensor, height: int, width: int) -> Tensor:
    """`(*batch, K, N)` → `(*batch, K/height, N/width, height, width)`."""
    return x.unflatten(-1, (-1, width)).unflatten(-3, (-1, height)).transpose(-3, -2)
