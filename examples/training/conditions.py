"""Pictures that control: Canny's edges (IEEE PAMI 8(6), 1986), or pictures given."""

from __future__ import annotations

import torch
from images import pixels
from PIL import Image
from torch import Tensor
from torch.nn import functional

LOW, HIGH = 100.0, 200.0
"""Of the gradient's length on levels 0 to 255, in Sobel's scale, as ControlNet's demonstration has them."""

_BLUR = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
_SOBEL = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])


def canny(picture: Image.Image, low: float = LOW, high: float = HIGH) -> Tensor:
    """Edges of a picture's brightness: (height, width), uint8, 255 where there is one.

    Blur (five binomial weights), Sobel gradients, the largest along the gradient's direction (of four), and of those from
    `low` on the ones that hang together with one from `high` on.
    """
    grey = pixels(picture.convert("RGB")).float()
    grey = (0.299 * grey[0] + 0.587 * grey[1] + 0.114 * grey[2])[None, None]
    grey = _filtered(_filtered(grey, _BLUR[None, :]), _BLUR[:, None])
    across, down = _filtered(grey, _SOBEL)[0, 0], _filtered(grey, _SOBEL.T)[0, 0]
    length = torch.hypot(across, down)
    thin = torch.where(_is_largest(length, across, down), length, 0.0)
    edges, candidates = thin >= high, thin >= low
    while True:
        near = functional.max_pool2d(edges[None, None].float(), 3, stride=1, padding=1)[0, 0] > 0
        grown = near & candidates
        if torch.equal(grown, edges):
            return edges.to(torch.uint8) * 255
        edges = grown


def _filtered(image: Tensor, kernel: Tensor) -> Tensor:
    height, width = kernel.shape
    padded = functional.pad(image, (width // 2, width // 2, height // 2, height // 2), mode="replicate")
    return functional.conv2d(padded, kernel[None, None])


def _is_largest(length: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Whether no neighbour in the gradient's direction is longer; of two equal ones the later is taken."""
    around = functional.pad(length[None, None], (1, 1, 1, 1), mode="constant")[0, 0]
    height, width = length.shape

    def at(y: int, x: int) -> Tensor:
        return around[1 + y : 1 + y + height, 1 + x : 1 + x + width]

    slope = torch.atan2(down, across).remainder(torch.pi)
    sector = (slope / (torch.pi / 4)).round().long() % 4
    result = torch.zeros_like(length, dtype=torch.bool)
    for number, (y, x) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        largest = (length > at(y, x)) & (length >= at(-y, -x))
        result |= (sector == number) & largest
    return result


def as_control(values: Tensor) -> Tensor:
    """uint8 pixels (height, width) or (3, height, width) → (3, height, width) in [0, 1], as a ControlNet takes it."""
    values = values.float() / 255
    return values.expand(3, -1, -1).contiguous() if values.dim() == 2 else values
