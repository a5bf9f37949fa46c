"""Our own operators, known to `torch.compile`, `torch.export` and AOTInductor: Triton kernels on CUDA, torch's operators on
the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import triton_op


@triton_op("trexport::group_norm", mutates_args={})
def group_norm(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    """`silu(group_norm(x + shift))`.

    Args:
        x: (batch, channels, height, width), floating point; made channels-last on CUDA where it is not.
        shift: (batch, channels), rows of any stride, or (channels,), or None.
        weight, bias: (channels,).
        groups: of channels; divides their number.
        eps: added to the variance.
        silu: apply SiLU at the end.

    Returns:
        as `x`; on CUDA channels-last.
    """
    if x.device.type != "cuda":
        return _finished(_moved(x, shift), weight, bias, groups, eps, silu)
    from trexport.models.fused.kernels.group_norm import normalised

    return normalised(x, None, shift, None, weight, bias, groups, eps, silu, keep=False)[1]


@triton_op("trexport::joined_group_norm", mutates_args={})
def joined_group_norm(
    x: Tensor,
    skip: Tensor | None,
    shift: Tensor | None,
    other: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """`joined = cat([x + skip + shift, other], 1)` and `silu(group_norm(joined))`, on CUDA in one pass over the inputs.

    Args:
        x, groups, eps, silu: as of `group_norm`.
        skip: as `x`, or None.
        shift: (batch, channels of x), rows of any stride, or (channels of x,), or None.
        other: (batch, more channels, height, width), or None.
        weight, bias: (all channels,).

    Returns:
        both (batch, all channels, height, width); on CUDA channels-last.
    """
    if x.device.type != "cuda":
        joined = _moved(x if skip is None else x + skip, shift)
        joined = joined.clone() if other is None else torch.cat([joined, other], 1)  # an output is no input
        return joined, _finished(joined, weight, bias, groups, eps, silu)
    from trexport.models.fused.kernels.group_norm import normalised

    joined, out = normalised(x, skip, shift, other, weight, bias, groups, eps, silu, keep=True)
    assert joined is not None
    return joined, out


def _moved(x: Tensor, shift: Tensor | None) -> Tensor:
    return x if shift is None else x + shift[..., None, None]


def _finished(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    x = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(x) if silu else x


@triton_op("trexport::linear_residual", mutates_args={})
def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """`x @ weight.T + bias + residual`.

    Args:
        x: (…, in), float16 or bfloat16 on CUDA.
        weight: (out, in), dense.
        bias: (out,), or None.
        residual: (…, out).

    Returns:
        (…, out).
    """
    if x.device.type != "cuda":
        return F.linear(x, weight, bias) + residual
    from trexport.models.fused.kernels.linear import product

    return product(x, weight, bias, residual, gated=False)


@triton_op("trexport::linear_geglu", mutates_args={})
def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`values * gelu(gates)`, where `values` and `gates` are the halves of `x @ weight.T + bias`.

    Args:
        x: (…, in), float16 or bfloat16 on CUDA.
        weight: (2·out, in), dense.
        bias: (2·out,), or None.

    Returns:
        (…, out).
    """
    if x.device.type != "cuda":
        values, gates = F.linear(x, weight, bias).chunk(2, dim=-1)
        return values * F.gelu(gates)
    from trexport.models.fused.kernels.linear import product

    return product(x, weight, bias, None, gated=True)
