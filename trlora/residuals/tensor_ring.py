"""The residual of TLoRA: a tensor ring over the output and the input modes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor, nn

from trlora import ring
from trlora.fields import check_known, order_of, rank_or_ranks, row_and_column
from trlora.residuals.base import AbstractResidual
from trlora.tensors import contradiction, take_sequence


@final
class TensorRingResidual(AbstractResidual):
    """`Δ[i, j] = tr(B^1[i_1] ··· B^D[i_D] C^1[j_1] ··· C^D[j_D])` (arXiv 2501.08727), little-endian indices.

    `row_core` holds the cores `(I_d, R_d, R_{d+1})` over the output, `column_core` those over the input. Applied as the
    low-rank map it exactly is: see `trlora.ring.low_rank_from_cores`.
    """

    def __init__(self, row_cores: Sequence[Tensor], column_cores: Sequence[Tensor]) -> None:
        super().__init__()
        names = [f"row_core.{d}" for d in range(len(row_cores))]
        names += [f"column_core.{d}" for d in range(len(column_cores))]
        ring.check_ring([*row_cores, *column_cores], "tensor_ring residual", names)
        self.out_features = math.prod(core.shape[0] for core in row_cores)
        self.in_features = math.prod(core.shape[0] for core in column_cores)
        self.row_core = nn.ParameterList(row_cores)
        self.column_core = nn.ParameterList(column_cores)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """L (out, r) and R (in, r) with `Δ = L·Rᵀ`, r the product of the ranks at the two seams of the ring."""
        return ring.low_rank_from_cores(list(self.row_core), list(self.column_core))

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.low_rank()
        return (x @ right) @ left.T

    def add_to(self, weight: Tensor) -> Tensor:
        left, right = self.low_rank()
        return weight.addmm_(left.to(weight), right.T.to(weight))

    def delta(self) -> Tensor:
        return ring.delta_from_cores(list(self.row_core), list(self.column_core))


@final
@dataclass(frozen=True)
class TensorRingResidualSpec:
    """`{"type": "tensor_ring", "order": D, "rank": R or 2·D ranks, "modes": null or {"row": […], "column": […]}}`.

    Checkpoint keys `row_core.<d>` and `column_core.<d>`, d from 0 to D − 1.
    """

    type: ClassVar[str] = "tensor_ring"
    order: int = 3
    rank: int | tuple[int, ...] = 6
    modes: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        kind = "tensor_ring residual"
        check_known(kind, fields, ("order", "rank", "modes"))
        modes = row_and_column(kind, fields.get("modes"))
        order = fields.get("order", cls.order if modes is None else len(modes[0]))
        return cls(
            order=order_of(kind, order, *(modes or ())),
            rank=rank_or_ranks(kind, fields.get("rank", cls.rank)),
            modes=modes,
        )

    def to_dict(self) -> dict[str, Any]:
        rank = self.rank if isinstance(self.rank, int) else list(self.rank)
        modes = self.modes and {"row": list(self.modes[0]), "column": list(self.modes[1])}
        return {"type": self.type, "order": self.order, "rank": rank, "modes": modes}

    def build(
        self, in_features: int, out_features: int, generator: torch.Generator | None = None
    ) -> TensorRingResidual:
        kind = "tensor_ring residual"
        rows, columns = self.modes or (
            ring.modes_of(out_features, self.order),
            ring.modes_of(in_features, self.order),
        )
        rows = ring.check_modes(rows, out_features, f"{kind}, rows")
        columns = ring.check_modes(columns, in_features, f"{kind}, columns")
        ranks = ring.check_ranks(self.rank, len(rows) + len(columns), kind)
        return TensorRingResidual(*ring.residual_cores(rows, columns, ranks, generator=generator))

    def from_tensors(self, tensors: dict[str, Tensor]) -> TensorRingResidual:
        rows = take_sequence(tensors, "row_core", dims=3, count=self.order)
        columns = take_sequence(tensors, "column_core", dims=3, count=self.order)
        member = TensorRingResidual(rows, columns)
        modes = (tuple(core.shape[0] for core in rows), tuple(core.shape[0] for core in columns))
        ranks = ring.ranks_of([*rows, *columns])
        if self.modes is not None and self.modes != modes:
            raise contradiction("modes", self.modes, modes)
        if ring.check_ranks(self.rank, len(ranks), "rank") != ranks:
            raise contradiction("rank", self.rank, list(ranks))
        return member
