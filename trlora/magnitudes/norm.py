"""Norms of rows that are trained apart from their directions: DoRA (arXiv 2402.09353)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor, nn

from trlora.errors import SpecError
from trlora.fields import check_known
from trlora.magnitudes.base import AbstractMagnitude
from trlora.tensors import take


@final
class NormMagnitude(AbstractMagnitude):
    """`gain = norm / ‖W0·T + Δ‖`, row by row: every row of the adapted weight has the length that `norm` (out,) says.

    The denominator is held constant in the gradient, as the paper proposes (section 4.3) and PEFT does.
    """

    def __init__(self, norm: Tensor) -> None:
        super().__init__()
        self.out_features = norm.shape[0]
        self.norm = nn.Parameter(norm)

    def gain(self, weight: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            found = torch.linalg.vector_norm(weight(), dim=1)
            found = found.masked_fill(found == 0, 1)  # a row of zeros has no direction, and stays one
        return self.norm / found


@final
@dataclass(frozen=True)
class NormMagnitudeSpec:
    """`{"type": "norm"}`; checkpoint key `norm` (out,)."""

    type: ClassVar[str] = "norm"

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        check_known("norm magnitude", fields, ())
        return cls()

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type}

    def build(self, out_features: int, weight: Tensor | None = None) -> NormMagnitude:
        if weight is None:
            raise SpecError("norm magnitude: starts from the norms of the base weight, which is not given here")
        return NormMagnitude(torch.linalg.vector_norm(weight.detach().float(), dim=1))

    def from_tensors(self, tensors: dict[str, Tensor]) -> NormMagnitude:
        return NormMagnitude(take(tensors, "norm", dims=1))
