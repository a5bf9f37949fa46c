"""How far one tensor is from another: one function a measure, all in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def max_abs(found: Tensor, expected: Tensor) -> float:
    """The greatest absolute difference; NaN where either holds one."""
    return (found.double() - expected.double()).abs().max().item()


def relative_l2(found: Tensor, expected: Tensor) -> float:
    """`‖found − expected‖ / ‖expected‖`; Inf where only the reference is zero."""
    difference = torch.linalg.vector_norm(found.double() - expected.double()).item()
    norm = torch.linalg.vector_norm(expected.double()).item()
    if norm == 0:
        return 0.0 if difference == 0 else (math.nan if math.isnan(difference) else math.inf)
    return difference / norm


def cosine(found: Tensor, expected: Tensor) -> float:
    """The cosine of the angle between both, flattened."""
    a, b = found.double().flatten(), expected.double().flatten()
    scale = torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)
    return (torch.dot(a, b) / scale).item() if scale != 0 else float(bool((a == b).all()))


def psnr_db(found: Tensor, expected: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, over the range of the reference; Inf where both are equal."""
    a, b = found.double(), expected.double()
    error = (a - b).square().mean().item()
    if math.isnan(error):
        return math.nan
    peak = (b.max() - b.min()).item()
    if error == 0:
        return math.inf
    return 10 * math.log10(peak * peak / error) if peak > 0 else -math.inf
