"""Orthogonal blocks on the diagonal: orthogonal fine-tuning (OFT, arXiv 2306.07280)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor, nn

from trlora.cayley import cayley, cayley_series, skew_from_upper
from trlora.errors import CheckpointError, SpecError
from trlora.fields import boolean, check_known, optional_int, positive_int
from trlora.tensors import contradiction, take
from trlora.transforms.base import AbstractTransform


@final
class BlockOrthogonalTransform(AbstractTransform):
    """T = blockdiag(O_1, …, O_n), each block orthogonal by the Cayley map `O = (I + Q)(I − Q)⁻¹` of a skew Q.

    `skew` (n_blocks, b·(b−1)/2) holds the entries of each Q above the diagonal, row by row, as in PEFT's OFT, whose
    rotation with the exact Cayley map is Oᵀ: it multiplies activations from the right.

    Args:
        neumann_terms: instead of the exact map, so many terms of `trlora.cayley.cayley_series`; O is then nearly orthogonal.
        features: of a layer over which one block is repeated; `skew` then has one row.
    """

    def __init__(
        self, skew: Tensor, block_size: int, neumann_terms: int | None = None, features: int | None = None
    ) -> None:
        super().__init__()
        self.features = skew.shape[0] * block_size if features is None else features
        self.block_size = block_size
        self.neumann_terms = neumann_terms
        self.shared = features is not None
        self.skew = nn.Parameter(skew)

    def blocks(self) -> Tensor:
        """The orthogonal blocks, (n_blocks, b, b)."""
        q = skew_from_upper(self.skew, self.block_size)
        own = cayley(q) if self.neumann_terms is None else cayley_series(q, self.neumann_terms)
        return own.expand(self.features // self.block_size, -1, -1) if self.shared else own

    def forward(self, x: Tensor) -> Tensor:
        blocked = x.unflatten(-1, (-1, self.block_size))
        return torch.einsum("...nj,nij->...ni", blocked, self.blocks()).flatten(-2)

    def matrix(self) -> Tensor:
        return torch.block_diag(*self.blocks())

    def multiply(self, weight: Tensor) -> Tensor:
        blocked = weight.unflatten(-1, (-1, self.block_size))
        return torch.einsum("...ni,nij->...nj", blocked, self.blocks()).flatten(-2)

    def fitted(self, channels: int, features: int) -> Self | None:
        """A shared block is repeated over any layer whose features it divides."""
        if self.shared and features % self.block_size == 0:
            return type(self)(self.skew.data, self.block_size, self.neumann_terms, features)
        return super().fitted(channels, features)

    def identity_penalty(self) -> Tensor:
        eye = torch.eye(self.block_size, dtype=self.skew.dtype, device=self.skew.device)
        return torch.linalg.vector_norm(self.blocks() - eye)

    def orthogonal_penalty(self) -> Tensor:
        if self.neumann_terms is None:
            return self.skew.new_zeros(())  # orthogonal by construction
        blocks = self.blocks()
        eye = torch.eye(self.block_size, dtype=self.skew.dtype, device=self.skew.device)
        return torch.linalg.vector_norm(blocks @ blocks.transpose(1, 2) - eye)


@final
@dataclass(frozen=True)
class BlockOrthogonalTransformSpec:
    """`{"type": "block_orthogonal", "block_size": b, "neumann_terms": null or a number, "shared": false}`.

    Checkpoint key `skew` (in/b, b·(b−1)/2), or (1, b·(b−1)/2) where one block is `shared` by all places. The last two fields
    are left out where they have these values.
    """

    type: ClassVar[str] = "block_orthogonal"
    block_size: int = 8
    neumann_terms: int | None = None
    shared: bool = False

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        kind = "block_orthogonal transform"
        check_known(kind, fields, ("block_size", "neumann_terms", "shared"))
        return cls(
            positive_int(kind, "block_size", fields.get("block_size", cls.block_size)),
            optional_int(kind, "neumann_terms", fields.get("neumann_terms")),
            boolean(kind, "shared", fields.get("shared", False)),
        )

    def to_dict(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"type": self.type, "block_size": self.block_size}
        if self.neumann_terms is not None:
            fields["neumann_terms"] = self.neumann_terms
        return fields | ({"shared": True} if self.shared else {})

    def build(self, features: int, generator: torch.Generator | None = None) -> BlockOrthogonalTransform:
        if features % self.block_size:
            divisors = [b for b in range(1, features + 1) if features % b == 0]
            closest = min(divisors, key=lambda b: abs(b - self.block_size))
            raise SpecError(f"block_size {self.block_size} does not divide {features} features; {closest} does")
        entries = self.block_size * (self.block_size - 1) // 2
        skew = torch.zeros(1 if self.shared else features // self.block_size, entries)
        return self._member(skew, features)

    def from_tensors(self, tensors: dict[str, Tensor]) -> BlockOrthogonalTransform:
        skew = take(tensors, "skew", dims=2)
        if skew.shape[1] != self.block_size * (self.block_size - 1) // 2:
            size = next((b for b in range(1, skew.shape[1] + 2) if b * (b - 1) // 2 == skew.shape[1]), None)
            if size is None:
                raise CheckpointError(f"skew: {skew.shape[1]} entries a block found, expected b·(b−1)/2 for some b")
            raise contradiction("block_size", self.block_size, size)
        if self.shared and skew.shape[0] != 1:
            raise CheckpointError(f"skew: {skew.shape[0]} blocks found, expected one, which is shared")
        return self._member(skew, self.block_size)

    def _member(self, skew: Tensor, features: int) -> BlockOrthogonalTransform:
        return BlockOrthogonalTransform(skew, self.block_size, self.neumann_terms, features if self.shared else None)
