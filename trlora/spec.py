"""What an adapter is, before any layer is known: transforms, a residual and a magnitude, each described by its own spec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar, final

from trlora.errors import SpecError, nearest
from trlora.magnitudes import MAGNITUDES, MagnitudeSpec, NoMagnitudeSpec
from trlora.residuals import RESIDUALS, NoResidualSpec, ResidualSpec
from trlora.transforms import TRANSFORMS, IdentityTransformSpec, TransformSpec

_Spec = TypeVar("_Spec", TransformSpec, ResidualSpec, MagnitudeSpec)

PARTS = ("transform", "residual", "magnitude", "output_transform")
"""The parts of an adapter, as checkpoints name them."""


@final
@dataclass(frozen=True)
class AdapterSpec:
    """One adapter's shape-independent description, `W' = diag(gain)·(Uᵀ·W0·T + Δ)`; the gain is one without a magnitude, U
    the identity without an output transform, which is any transform, on a layer's outputs.

    >>> AdapterSpec.from_dict({"residual": {"type": "low_rank", "rank": 4}}).to_dict()["transform"]
    {'type': 'identity'}
    """

    transform: TransformSpec
    residual: ResidualSpec
    magnitude: MagnitudeSpec = field(default_factory=NoMagnitudeSpec)
    output_transform: TransformSpec = field(default_factory=IdentityTransformSpec)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """From `{"transform": {"type": …, …}, "residual": …, "magnitude": …, "output_transform": …}`; a part left out is the
        trivial one.

        Raises:
            SpecError: an unknown part, type or field, or a wrong value.
        """
        for name in fields:
            if name not in PARTS:
                raise SpecError(f"adapter: unknown part {name!r}, expected {', '.join(map(repr, PARTS))}")
        return cls(
            transform=_read("transform", fields.get("transform", IdentityTransformSpec().to_dict()), TRANSFORMS),
            residual=_read("residual", fields.get("residual", NoResidualSpec().to_dict()), RESIDUALS),
            magnitude=_read("magnitude", fields.get("magnitude", NoMagnitudeSpec().to_dict()), MAGNITUDES),
            output_transform=_read(
                "output_transform", fields.get("output_transform", IdentityTransformSpec().to_dict()), TRANSFORMS
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `from_dict` reads; magnitude and output transform are in it only where there are some."""
        fields = {"transform": self.transform.to_dict(), "residual": self.residual.to_dict()}
        if not isinstance(self.magnitude, NoMagnitudeSpec):
            fields["magnitude"] = self.magnitude.to_dict()
        if not isinstance(self.output_transform, IdentityTransformSpec):
            fields["output_transform"] = self.output_transform.to_dict()
        return fields


def _read(part: str, fields: Any, registry: Mapping[str, type[_Spec]]) -> _Spec:
    if not isinstance(fields, Mapping) or not isinstance(fields.get("type"), str):
        raise SpecError(f'{part}: {fields!r} given, expected an object with "type", one of {sorted(registry)}')
    kind = fields["type"]
    if kind not in registry:
        raise SpecError(f"{part}: unknown type {kind!r}, expected one of {sorted(registry)}{nearest(kind, registry)}")
    return registry[kind].from_dict({name: value for name, value in fields.items() if name != "type"})
