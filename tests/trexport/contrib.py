"""ONNX Runtime's operators, of which most have kernels on CUDA only, by their descriptions in its docs/ContribOperators.md,
computed by torch in float64: an oracle that ONNX's reference evaluator takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor
from torch.nn import functional as F


def wide(value: Any) -> Tensor:
    return torch.from_numpy(np.array(value)).double()


def narrow(value: Tensor, like: Any) -> np.ndarray:
    return value.contiguous().numpy().astype(like.dtype)


def first(value: Any) -> Tensor:
    """(N, C, H, W) of (N, H, W, C)."""
    return wide(value).permute(0, 3, 1, 2)


class _Contrib(OpRun):
    op_domain = "com.microsoft"


class GroupNorm(_Contrib):
    def _run(self, x, gamma, beta, activation, channels_last, epsilon, groups):  # type: ignore[no-untyped-def]
        assert channels_last == 1
        assert gamma.dtype == beta.dtype == np.float32
        return (narrow(_normalised(first(x), gamma, beta, activation, epsilon, groups), x),)


class SkipGroupNorm(_Contrib):
    def _run(self, x, gamma, beta, skip, bias=None, activation=0, channels_last=1, epsilon=1e-5, groups=1):  # type: ignore[no-untyped-def]
        assert channels_last == 1
        assert skip.shape in (x.shape, (x.shape[0], 1, 1, x.shape[3]), (x.shape[0], x.shape[3]))
        assert bias is None or bias.shape == x.shape[-1:]
        added = wide(skip)[:, None, None, :] if skip.ndim == 2 else wide(skip)
        total = wide(x) + added + (0 if bias is None else wide(bias))
        y = _normalised(total.permute(0, 3, 1, 2), gamma, beta, activation, epsilon, groups)
        return narrow(y, x), narrow(total, x)


def _normalised(image: Tensor, gamma: Any, beta: Any, activation: int, epsilon: float, groups: int) -> Tensor:
    y = F.group_norm(image, groups, wide(gamma), wide(beta), epsilon)
    return (F.silu(y) if activation == 1 else y).permute(0, 2, 3, 1)


class NhwcConv(_Contrib):
    def _run(  # type: ignore[no-untyped-def]
        self, x, w, b=None, auto_pad=None, dilations=(1, 1), group=1, kernel_shape=(), pads=(0, 0, 0, 0), strides=(1, 1)
    ):
        assert auto_pad in (None, "NOTSET")
        assert pads[:2] == pads[2:]
        weight = first(w)  # (M, kH, kW, C / group)
        assert list(weight.shape[2:]) == list(kernel_shape)
        bias = None if b is None else wide(b)
        y = F.conv2d(first(x), weight, bias, tuple(strides), tuple(pads[:2]), tuple(dilations), group or 1)
        return (narrow(y.permute(0, 2, 3, 1), x),)


class BiasSplitGelu(_Contrib):
    def _run(self, x, bias):  # type: ignore[no-untyped-def]
        assert x.ndim == 3
        left, right = (wide(x) + wide(bias)).chunk(2, dim=-1)
        return (narrow(left * F.gelu(right), x),)


class BiasAdd(_Contrib):
    def _run(self, x, bias, skip):  # type: ignore[no-untyped-def]
        assert x.shape == skip.shape
        assert bias.shape == x.shape[-1:]
        return (narrow(wide(x) + wide(bias) + wide(skip), x),)


class SkipLayerNormalization(_Contrib):
    def _run(self, x, skip, gamma, beta, bias=None, epsilon=1e-5):  # type: ignore[no-untyped-def]
        assert skip.shape in (x.shape, (1, *x.shape[1:]), x.shape[1:])
        assert bias is None or bias.shape == x.shape[-1:]
        total = wide(x) + wide(skip) + (0 if bias is None else wide(bias))
        y = F.layer_norm(total, total.shape[-1:], wide(gamma), wide(beta), epsilon)
        nothing = np.zeros(0, dtype=np.float32)
        return narrow(y, x), nothing, nothing, narrow(total, x)


class MultiHeadAttention(_Contrib):
    def _run(self, query, key, value, num_heads, mask_filter_value=None, scale=None, unidirectional=None):  # type: ignore[no-untyped-def]
        assert not unidirectional
        q, k, v = (wide(part).unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in (query, key, value))
        y = F.scaled_dot_product_attention(q, k, v, scale=scale or None)
        return (narrow(y.transpose(1, 2).flatten(-2), query),)


OPERATORS: list[type[OpRun]] = [
    GroupNorm,
    SkipGroupNorm,
    NhwcConv,
    BiasSplitGelu,
    BiasAdd,
    SkipLayerNormalization,
    MultiHeadAttention,
]


def evaluated(model: onnx.ModelProto, feeds: dict[str, Tensor]) -> list[Tensor]:
    """The outputs, by ONNX's reference evaluator."""
    results = ReferenceEvaluator(model, new_ops=OPERATORS).run(None, {k: v.numpy() for k, v in feeds.items()})
    return [torch.from_numpy(np.array(result)) for result in results]
