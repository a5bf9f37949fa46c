"""Judges that say what a picture shows: support vector machines fitted to real images only, never to drawn ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from data import STYLES, load_images
from sklearn.svm import SVC


def _pixels(images: torch.Tensor) -> np.ndarray:
    """Images (N, 1, 16, 16) as rows (N, 256)."""
    return images.flatten(1).numpy()


@dataclass(frozen=True)
class Judges:
    """One judge of the style, and for each style one judge of the digit (all ten digits, 9 included)."""

    style: SVC
    digit: dict[str, SVC]

    def styles(self, images: torch.Tensor) -> np.ndarray:
        """The style (N,) that each image (N, 1, 16, 16) is drawn in, as indices into STYLES."""
        return self.style.predict(_pixels(images))

    def digits(self, images: torch.Tensor, style: str) -> np.ndarray:
        """The digit (N,) that each image (N, 1, 16, 16) shows, read as an image of the given style."""
        return self.digit[style].predict(_pixels(images))


def fit_judges() -> Judges:
    """Fit all judges to the real training images."""
    real = {style: load_images(style, "train") for style in STYLES}
    pixels = np.concatenate([_pixels(images) for images, _ in real.values()])
    style_labels = np.repeat(np.arange(len(STYLES)), [len(labels) for _, labels in real.values()])
    return Judges(
        style=SVC(C=10).fit(pixels, style_labels),
        digit={style: SVC(C=10).fit(_pixels(images), labels.numpy()) for style, (images, labels) in real.items()},
    )


def accuracy_on_real_images(judges: Judges) -> dict[str, float]:
    """How often each judge is right about real images that it was not fitted to."""
    real = {style: load_images(style, "test") for style in STYLES}
    style_hits = [judges.styles(images) == STYLES.index(style) for style, (images, _) in real.items()]
    accuracy = {"style": float(np.concatenate(style_hits).mean())}
    for style, (images, labels) in real.items():
        accuracy[f"digit, {style}"] = float((judges.digits(images, style) == labels.numpy()).mean())
    return accuracy
