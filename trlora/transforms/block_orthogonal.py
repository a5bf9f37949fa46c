"""Orthogonal blocks on the diagonal: orthogonal fine-tuning (OFT, arXiv 2306.07280)."""

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
class BlockOrthogonalTransform(AbstractTransform):
    """T = blockdiag(O_1, …, O_n), each block orthogonal by the Cayley map `O = (I + Q)(I − Q)⁻¹` of a skew Q.

    `skew` (n_blocks, b·(b−1)/2) holds the entries of each Q above the diagonal, row by row, as in PEFT's OFT, whose
    rotation with the exact Cayley map is Oᵀ: it multiplies activations from the right.
    """

    def __init__(self, skew: Tensor, block_size: int) -> None:
        super().__init__()
        self.features = skew.shape[0] * block_size
        self.block_size = block_size
        self.skew = nn.Parameter(skew)

    def blocks(self) -> Tensor:
        """The orthogonal blocks, (n_blocks, b, b)."""
        size = self.block_size
        skew = self.skew.to(torch.promote_types(self.skew.dtype, torch.float32))  # there is no half-precision solve
        rows, columns = torch.triu_indices(size, size, 1, device=skew.device)
        blocks = torch.arange(skew.shape[0], device=skew.device)[:, None]
        upper = skew.new_zeros(skew.shape[0], size, size).index_put((blocks, rows, columns), skew)
        q = upper - upper.transpose(1, 2)
        eye = torch.eye(size, dtype=q.dtype, device=q.device)
        return torch.linalg.solve(eye - q, eye + q, left=False).to(self.skew.dtype)

    def forward(self, x: Tensor) -> Tensor:
        blocked = x.unflatten(-1, (-1, self.block_size))
        return torch.einsum("...nj,nij->...ni", blocked, self.blocks()).flatten(-2)

    def matrix(self) -> Tensor:
        return torch.block_diag(*self.blocks())

    def multiply(self, weight: Tensor) -> Tensor:
        blocked = weight.unflatten(-1, (-1, self.block_size))
        return torch.einsum("...ni,nij->...nj", blocked, self.blocks()).flatten(-2)

    def identity_penalty(self) -> Tensor:
        eye = torch.eye(self.block_size, dtype=self.skew.dtype, device=self.skew.device)
        return torch.linalg.vector_norm(self.blocks() - eye)

    def orthogonal_penalty(self) -> Tensor:
        return self.skew.new_zeros(())  # orthogonal by construction


@final
@dataclass(frozen=True)
class BlockOrthogonalTransformSpec:
    """`{"type": "block_orthogonal", "block_size": b}`; checkpoint key `skew` (in/b, b·(b−1)/2)."""

    type: ClassVar[str] = "block_orthogonal"
    block_size: int = 8

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        kind = "block_orthogonal transform"
        check_known(kind, fields, ("block_size",))
        return cls(positive_int(kind, "block_size", fields.get("block_size", cls.block_size)))

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type, "block_size": self.block_size}

    def build(self, features: int, generator: torch.Generator | None = None) -> BlockOrthogonalTransform:
        if features % self.block_size:
            divisors = [b for b in range(1, features + 1) if features % b == 0]
            closest = min(divisors, key=lambda b: abs(b - self.block_size))
            raise SpecError(f"block_size {self.block_size} does not divide {features} features; {closest} does")
        entries = self.block_size * (self.block_size - 1) // 2
        return BlockOrthogonalTransform(torch.zeros(features // self.block_size, entries), self.block_size)

    def from_tensors(self, tensors: dict[str, Tensor]) -> BlockOrthogonalTransform:
        skew = take(tensors, "skew", dims=2)
        if skew.shape[1] != self.block_size * (self.block_size - 1) // 2:
            size = next((b for b in range(1, skew.shape[1] + 2) if b * (b - 1) // 2 == skew.shape[1]), None)
            if size is None:
                raise CheckpointError(f"skew: {skew.shape[1]} entries a block found, expected b·(b−1)/2 for some b")
            raise contradiction("block_size", self.block_size, size)
        return BlockOrthogonalTransform(skew, self.block_size)
