"""How each residual is fitted: where it starts, and a step that never makes the fit worse.

What is asked of a residual Δ, the transform being held, is `‖target − Δ‖_F` small. A member that is not here is fitted by
L-BFGS.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trlora.fit.closed import kronecker_blocks, ring_svd, truncated_svd
from trlora.fit.ring import sweep_residual_
from trlora.fit.solve import improved
from trlora.residuals import (
    AbstractResidual,
    HadamardResidual,
    KroneckerResidual,
    LowRankResidual,
    NoResidual,
    TensorRingResidual,
)
from trlora.ring import ranks_of

Step = Callable[[Tensor], None]
"""(target): change the member in place."""


def step_of(member: AbstractResidual) -> Step | None:
    """The step of a member, None where it has none."""
    if isinstance(member, NoResidual):
        return lambda target: None
    if isinstance(member, LowRankResidual):
        return lambda target: _low_rank_step_(member, target)
    if isinstance(member, TensorRingResidual):
        rows, columns = ([core.data for core in cores] for cores in (member.row_core, member.column_core))
        return lambda target: sweep_residual_(target, rows, columns)
    if isinstance(member, KroneckerResidual) and not member.tucker:
        return lambda target: _kronecker_step_(member, target)
    if isinstance(member, HadamardResidual) and not member.tucker:
        return lambda target: _hadamard_step_(member, target)
    return None


def solve_(member: AbstractResidual, target: Tensor, generator: torch.Generator) -> None:
    """Set a member that has a step from nothing: the optimum where there is a closed form (low rank), a start elsewhere."""
    if isinstance(member, LowRankResidual):
        left, right = truncated_svd(target / member.scaling, member.lora_A.weight.shape[0])
        member.lora_B.weight.data.copy_(left)
        member.lora_A.weight.data.copy_(right.T)
    elif isinstance(member, TensorRingResidual):
        sides = (list(member.row_core), list(member.column_core))
        modes = tuple([core.shape[0] for core in cores] for cores in sides)
        found = ring_svd(target, (modes[0], modes[1]), ranks_of([*sides[0], *sides[1]]), generator)
        for cores, new in zip(sides, found, strict=True):
            for core, value in zip(cores, new, strict=True):
                core.data.copy_(value)
    elif isinstance(member, KroneckerResidual):
        blocks = kronecker_blocks(target / member.scaling, _shapes(member))
        first, second = truncated_svd(blocks, 1)
        _set_whole_(member, 1, first.reshape(_shapes(member)[0]))
        _set_whole_(member, 2, second.reshape(_shapes(member)[1]))
    elif isinstance(member, HadamardResidual):
        # the best of low rank, times ones: then both are free to move
        for (a, b), (left, right) in zip(
            _pairs(member), (truncated_svd(target / member.scaling, member.rank), _ones(member, generator)), strict=True
        ):
            a.copy_(left)
            b.copy_(right.T)
    step = step_of(member)
    assert step is not None
    if not isinstance(member, LowRankResidual):
        step(target)


def scatter_(member: AbstractResidual, target: Tensor, generator: torch.Generator) -> None:
    """Set a member whose fit depends on its start anywhere, as large as the target; others keep what `solve_` gave."""
    if isinstance(member, (TensorRingResidual, HadamardResidual)):
        parameters = list(member.parameters())
        for parameter in parameters:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        size = float(torch.linalg.vector_norm(target) / torch.linalg.vector_norm(member.delta()))
        for parameter in parameters:
            parameter.data *= size ** (1 / len(parameters))


def _low_rank_step_(member: LowRankResidual, target: Tensor) -> None:
    """One turn of subspace iteration: each factor is the optimum for the other."""
    a, b, wanted = member.lora_A.weight.data, member.lora_B.weight.data, target / member.scaling
    b.copy_(improved(a @ a.T, a @ wanted.T, b.T).T)
    a.copy_(improved(b.T @ b, b.T @ wanted, a))


def _shapes(member: KroneckerResidual) -> tuple[tuple[int, int], tuple[int, int]]:
    first, second = member.whole(1).shape, member.whole(2).shape
    return (first[0], first[1]), (second[0], second[1])


def _kronecker_step_(member: KroneckerResidual, target: Tensor) -> None:
    """Each matrix is the optimum for the other; where it is kept in two factors, the nearest of their rank to that, which
    is then the optimum."""
    blocks = kronecker_blocks(target / member.scaling, _shapes(member))
    for number, matrix in ((1, blocks), (2, blocks.T)):
        other = member.whole(3 - number).reshape(-1)
        size = other @ other
        if size > 0:
            _set_whole_(member, number, (matrix @ other / size).reshape(_shapes(member)[number - 1]))


def _set_whole_(member: KroneckerResidual, number: int, matrix: Tensor) -> None:
    name = f"lokr_w{number}"
    if f"{name}_a" in dict(member.named_parameters()):
        a = member.get_parameter(f"{name}_a")
        left, right = truncated_svd(matrix, a.shape[1])
        a.data.copy_(left)
        member.get_parameter(f"{name}_b").data.copy_(right.T)
    else:
        member.get_parameter(name).data.copy_(matrix)


def _pairs(member: HadamardResidual) -> list[tuple[Tensor, Tensor]]:
    """A_1 and B_1, A_2 and B_2."""
    found = [[member.get_parameter(f"hada_w{number}_{side}").data for side in "ab"] for number in (1, 2)]
    return [(a, b) for a, b in found]


def _ones(member: HadamardResidual, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """L and R with `L·Rᵀ` a matrix of about ones, with room to move."""
    sides = (member.out_features, member.in_features)
    left, right = (0.1 * torch.randn(n, member.rank, generator=generator, dtype=torch.float64) for n in sides)
    left[:, 0] += 1
    right[:, 0] += 1
    return left, right


def _hadamard_step_(member: HadamardResidual, target: Tensor) -> None:
    """Each of the four factors is the optimum for the others: small systems, one for every row of it."""
    wanted = target / member.scaling
    first, second = _pairs(member)
    for (a, b), (c, d) in ((first, second), (second, first)):
        other = c @ d
        _rows_step_(a, b, other, wanted)
        _rows_step_(b.T, a.T, other.T, wanted.T)


def _rows_step_(a: Tensor, b: Tensor, other: Tensor, wanted: Tensor) -> None:
    """The optimum over a, (rows, r), of `‖wanted − other ⊙ (a·b)‖_F`, row by row."""
    gram = torch.einsum("ri,oi,qi->orq", b, other.square(), b)
    right = ((other * wanted) @ b.T)[..., None]
    a.copy_(improved(gram, right, a[..., None])[..., 0])
