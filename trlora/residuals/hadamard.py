"""The entrywise product of two low-rank matrices: LoHa (FedPara, arXiv 2108.06098; LyCORIS, arXiv 2309.14859)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor, nn

from trlora.errors import CheckpointError, ShapeError, SpecError
from trlora.fields import alpha_of, check_known, kernel_of, positive_int
from trlora.residuals.base import AbstractResidual
from trlora.tensors import contradiction, take
from trlora.tucker import check_tucker, tucker_right


@final
class HadamardResidual(AbstractResidual):
    """`Δ = (alpha / r) · (A_1·B_1) ⊙ (A_2·B_2)`, of rank r² at most.

    Args:
        tensors: `hada_w1_a`, `hada_w2_a` (out, r) and `hada_w1_b`, `hada_w2_b` (r, in). Of a convolution in Tucker form also
            `hada_t1`, `hada_t2` (r, r, height, width), and then the former are (r, out) and the latter (r, channels).
    """

    def __init__(self, tensors: Mapping[str, Tensor], alpha: float) -> None:
        super().__init__()
        self.tucker = "hada_t1" in tensors
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for number in "12":
            a, b = tensors[f"hada_w{number}_a"], tensors[f"hada_w{number}_b"]
            if self.tucker:
                check_tucker(tensors[f"hada_t{number}"], a, b, f"hada_t{number}, hada_w{number}_a and hada_w{number}_b")
            elif a.shape[1] != b.shape[0]:
                raise ShapeError(
                    f"hada_w{number}: {tuple(a.shape)} and {tuple(b.shape)} found, expected (out, r) and (r, in)"
                )
        if shapes["hada_w1_a"] != shapes["hada_w2_a"] or shapes["hada_w1_b"] != shapes["hada_w2_b"]:
            raise ShapeError(f"two factors of equal shapes expected, found {shapes}")
        if self.tucker and shapes["hada_t1"] != shapes["hada_t2"]:
            raise ShapeError(
                f"hada_t1 {shapes['hada_t1']} and hada_t2 {shapes['hada_t2']} found, expected equal shapes"
            )
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))
        self.rank = shapes["hada_w1_a"][0 if self.tucker else 1]
        taps = math.prod(shapes["hada_t1"][2:]) if self.tucker else 1
        self.out_features = shapes["hada_w1_a"][1 if self.tucker else 0]
        self.in_features = shapes["hada_w1_b"][1] * taps
        self.scaling = alpha / self.rank

    def factors(self, number: int) -> tuple[Tensor, Tensor]:
        """The two matrices of product 1 or 2, (out, r) and (r, in)."""
        a, b = self._factor(f"hada_w{number}_a"), self._factor(f"hada_w{number}_b")
        return (a.T, tucker_right(self._factor(f"hada_t{number}"), b)) if self.tucker else (a, b)

    def forward(self, x: Tensor) -> Tensor:
        if self.rank**2 * (self.out_features + self.in_features) < self.out_features * self.in_features:
            left, right = self.low_rank()
            return (x @ right) @ left.T
        return x @ self.delta().T

    def _factor(self, name: str) -> Tensor:
        # an attribute, not a parameter: `torch.func` puts plain tensors in their place
        tensor = getattr(self, name)
        assert isinstance(tensor, Tensor)
        return tensor

    def delta(self) -> Tensor:
        (a1, b1), (a2, b2) = self.factors(1), self.factors(2)
        return (a1 @ b1) * (a2 @ b2) * self.scaling

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """Products of every column with every column (Khatri–Rao): r² of them."""
        (a1, b1), (a2, b2) = self.factors(1), self.factors(2)
        left = torch.einsum("or,oq->orq", a1, a2).flatten(1) * self.scaling
        return left, torch.einsum("ri,qi->irq", b1, b2).flatten(1)


@final
@dataclass(frozen=True)
class HadamardResidualSpec:
    """`{"type": "hadamard", "rank": r, "alpha": null or a number, "kernel": null or [height, width]}`.

    alpha null means r, a scaling of one. A kernel asks for the Tucker form. Checkpoint keys: see `HadamardResidual`.
    """

    type: ClassVar[str] = "hadamard"
    rank: int = 4
    alpha: float | None = None
    kernel: tuple[int, int] | None = None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        kind = "hadamard residual"
        check_known(kind, fields, ("rank", "alpha", "kernel"))
        return cls(
            positive_int(kind, "rank", fields.get("rank", cls.rank)),
            alpha_of(kind, fields.get("alpha")),
            kernel_of(kind, fields.get("kernel")),
        )

    def to_dict(self) -> dict[str, Any]:
        kernel = self.kernel and list(self.kernel)
        return {"type": self.type, "rank": self.rank, "alpha": self.alpha, "kernel": kernel}

    def build(self, in_features: int, out_features: int, generator: torch.Generator | None = None) -> HadamardResidual:
        def uniform(*shape: int) -> Tensor:
            bound = 1 / math.sqrt(math.prod(shape[1:]))  # PEFT's start: Kaiming uniform, a = √5
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)

        rank = self.rank
        if self.kernel is None:
            a, b = (out_features, rank), (rank, in_features)
        else:
            taps = math.prod(self.kernel)
            if in_features % taps:
                raise SpecError(f"hadamard residual: kernel {list(self.kernel)} does not divide {in_features} features")
            a, b = (rank, out_features), (rank, in_features // taps)
        tensors = {"hada_w1_a": uniform(*a), "hada_w1_b": uniform(*b), "hada_w2_a": uniform(*a)}
        tensors["hada_w2_b"] = torch.zeros(b)
        if self.kernel is not None:
            tensors |= {name: uniform(rank, rank, *self.kernel) for name in ("hada_t1", "hada_t2")}
        return self._member(tensors)

    def from_tensors(self, tensors: dict[str, Tensor]) -> HadamardResidual:
        taken = {name: take(tensors, name, dims=2) for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}
        if self.kernel is not None:
            taken |= {name: take(tensors, name, dims=4) for name in ("hada_t1", "hada_t2")}
        if any(0 in tensor.shape for tensor in taken.values()):
            raise CheckpointError("hada_w1_a: rank 0 found, expected at least 1")
        member = self._member(taken)
        if member.rank != self.rank:
            raise contradiction("rank", self.rank, member.rank)
        if self.kernel is not None and tuple(taken["hada_t1"].shape[2:]) != self.kernel:
            raise contradiction("kernel", list(self.kernel), list(taken["hada_t1"].shape[2:]))
        return member

    def _member(self, tensors: Mapping[str, Tensor]) -> HadamardResidual:
        return HadamardResidual(tensors, self.rank if self.alpha is None else self.alpha)
