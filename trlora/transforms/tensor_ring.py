"""The transform of TLoRA: a tensor-ring matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor, nn

from trlora import ring
from trlora.errors import ShapeError
from trlora.fields import check_known, optional_ints, order_of, rank_or_ranks
from trlora.tensors import contradiction, take_sequence
from trlora.transforms.base import AbstractTransform


@final
class TensorRingTransform(AbstractTransform):
    """`T[i, j] = tr(A^1[i_1, j_1] ··· A^D[i_D, j_D])` (arXiv 2501.08727), little-endian indices.

    `core` holds the D cores `(I_d, I_d, R_d, R_{d+1})`.
    """

    def __init__(self, cores: Sequence[Tensor]) -> None:
        super().__init__()
        ring.check_matrix_ring(cores, "tensor_ring transform", [f"core.{d}" for d in range(len(cores))])
        for d, core in enumerate(cores):
            if core.shape[0] != core.shape[1]:
                raise ShapeError(f"core.{d}: modes {core.shape[0]} and {core.shape[1]} found, expected equal ones")
        self.features = math.prod(core.shape[0] for core in cores)
        self.core = nn.ParameterList(cores)

    def forward(self, x: Tensor) -> Tensor:
        return ring.apply_cores(list(self.core), x)

    def matrix(self) -> Tensor:
        return ring.matrix_from_cores(list(self.core))

    def multiply(self, weight: Tensor) -> Tensor:
        return ring.multiply_cores(weight, list(self.core))

    def change(self, weight: Tensor) -> Tensor:
        cores = list(self.core)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (weight, *cores)):
            return super().change(weight)
        return ring.change_by_cores(weight, cores)

    def identity_penalty(self) -> Tensor:
        return ring.identity_penalty(list(self.core))

    def orthogonal_penalty(self) -> Tensor:
        return ring.orthogonal_penalty(list(self.core))


@final
@dataclass(frozen=True)
class TensorRingTransformSpec:
    """`{"type": "tensor_ring", "order": D, "rank": R or [R_1, …, R_D], "modes": null or [I_1, …, I_D]}`.

    Checkpoint keys `core.0` … `core.<D−1>`.
    """

    type: ClassVar[str] = "tensor_ring"
    order: int = 3
    rank: int | tuple[int, ...] = 2
    modes: tuple[int, ...] | None = None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        kind = "tensor_ring transform"
        check_known(kind, fields, ("order", "rank", "modes"))
        modes = optional_ints(kind, "modes", fields.get("modes"))
        return cls(
            order=order_of(kind, fields.get("order", cls.order if modes is None else len(modes)), modes),
            rank=rank_or_ranks(kind, fields.get("rank", cls.rank)),
            modes=modes,
        )

    def to_dict(self) -> dict[str, Any]:
        rank = self.rank if isinstance(self.rank, int) else list(self.rank)
        return {"type": self.type, "order": self.order, "rank": rank, "modes": self.modes and list(self.modes)}

    def build(self, features: int, generator: torch.Generator | None = None) -> TensorRingTransform:
        modes = ring.modes_of(features, self.order) if self.modes is None else self.modes
        modes = ring.check_modes(modes, features, "tensor_ring transform")
        ranks = ring.check_ranks(self.rank, len(modes), "tensor_ring transform")
        return TensorRingTransform(ring.identity_cores(modes, ranks))

    def from_tensors(self, tensors: dict[str, Tensor]) -> TensorRingTransform:
        member = TensorRingTransform(take_sequence(tensors, "core", dims=4, count=self.order))
        cores = list(member.core)
        modes, ranks = tuple(core.shape[0] for core in cores), ring.ranks_of(cores)
        if self.modes is not None and self.modes != modes:
            raise contradiction("modes", list(self.modes), list(modes))
        if ring.check_ranks(self.rank, self.order, "rank") != ranks:
            raise contradiction("rank", self.rank, list(ranks))
        return member
