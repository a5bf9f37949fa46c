"""How each transform is fitted: where it starts, and a step that never makes the fit worse.

What is asked of a transform T, the residual being held, is `‖target − W0·T‖_F` small; all that it needs to know of the
weights are `gram = W0ᵀ·W0` and `cross = W0ᵀ·target`. A member that is not here is fitted by L-BFGS.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trlora.cayley import upper_of
from trlora.fit.closed import matrix_ring_svd, reduced_rank, rotation, skew_of_rotation
from trlora.fit.ring import sweep_transform_
from trlora.ring import ranks_of
from trlora.transforms import (
    AbstractTransform,
    BlockOrthogonalTransform,
    DiagonalTransform,
    IdentityTransform,
    LowRankTransform,
    TensorRingTransform,
)

Step = Callable[[Tensor, Tensor], None]
"""(gram, cross): change the member in place."""

_NEAR = 0.1
"""How far the cores of a ring start from those of the identity."""


def step_of(member: AbstractTransform) -> Step | None:
    """The step of a member, None where it has none. Steps of all but the ring's are optima."""
    if isinstance(member, IdentityTransform):
        return lambda gram, cross: None
    if isinstance(member, DiagonalTransform):
        return lambda gram, cross: _scale_(member, gram, cross)
    if isinstance(member, BlockOrthogonalTransform) and member.neumann_terms is None:
        return lambda gram, cross: _rotate_(member, cross)
    if isinstance(member, LowRankTransform):
        return lambda gram, cross: _low_rank_(member, gram, cross)
    if isinstance(member, TensorRingTransform):
        return lambda gram, cross: sweep_transform_([core.data for core in member.core], gram, cross)
    return None


def solve_(member: AbstractTransform, gram: Tensor, cross: Tensor, generator: torch.Generator) -> None:
    """Set a member that has a step by itself, as if there were no residual."""
    if isinstance(member, TensorRingTransform):
        modes = [core.shape[0] for core in member.core]
        best = _least_change(gram, cross)
        for core, found in zip(
            member.core, matrix_ring_svd(best, modes, ranks_of(list(member.core)), generator), strict=True
        ):
            core.data.copy_(found)
    step = step_of(member)
    assert step is not None
    step(gram, cross)


def near_identity_(member: AbstractTransform, generator: torch.Generator) -> None:
    """Let a member that is at its start be able to move: the slices of a ring start equal, and would stay equal."""
    if isinstance(member, TensorRingTransform):
        for core in member.core:
            noise = torch.randn(core.shape, generator=generator, dtype=core.dtype)
            core.data += noise * (_NEAR * float(core.data.abs().max()))


def _least_change(gram: Tensor, cross: Tensor) -> Tensor:
    """The T that is best without any form, and of those the nearest to the identity: `I + W0⁺·(target − W0)`."""
    eye = torch.eye(len(gram), dtype=gram.dtype)
    damped = gram + eye * (1e-8 * float(gram.diagonal().mean()) + torch.finfo(gram.dtype).tiny)
    return eye + torch.linalg.solve(damped, cross - gram)


def _scale_(member: DiagonalTransform, gram: Tensor, cross: Tensor) -> None:
    shape = (len(member.scale), member.taps)
    top, bottom = (matrix.diagonal().reshape(shape).sum(1) for matrix in (cross, gram))
    seen = bottom > 0  # an input without any weight may keep its scale
    member.scale.data[seen] = top[seen] / bottom[seen]


def _low_rank_(member: LowRankTransform, gram: Tensor, cross: Tensor) -> None:
    rank, channels = member.lora_A.weight.shape
    # every tap of a kernel has its own weights and its own outputs, and one map for all of them
    shape = (channels, member.taps) * 2
    own, wanted = (matrix.reshape(shape).diagonal(dim1=1, dim2=3).sum(-1) for matrix in (gram, cross - gram))
    left, right = reduced_rank(own, wanted, rank)
    member.lora_B.weight.data.copy_(left / member.scaling)
    member.lora_A.weight.data.copy_(right.T)


def _rotate_(member: BlockOrthogonalTransform, cross: Tensor) -> None:
    size = member.block_size
    count = member.features // size
    places = torch.arange(count)
    blocks = cross.view(count, size, count, size)[places, :, places, :]
    if member.shared:
        blocks = blocks.sum(0, keepdim=True)
    skew = upper_of(skew_of_rotation(rotation(blocks)))
    before = member.skew.data.clone()

    def met() -> Tensor:
        own = member.blocks()[: len(blocks)]
        return (own * blocks).sum((1, 2))

    old = met()
    member.skew.data.copy_(skew)
    worse = ~(met() >= old)  # near half a turn the Cayley map loses digits
    member.skew.data[worse] = before[worse]
