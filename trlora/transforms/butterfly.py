"""Butterfly products of orthogonal blocks: BOFT (arXiv 2311.06243)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor, nn

from trlora.cayley import cayley, skew_from_upper
from trlora.errors import CheckpointError, ShapeError, SpecError
from trlora.fields import check_known, positive_int
from trlora.tensors import contradiction, take
from trlora.transforms.base import AbstractTransform


@final
class ButterflyTransform(AbstractTransform):
    """`T = Π_i P_i·blockdiag(O_i1, …, O_in)·P_iᵀ`, i from 0 to m − 1: m block-diagonal factors whose blocks meet features
    ever farther apart.

    Blocks are orthogonal by the Cayley map `O = (I + Q)(I − Q)⁻¹` of a skew Q; `skew` (m, n_blocks, b·(b−1)/2) holds the
    entries of each above the diagonal, row by row. P_i brings the halves of blocks together that lie 2^i halves apart, so
    P_0 is the identity; as in PEFT, whose product is Tᵀ.
    """

    def __init__(self, skew: Tensor, block_size: int) -> None:
        super().__init__()
        factors, blocks, _ = skew.shape
        self.features = blocks * block_size
        self.block_size = block_size
        check_butterfly(self.features, block_size, factors)
        self.skew = nn.Parameter(skew)

    def blocks(self) -> Tensor:
        """The orthogonal blocks, (m, n_blocks, b, b)."""
        return cayley(skew_from_upper(self.skew, self.block_size))

    def forward(self, x: Tensor) -> Tensor:
        blocks = self.blocks()
        for i in reversed(range(blocks.shape[0])):
            blocked = self._gathered(x, i).unflatten(-1, (-1, self.block_size))
            x = self._scattered(torch.einsum("...nj,nij->...ni", blocked, blocks[i]).flatten(-2), i)
        return x

    def matrix(self) -> Tensor:
        return self.multiply(torch.eye(self.features, dtype=self.skew.dtype, device=self.skew.device))

    def multiply(self, weight: Tensor) -> Tensor:
        for i, blocks in enumerate(self.blocks()):
            blocked = self._gathered(weight, i).unflatten(-1, (-1, self.block_size))
            weight = self._scattered(torch.einsum("...ni,nij->...nj", blocked, blocks).flatten(-2), i)
        return weight

    def identity_penalty(self) -> Tensor:
        """The distances of the factors from I: zero only there, though T itself may be I elsewhere."""
        eye = torch.eye(self.block_size, dtype=self.skew.dtype, device=self.skew.device)
        return torch.linalg.vector_norm(self.blocks() - eye)

    def orthogonal_penalty(self) -> Tensor:
        return self.skew.new_zeros(())  # orthogonal by construction

    def _gathered(self, x: Tensor, i: int) -> Tensor:
        """`P_iᵀ x` along the last axis: halves of blocks that lie 2^i halves apart become neighbours."""
        return self._halves(x, i, 2, 2**i)

    def _scattered(self, x: Tensor, i: int) -> Tensor:
        """`P_i x` along the last axis."""
        return self._halves(x, i, 2**i, 2)

    def _halves(self, x: Tensor, i: int, outer: int, inner: int) -> Tensor:
        if i == 0:
            return x
        halves = x.unflatten(-1, (-1, outer, inner, self.block_size // 2))
        return halves.transpose(-3, -2).flatten(-4)


def check_butterfly(features: int, block_size: int, factors: int) -> None:
    """Raises `ShapeError` unless `factors` factors of blocks of `block_size` make a butterfly over `features` features."""
    if features % block_size:
        raise ShapeError(f"butterfly: block_size {block_size} does not divide {features} features")
    span = block_size * 2 ** (factors - 1)
    if factors > 1 and (block_size % 2 or features % span):
        raise ShapeError(
            f"butterfly: {factors} factors with block_size {block_size} over {features} features found, expected an even "
            f"block_size, and features that block_size·2^(factors−1) = {span} divides"
        )


@final
@dataclass(frozen=True)
class ButterflyTransformSpec:
    """`{"type": "butterfly", "block_size": b, "factors": m}`; checkpoint key `skew` (m, in/b, b·(b−1)/2)."""

    type: ClassVar[str] = "butterfly"
    block_size: int = 4
    factors: int = 1

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        kind = "butterfly transform"
        check_known(kind, fields, ("block_size", "factors"))
        return cls(
            positive_int(kind, "block_size", fields.get("block_size", cls.block_size)),
            positive_int(kind, "factors", fields.get("factors", cls.factors)),
        )

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type, "block_size": self.block_size, "factors": self.factors}

    def build(self, features: int, generator: torch.Generator | None = None) -> ButterflyTransform:
        try:
            check_butterfly(features, self.block_size, self.factors)
        except ShapeError as error:
            raise SpecError(str(error)) from error
        entries = self.block_size * (self.block_size - 1) // 2
        return ButterflyTransform(torch.zeros(self.factors, features // self.block_size, entries), self.block_size)

    def from_tensors(self, tensors: dict[str, Tensor]) -> ButterflyTransform:
        skew = take(tensors, "skew", dims=3)
        if skew.shape[2] != self.block_size * (self.block_size - 1) // 2:
            raise CheckpointError(
                f"skew: {skew.shape[2]} entries a block found, expected {self.block_size * (self.block_size - 1) // 2} "
                f"for block_size {self.block_size}"
            )
        if skew.shape[0] != self.factors:
            raise contradiction("factors", self.factors, skew.shape[0])
        return ButterflyTransform(skew, self.block_size)
