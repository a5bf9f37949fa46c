"""Custom ONNX operators, domain `ai.trlora` version 1: model-local functions with bodies of plain operators.

A new member is one file here and one line in a registry; see `trexport.graph.ops.linear` for the operator itself.
"""

from trexport.graph.ops.base import MagnitudeOp as MagnitudeOp
from trexport.graph.ops.base import MemberOp as MemberOp
from trexport.graph.ops.base import ResidualOp as ResidualOp
from trexport.graph.ops.base import TransformOp as TransformOp
from trexport.graph.ops.block_orthogonal import BlockOrthogonalOp
from trexport.graph.ops.butterfly import ButterflyOp
from trexport.graph.ops.diagonal import DiagonalOp
from trexport.graph.ops.hadamard import HadamardOp
from trexport.graph.ops.householder import HouseholderOp
from trexport.graph.ops.kronecker import KroneckerOp
from trexport.graph.ops.low_rank import LowRankOp
from trexport.graph.ops.low_rank_transform import LowRankTransformOp
from trexport.graph.ops.norm import NormOp
from trexport.graph.ops.scale import ScaleOp
from trexport.graph.ops.tensor_ring_residual import TensorRingResidualOp
from trexport.graph.ops.tensor_ring_transform import TensorRingTransformOp

DOMAIN = "ai.trlora"
VERSION = 1

TRANSFORM_OPS: dict[str, type[TransformOp]] = {
    op.type: op
    for op in (TensorRingTransformOp, DiagonalOp, BlockOrthogonalOp, ButterflyOp, HouseholderOp, LowRankTransformOp)
}
RESIDUAL_OPS: dict[str, type[ResidualOp]] = {
    op.type: op for op in (TensorRingResidualOp, LowRankOp, HadamardOp, KroneckerOp)
}
MAGNITUDE_OPS: dict[str, type[MagnitudeOp]] = {op.type: op for op in (NormOp, ScaleOp)}
