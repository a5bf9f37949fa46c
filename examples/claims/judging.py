"""What independent judges say of the pictures that the runs drew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from pictures import NEW_DIGIT, Split, halves, read_pictures
from sklearn.svm import SVC
from torch import Tensor


def overlap(drawn: Tensor, wanted: Tensor) -> float:
    """Pixel agreement, the mean over pictures of |A∩B| / |A∪B|, A and B the pixels brighter than mid-grey.

    Args:
        drawn, wanted: (N, 1, 16, 16) in [-1, 1]. Two pictures without a bright pixel agree.
    """
    a, b = drawn > 0, wanted > 0
    both, either = (a & b).sum((1, 2, 3)), (a | b).sum((1, 2, 3))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0).mean().item()


class Judging:
    """The measures of both tasks, in words that the tables use.

    Digits are read by the judge of examples/digits: a support vector machine fitted to real training pictures of all ten
    digits, never to drawn ones.
    """

    def __init__(self, pictures: Path) -> None:
        train, test = read_pictures(pictures)
        self.reported: Split = halves(test.seen)[1]
        self._judge = SVC(C=10).fit(train.plain.flatten(1).numpy(), train.labels.numpy())

    def digits(self, images: Tensor) -> np.ndarray:
        """The digit (N,) that each picture (N, 1, 16, 16) shows."""
        return self._judge.predict(images.flatten(1).numpy())

    def measures(self, task: str, drawn: Tensor) -> dict[str, float]:
        """Of pictures (N, 1, 16, 16) in the order of `Study.drawn`.

        subject: the shares of the new digit's pictures read as it, and of the others' read as prompted. control: the overlap
        with the picture whose outline was given, and the share read as that picture's digit.
        """
        read = self.digits(drawn)
        if task == "control":
            agreement = overlap(drawn, self.reported.plain)
            return {"overlap": agreement, "digit": float((read == self.reported.labels.numpy()).mean())}
        half = len(drawn) // 2
        seen = np.repeat([digit for digit in range(10) if digit != NEW_DIGIT], half // 9)
        return {"new digit": float((read[:half] == NEW_DIGIT).mean()), "prior": float((read[half:] == seen).mean())}

    def references(self) -> dict[str, Any]:
        """What the measures of `control` say of other real pictures: of the same digit, and of any."""
        plain, labels = self.reported.plain, self.reported.labels
        same = [
            overlap(plain[i : i + 1].expand_as(others), others)
            for i in range(len(plain))
            if len(others := plain[(labels == labels[i]) & (torch.arange(len(plain)) != i)])
        ]
        any_other = [overlap(plain, plain.roll(shift, 0)) for shift in range(1, min(20, len(plain)))]
        return {
            "overlap, another picture of the digit": float(np.mean(same)),
            "overlap, another picture": float(np.mean(any_other)),
            "judge on real pictures": float((self.digits(plain) == labels.numpy()).mean()),
        }


def read_drawn(path: Path) -> Tensor:
    """A run's pictures (N, 1, 16, 16) in [-1, 1]."""
    with np.load(path) as arrays:
        return torch.from_numpy(arrays["pictures"])[:, None].float() / 127.5 - 1
