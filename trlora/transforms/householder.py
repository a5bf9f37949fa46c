"""Chains of reflections: Householder reflection adaptation (HRA, arXiv 2405.17484)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor, nn

from trlora.errors import CheckpointError, SpecError
from trlora.fields import check_known, positive_int
from trlora.tensors import contradiction, take
from trlora.transforms.base import AbstractTransform


@final
class HouseholderTransform(AbstractTransform):
    """`T = H_1·H_2 ··· H_r` with `H_i = I − 2·v_i·v_iᵀ / ‖v_i‖²`; `vectors` (r, features) holds the v_i, of any length
    but 0.

    Applied as the rank-r change of I that it is: see `factors`.
    """

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.features = vectors.shape[1]
        self.vectors = nn.Parameter(vectors)

    def factors(self) -> tuple[Tensor, Tensor]:
        """L and R (features, r) with `T = I − L·Rᵀ`.

        With unit vectors as the columns of V, `T = I − V·A⁻¹·Vᵀ`, A upper triangular with ½ on its diagonal and `v_iᵀ v_j`
        above it (the compact WY form of Schreiber and Van Loan, 1989).
        """
        vectors = self.vectors.to(torch.promote_types(self.vectors.dtype, torch.float32))  # no half-precision solve
        unit = vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        triangle = torch.triu(unit @ unit.T, 1) + torch.eye(len(unit), dtype=unit.dtype, device=unit.device) / 2
        left = torch.linalg.solve_triangular(triangle, unit.T, upper=True, left=False)
        return left.to(self.vectors.dtype), unit.T.to(self.vectors.dtype)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.factors()
        return x - (x @ right) @ left.T

    def matrix(self) -> Tensor:
        left, right = self.factors()
        return torch.eye(self.features, dtype=left.dtype, device=left.device) - left @ right.T

    def multiply(self, weight: Tensor) -> Tensor:
        left, right = self.factors()
        return weight - (weight @ left) @ right.T

    def identity_penalty(self) -> Tensor:
        left, right = self.factors()
        return torch.linalg.vector_norm(left @ right.T)

    def orthogonal_penalty(self) -> Tensor:
        return self.vectors.new_zeros(())  # orthogonal by construction


@final
@dataclass(frozen=True)
class HouseholderTransformSpec:
    """`{"type": "householder", "rank": r}`; checkpoint key `vectors` (r, in).

    An identity to start from needs an even r: the vectors come in equal pairs, whose reflections undo each other.
    """

    type: ClassVar[str] = "householder"
    rank: int = 8

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        kind = "householder transform"
        check_known(kind, fields, ("rank",))
        return cls(positive_int(kind, "rank", fields.get("rank", cls.rank)))

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type, "rank": self.rank}

    def build(self, features: int, generator: torch.Generator | None = None) -> HouseholderTransform:
        if self.rank % 2:
            raise SpecError(f"householder transform: rank {self.rank}, expected an even one to start at the identity")
        half = torch.randn(self.rank // 2, features, generator=generator)
        return HouseholderTransform(half.repeat_interleave(2, dim=0))

    def from_tensors(self, tensors: dict[str, Tensor]) -> HouseholderTransform:
        vectors = take(tensors, "vectors", dims=2)
        if vectors.shape[0] != self.rank:
            raise contradiction("rank", self.rank, vectors.shape[0])
        zero = (torch.linalg.vector_norm(vectors.float(), dim=1) == 0).nonzero()
        if len(zero):
            raise CheckpointError(f"vectors: number {int(zero[0])} is zero, which reflects nothing; expected any other")
        return HouseholderTransform(vectors)
