"""Magnitudes: the gain in `W' = diag(gain)·(W0·T + Δ)`. A new one is one file here, one line in `MAGNITUDES`, one factory in
the tests."""

from trlora.magnitudes.base import AbstractMagnitude as AbstractMagnitude
from trlora.magnitudes.base import MagnitudeSpec as MagnitudeSpec
from trlora.magnitudes.none import NoMagnitude as NoMagnitude
from trlora.magnitudes.none import NoMagnitudeSpec as NoMagnitudeSpec
from trlora.magnitudes.norm import NormMagnitude as NormMagnitude
from trlora.magnitudes.norm import NormMagnitudeSpec as NormMagnitudeSpec
from trlora.magnitudes.scale import ScaleMagnitude as ScaleMagnitude
from trlora.magnitudes.scale import ScaleMagnitudeSpec as ScaleMagnitudeSpec

MAGNITUDES: dict[str, type[MagnitudeSpec]] = {
    "none": NoMagnitudeSpec,
    "norm": NormMagnitudeSpec,
    "scale": ScaleMagnitudeSpec,
}
