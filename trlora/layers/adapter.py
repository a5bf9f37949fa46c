"""The adapter of one layer: transforms of its input and output, a residual beside it, and a magnitude of its output."""

from __future__ import annotations

from typing import Self, final

import torch
from torch import Tensor, nn

from trlora.errors import ShapeError
from trlora.magnitudes import AbstractMagnitude, NoMagnitude
from trlora.residuals import AbstractResidual, NoResidual
from trlora.spec import AdapterSpec
from trlora.transforms import AbstractTransform, IdentityTransform


@final
class LayerAdapter(nn.Module):
    """T, U, Δ and gain of one layer, `W' = diag(gain)·(Uᵀ·W0·T + Δ)`, W0 being the layer's weight as a matrix: of a
    convolution (out, in/groups·height·width), flattened as torch does it. Its `state_dict` keys are a checkpoint's keys less
    the layer's path."""

    def __init__(
        self,
        spec: AdapterSpec,
        transform: AbstractTransform,
        residual: AbstractResidual,
        magnitude: AbstractMagnitude | None = None,
        output_transform: AbstractTransform | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        if transform.features != residual.in_features:
            raise ShapeError(
                f"the transform acts on {transform.features} features, the residual on {residual.in_features}"
            )
        self.transform = transform
        self.residual = residual
        self.magnitude = NoMagnitude(residual.out_features) if magnitude is None else magnitude
        if self.magnitude.out_features != residual.out_features:
            raise ShapeError(
                f"the magnitude is for {self.magnitude.out_features} outputs, the residual for {residual.out_features}"
            )
        self.output_transform = output_transform or IdentityTransform(residual.out_features)
        if self.output_transform.features != residual.out_features:
            raise ShapeError(
                f"the output transform is for {self.output_transform.features} outputs, the residual for "
                f"{residual.out_features}"
            )

    @classmethod
    def from_spec(
        cls,
        spec: AdapterSpec,
        in_features: int,
        out_features: int,
        generator: torch.Generator | None = None,
        weight: Tensor | None = None,
    ) -> Self:
        """The adapter at its start, where the adapted layer is the base layer.

        Args:
            weight: W0 as a matrix, (out_features, in_features); some magnitudes start from it.
        """
        transform = spec.transform.build(in_features, generator)
        residual = spec.residual.build(in_features, out_features, generator)
        turn = spec.output_transform.build(out_features, generator)
        return cls(spec, transform, residual, spec.magnitude.build(out_features, weight), turn)

    @classmethod
    def from_parts(
        cls,
        spec: AdapterSpec,
        transform: AbstractTransform | None,
        residual: AbstractResidual | None,
        in_features: int,
        out_features: int,
        magnitude: AbstractMagnitude | None = None,
        output_transform: AbstractTransform | None = None,
    ) -> Self:
        """From the parts that a checkpoint holds; a part without tensors (None) becomes the trivial member."""
        transform, residual = (
            transform or IdentityTransform(in_features),
            residual or NoResidual(in_features, out_features),
        )
        return cls(spec, transform, residual, magnitude, output_transform)

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

    @property
    def outside(self) -> bool:
        """Whether something stands outside of the layer's own product: it cannot be told from activations before it."""
        return not (self.magnitude.trivial and self.output_transform.trivial)

    def change(self, weight: Tensor) -> Tensor | None:
        """`diag(gain)·(Uᵀ·W0·T + Δ) − W0`, a new tensor; None where no part changes anything.

        Args:
            weight: W0 as a matrix. T, U, Δ and gain are computed in the dtype and on the device of the parameters, sums in
                the weight's.
        """
        change = self._inner_change(weight)
        if self.magnitude.trivial:
            return change
        whole = weight if change is None else weight + change
        gain = self.magnitude.gain(lambda: _like(whole, self.magnitude)).to(weight)
        return gain[:, None] * whole - weight

    def whole(self, weight: Tensor) -> Tensor:
        """`diag(gain)·(Uᵀ·W0·T + Δ)` by plain products, which can be differentiated and vectorised (`torch.vmap`).

        Args:
            weight: W0 as a matrix, in the dtype of the parameters.
        """
        found = weight if self.transform.trivial else self.transform.multiply(weight)
        if not self.output_transform.trivial:
            found = self.output_transform.multiply(found.T).T
        if not self.residual.trivial:
            found = found + self.residual.delta()
        return found if self.magnitude.trivial else self.magnitude.gain(lambda: found)[:, None] * found

    def gain(self, weight: Tensor) -> Tensor:
        """The gain of every output, (out_features,), on the layer whose weight as a matrix is given."""

        def whole() -> Tensor:
            change = self._inner_change(weight)
            return _like(weight if change is None else weight + change, self.magnitude)

        return self.magnitude.gain(whole)

    def _inner_change(self, weight: Tensor) -> Tensor | None:
        """`Uᵀ·W0·T − W0 + Δ`."""
        change: Tensor | None = None
        if not self.transform.trivial:
            change = self.transform.change(_like(weight, self.transform)).to(weight)
        if not self.output_transform.trivial:
            moved = weight if change is None else weight + change
            # U on the outputs is to the transposed weight what T on the inputs is to the weight
            turned = self.output_transform.change(_like(moved.T, self.output_transform)).T.to(weight)
            change = turned.contiguous() if change is None else change + turned
        if not self.residual.trivial:
            change = self.residual.delta().to(weight) if change is None else self.residual.add_to(change)
        return change


def _like(weight: Tensor, member: nn.Module) -> Tensor:
    parameter = next(member.parameters())
    return weight.to(parameter.device, parameter.dtype)
