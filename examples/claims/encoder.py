"""The condition encoder of the control task: two convolutions, the last one zero at the start, as in ControlNet."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

HIDDEN = 16
WIDTH = 32  # of the UNet after its first convolution
ENCODER_SHAPES = ((HIDDEN, 9), (HIDDEN,), (WIDTH, HIDDEN * 9), (WIDTH,))
ENCODER_PARAMETERS = sum(math.prod(shape) for shape in ENCODER_SHAPES)


def started_encoder(seed: int) -> list[Tensor]:
    """Weights and biases of both convolutions, kernels flattened: the first as `nn.Conv2d` starts, the second zero."""
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / 3  # 1 / √fan-in, of one channel and nine taps
    first = [torch.empty(shape).uniform_(-bound, bound, generator=generator) for shape in ENCODER_SHAPES[:2]]
    return first + [torch.zeros(shape) for shape in ENCODER_SHAPES[2:]]


def encode(parameters: Sequence[Tensor], condition: Tensor) -> Tensor:
    """conv 3x3, SiLU, conv 3x3, of each run's images with that run's parameters.

    As matrix products of patches, since a convolution with another kernel for each run is slow where there are many.

    Args:
        parameters: those of `started_encoder`, stacked over the runs.
        condition: (runs, B, 1, 16, 16).

    Returns:
        (runs·B, 32, 16, 16).
    """
    first, first_bias, second, second_bias = parameters
    runs, batch, _, height, width = condition.shape
    patches = functional.unfold(condition.flatten(0, 1), 3, padding=1).view(runs, batch, -1, height * width)
    hidden = functional.silu(first[:, None] @ patches + first_bias[:, None, :, None])
    hidden = hidden.reshape(runs * batch, -1, height, width)
    patches = functional.unfold(hidden, 3, padding=1).view(runs, batch, -1, height * width)
    hint = second[:, None] @ patches + second_bias[:, None, :, None]
    return hint.reshape(runs * batch, -1, height, width)
