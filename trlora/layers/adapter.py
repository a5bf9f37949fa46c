"""The adapter of one layer: a transform of its input and a residual beside it."""

from __future__ import annotations

from typing import Self, final

import torch
from torch import nn

from trlora.errors import ShapeError
from trlora.residuals import AbstractResidual, NoResidual
from trlora.spec import AdapterSpec
from trlora.transforms import AbstractTransform, IdentityTransform


@final
class LayerAdapter(nn.Module):
    """T and Δ of one layer. Its `state_dict` keys are a checkpoint's keys less the layer's path."""

    def __init__(self, spec: AdapterSpec, transform: AbstractTransform, residual: AbstractResidual) -> None:
        super().__init__()
        self.spec = spec
        if transform.features != residual.in_features:
            raise ShapeError(
                f"the transform acts on {transform.features} features, the residual on {residual.in_features}"
            )
        self.transform = transform
        self.residual = residual

    @classmethod
    def from_spec(
        cls, spec: AdapterSpec, in_features: int, out_features: int, generator: torch.Generator | None = None
    ) -> Self:
        """The adapter at its start, where the adapted layer is the base layer."""
        transform = spec.transform.build(in_features, generator)
        return cls(spec, transform, spec.residual.build(in_features, out_features, generator))

    @classmethod
    def from_parts(
        cls,
        spec: AdapterSpec,
        transform: AbstractTransform | None,
        residual: AbstractResidual | None,
        in_features: int,
        out_features: int,
    ) -> Self:
        """From the parts that a checkpoint holds; a part without tensors (None) becomes the trivial member."""
        return cls(spec, transform or IdentityTransform(in_features), residual or NoResidual(in_features, out_features))

    @property
    def in_features(self) -> int:
        return self.residual.in_features

    @property
    def out_features(self) -> int:
        return self.residual.out_features

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the parameters, None for an adapter without any."""
        return next((parameter.dtype for parameter in self.parameters()), None)
