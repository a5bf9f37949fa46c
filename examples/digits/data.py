"""The data set: scikit-learn's digits at 16x16 in three styles, and the fixed codes that stand for prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import ndimage
from scipy.linalg import hadamard
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

IMAGE_SIZE = 16
STYLES = ("plain", "outline", "slant")
PROMPTS = (*(f"digit {digit}" for digit in range(10)), "")
EMPTY_PROMPT = len(PROMPTS) - 1
CODE_SIZE = 32
SLANT_DEGREES = 28.0

_FINE = 64  # every style is drawn at 64x64, then averaged down to 16x16
_FINE_PER_PIXEL = _FINE // IMAGE_SIZE


def prompt_codes() -> torch.Tensor:
    """Embeddings (11, 3, 32) of the prompts "digit 0" .. "digit 9" and "": the tokens [start, digit or blank, end].

    Each token is the sum of two rows of a Sylvester Hadamard matrix, one for its meaning and one for its position,
    scaled to unit variance. Distinct rows are orthogonal: no digit is nearer to the unseen 9 than any other.
    """
    rows = torch.from_numpy(hadamard(CODE_SIZE)).float()
    start, end, blank, first_digit, first_position = 1, 2, 3, 4, 16
    middles = [first_digit + digit for digit in range(10)] + [blank]
    tokens = torch.tensor([[start, middle, end] for middle in middles])
    return (rows[tokens] + rows[first_position : first_position + 3]) / 2**0.5


def _plain(fine: np.ndarray) -> np.ndarray:
    """Strokes as written, (N, 64, 64) -> (N, 64, 64), with a little more contrast."""
    return np.clip((fine - 0.1) / 0.7, 0, 1)


def _outline(fine: np.ndarray) -> np.ndarray:
    """Contours of the strokes: the morphological gradient (dilation minus erosion) of the sharpened image."""
    sharp = np.clip((fine - 0.2) / 0.4, 0, 1)
    return ndimage.grey_dilation(sharp, size=(1, 5, 5)) - ndimage.grey_erosion(sharp, size=(1, 5, 5))


def _slant(fine: np.ndarray) -> np.ndarray:
    """The plain image sheared about its centre, the top moved to the right by 28 degrees."""
    matrix = np.array([[1.0, 0.0], [np.tan(np.radians(SLANT_DEGREES)), 1.0]])
    centre = np.full(2, (_FINE - 1) / 2)
    offset = centre - matrix @ centre
    shear: Any = ndimage.affine_transform  # its declared types allow one number as the offset, its code a vector
    return np.stack([shear(image, matrix, offset, order=1) for image in _plain(fine)])


def load_images(style: str, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 1, 16, 16) in [-1, 1] and labels (N,) of all ten digits; `split` is "train" (80 %) or "test"."""
    digits: Any = load_digits()
    train, test = train_test_split(np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)
    chosen = {"train": train, "test": test}[split]
    padded = np.pad(digits.images[chosen] / 16.0, ((0, 0), (1, 1), (1, 1)))
    zoom = _FINE / padded.shape[-1]
    enlarge: Any = ndimage.zoom
    fine = np.stack([enlarge(image, zoom, order=3, mode="grid-constant", grid_mode=True) for image in padded])
    drawn = {"plain": _plain, "outline": _outline, "slant": _slant}[style](fine)
    blocks = drawn.reshape(-1, IMAGE_SIZE, _FINE_PER_PIXEL, IMAGE_SIZE, _FINE_PER_PIXEL)
    images = torch.from_numpy(blocks.mean(axis=(2, 4))).float().unsqueeze(1)
    return images * 2 - 1, torch.from_numpy(digits.target[chosen])
