"""Residuals: the Δ in `W' = W0·T + Δ`. A new one is one file here, one line in `RESIDUALS`, one factory in the tests."""

from trlora.residuals.base import AbstractResidual as AbstractResidual
from trlora.residuals.base import ResidualSpec as ResidualSpec
from trlora.residuals.hadamard import HadamardResidual as HadamardResidual
from trlora.residuals.hadamard import HadamardResidualSpec as HadamardResidualSpec
from trlora.residuals.kronecker import KroneckerResidual as KroneckerResidual
from trlora.residuals.kronecker import KroneckerResidualSpec as KroneckerResidualSpec
from trlora.residuals.low_rank import LowRankResidual as LowRankResidual
from trlora.residuals.low_rank import LowRankResidualSpec as LowRankResidualSpec
from trlora.residuals.none import NoResidual as NoResidual
from trlora.residuals.none import NoResidualSpec as NoResidualSpec
from trlora.residuals.tensor_ring import TensorRingResidual as TensorRingResidual
from trlora.residuals.tensor_ring import TensorRingResidualSpec as TensorRingResidualSpec

RESIDUALS: dict[str, type[ResidualSpec]] = {
    "none": NoResidualSpec,
    "low_rank": LowRankResidualSpec,
    "hadamard": HadamardResidualSpec,
    "kronecker": KroneckerResidualSpec,
    "tensor_ring": TensorRingResidualSpec,
}
