"""The pictures of the study as one file, so that training needs neither scikit-learn nor SciPy."""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DIGITS = Path(__file__).parents[1] / "digits"
NEW_DIGIT = 9
"""The digit that the base has never seen."""
EMPTY_PROMPT = 10
SUBJECT_POOL = 80
"""So many of the new digit's training pictures are there to draw the few from; the others choose the learning rates."""


@dataclass(frozen=True)
class Split:
    """Pictures (N, 1, 16, 16) in [-1, 1], their outlines in the same order, and their digits (N,)."""

    plain: Tensor
    outline: Tensor
    labels: Tensor

    def where(self, mask: Tensor) -> Split:
        """Those that the mask (N,) or the indices choose."""
        return Split(self.plain[mask], self.outline[mask], self.labels[mask])

    def replaced_by(self, other: Split, mask: Tensor) -> Split:
        """These, but of another split of the same size where the mask (N,) says so."""
        picture = mask[:, None, None, None]
        return Split(
            self.plain.where(~picture, other.plain),
            self.outline.where(~picture, other.outline),
            self.labels.where(~mask, other.labels),
        )

    @property
    def seen(self) -> Split:
        """The digits that the base knows."""
        return self.where(self.labels != NEW_DIGIT)

    @property
    def new(self) -> Split:
        """The digit that it does not."""
        return self.where(self.labels == NEW_DIGIT)


def write_pictures(path: Path) -> None:
    """Both styles of scikit-learn's digits as examples/digits draws them, with its split."""
    sys.path.append(str(DIGITS))
    load_images = importlib.import_module("data").load_images
    arrays = {}
    for split in ("train", "test"):
        for style in ("plain", "outline"):
            images, labels = load_images(style, split)
            arrays[f"{split}_{style}"] = images.numpy()
            arrays[f"{split}_labels"] = labels.numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)


def read_pictures(path: Path) -> tuple[Split, Split]:
    """The training and the test pictures; the file is made where it is missing (that needs scikit-learn)."""
    if not path.exists():
        write_pictures(path)
    with np.load(path) as arrays:
        train, test = [
            Split(*(torch.from_numpy(arrays[f"{split}_{part}"]) for part in ("plain", "outline", "labels")))
            for split in ("train", "test")
        ]
    return train, test


def halves(split: Split) -> tuple[Split, Split]:
    """Every second picture, and the others: the first choose learning rates, the second are reported."""
    index = torch.arange(len(split.labels))
    return split.where(index % 2 == 0), split.where(index % 2 == 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="the .npz file to write")
    write_pictures(parser.parse_args().path)
