"""Transforms: the T in `W' = W0·T + Δ`. A new one is one file here, one line in `TRANSFORMS`, one factory in the tests."""

from trlora.transforms.base import AbstractTransform as AbstractTransform
from trlora.transforms.base import TransformSpec as TransformSpec
from trlora.transforms.block_orthogonal import BlockOrthogonalTransform as BlockOrthogonalTransform
from trlora.transforms.block_orthogonal import BlockOrthogonalTransformSpec as BlockOrthogonalTransformSpec
from trlora.transforms.butterfly import ButterflyTransform as ButterflyTransform
from trlora.transforms.butterfly import ButterflyTransformSpec as ButterflyTransformSpec
from trlora.transforms.diagonal import DiagonalTransform as DiagonalTransform
from trlora.transforms.diagonal import DiagonalTransformSpec as DiagonalTransformSpec
from trlora.transforms.householder import HouseholderTransform as HouseholderTransform
from trlora.transforms.householder import HouseholderTransformSpec as HouseholderTransformSpec
from trlora.transforms.identity import IdentityTransform as IdentityTransform
from trlora.transforms.identity import IdentityTransformSpec as IdentityTransformSpec
from trlora.transforms.low_rank import LowRankTransform as LowRankTransform
from trlora.transforms.low_rank import LowRankTransformSpec as LowRankTransformSpec
from trlora.transforms.tensor_ring import TensorRingTransform as TensorRingTransform
from trlora.transforms.tensor_ring import TensorRingTransformSpec as TensorRingTransformSpec

TRANSFORMS: dict[str, type[TransformSpec]] = {
    "identity": IdentityTransformSpec,
    "diagonal": DiagonalTransformSpec,
    "block_orthogonal": BlockOrthogonalTransformSpec,
    "butterfly": ButterflyTransformSpec,
    "householder": HouseholderTransformSpec,
    "low_rank": LowRankTransformSpec,
    "tensor_ring": TensorRingTransformSpec,
}
