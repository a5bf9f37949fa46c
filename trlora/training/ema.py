"""A moving average of what is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class MovingAverage:
    """`average ← d·average + (1 − d)·value` after every step, in float32.

    d is `decay`, but `(1 + n) / (10 + n)` after n steps where that is less: the start is forgotten soon.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.decay = decay
        self.parameters = list(parameters)
        self.averages = [parameter.detach().float().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update_(self, step: int) -> None:
        """Take in what step `step`, counted from 0, has made of the parameters."""
        decay = min(self.decay, (1 + step) / (10 + step))
        # a thousand small ones in a few launches
        torch._foreach_lerp_(self.averages, [parameter.detach().float() for parameter in self.parameters], 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The averages in the parameters' place, for as long as the block runs."""
        kept = [parameter.detach().clone() for parameter in self.parameters]
        self._put(self.averages)
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
