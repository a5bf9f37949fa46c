"""The Kronecker product of two matrices: LoKr (KronA, arXiv 2212.10650; LyCORIS, arXiv 2309.14859)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor, nn

from trlora import ring
from trlora.errors import CheckpointError, ShapeError, SpecError
from trlora.fields import alpha_of, boolean, check_known, optional_int, row_and_column
from trlora.residuals.base import AbstractResidual
from trlora.tensors import contradiction, take
from trlora.tucker import check_tucker, tucker_right


@final
class KroneckerResidual(AbstractResidual):
    """`Δ = scaling · W_1 ⊗ W_2` with W_1 (a, c) and W_2 (b, d), for a·b outputs and c·d inputs.

    Args:
        tensors: `lokr_w1`, or its factors `lokr_w1_a` (a, r) and `lokr_w1_b` (r, c); `lokr_w2`, or `lokr_w2_a` (b, r) and
            `lokr_w2_b` (r, d), or in the Tucker form of a convolution `lokr_t2` (r, r, height, width) with `lokr_w2_a`
            (r, b) and `lokr_w2_b` (r, d / taps).
    """

    def __init__(self, tensors: Mapping[str, Tensor], scaling: float) -> None:
        super().__init__()
        self.tucker = "lokr_t2" in tensors
        for number in "12":
            a, b = tensors.get(f"lokr_w{number}_a"), tensors.get(f"lokr_w{number}_b")
            if a is None or b is None:
                continue
            if number == "2" and self.tucker:
                check_tucker(tensors["lokr_t2"], a, b, "lokr_t2, lokr_w2_a and lokr_w2_b")
            elif a.shape[1] != b.shape[0]:
                raise ShapeError(
                    f"lokr_w{number}: {tuple(a.shape)} and {tuple(b.shape)} found, expected (…, r) and (r, …)"
                )
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))
        self.scaling = scaling
        with torch.no_grad():
            (a, c), (b, d) = (tuple(self.whole(number).shape) for number in (1, 2))
        self.out_features, self.in_features = a * b, c * d

    def _factors(self, number: int) -> tuple[Tensor, Tensor] | None:
        """(rows, r) and (r, columns), or None for a matrix that is kept whole."""
        if hasattr(self, f"lokr_w{number}"):
            return None
        a, b = self._factor(f"lokr_w{number}_a"), self._factor(f"lokr_w{number}_b")
        return (a.T, tucker_right(self._factor("lokr_t2"), b)) if number == 2 and self.tucker else (a, b)

    def whole(self, number: int) -> Tensor:
        """W_1 or W_2."""
        factors = self._factors(number)
        return self._factor(f"lokr_w{number}") if factors is None else factors[0] @ factors[1]

    def forward(self, x: Tensor) -> Tensor:
        w1, w2 = self.whole(1), self.whole(2)
        parted = x.unflatten(-1, (w1.shape[1], w2.shape[1]))
        return (w1 @ (parted @ w2.T)).flatten(-2) * self.scaling

    def _factor(self, name: str) -> Tensor:
        # an attribute, not a parameter: `torch.func` puts plain tensors in their place
        tensor = getattr(self, name)
        assert isinstance(tensor, Tensor)
        return tensor

    def delta(self) -> Tensor:
        return _kron(self.whole(1), self.whole(2)) * self.scaling

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """The Kronecker products of the factors; a matrix that is kept whole is its own factor beside an identity."""
        lefts, rights = zip(*(self._thin(number) for number in (1, 2)), strict=True)
        left, right = (_kron(*pair) for pair in (lefts, rights))
        return left * self.scaling, right

    def _thin(self, number: int) -> tuple[Tensor, Tensor]:
        """(rows, r) and (columns, r)."""
        factors = self._factors(number)
        if factors is not None:
            return factors[0], factors[1].T
        whole = self.whole(number)
        eye = torch.eye(min(whole.shape), dtype=whole.dtype, device=whole.device)
        return (whole, eye) if whole.shape[0] >= whole.shape[1] else (eye, whole.T)


def _kron(a: Tensor, b: Tensor) -> Tensor:
    """`torch.kron`, which fails on some matrices with a side of one (torch 2.13)."""
    return (a[:, None, :, None] * b[None, :, None, :]).reshape(a.shape[0] * b.shape[0], a.shape[1] * b.shape[1])


@final
@dataclass(frozen=True)
class KroneckerResidualSpec:
    """`{"type": "kronecker", "rank": r or null, "alpha": null or a number, "both": false, "modes": null or
    {"row": [a, b], "column": [c, d]}}`.

    The scaling is alpha / r, one where either is null. At its start W_2 is factored where r < max(b, d) / 2, and, where
    `both` is true, W_1 where r < max(a, c) / 2; what a checkpoint holds is told by its tensors, see `KroneckerResidual`.
    """

    type: ClassVar[str] = "kronecker"
    rank: int | None = None
    alpha: float | None = None
    modes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    both: bool = False

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        kind = "kronecker residual"
        check_known(kind, fields, ("rank", "alpha", "modes", "both"))
        modes = row_and_column(kind, fields.get("modes"))
        if modes is not None and (len(modes[0]), len(modes[1])) != (2, 2):
            raise SpecError(f"{kind}: modes {fields['modes']!r} given, expected two for each side")
        return cls(
            optional_int(kind, "rank", fields.get("rank")),
            alpha_of(kind, fields.get("alpha")),
            modes,
            boolean(kind, "both", fields.get("both", False)),
        )

    def to_dict(self) -> dict[str, Any]:
        modes = self.modes and {"row": list(self.modes[0]), "column": list(self.modes[1])}
        return {"type": self.type, "rank": self.rank, "alpha": self.alpha, "modes": modes, "both": self.both}

    @property
    def scaling(self) -> float:
        return 1.0 if self.rank is None or self.alpha is None else self.alpha / self.rank

    def build(self, in_features: int, out_features: int, generator: torch.Generator | None = None) -> KroneckerResidual:
        rows, columns = self.modes or (ring.modes_of(out_features, 2), ring.modes_of(in_features, 2))
        a, b = ring.check_modes(rows, out_features, "kronecker residual, rows")
        c, d = ring.check_modes(columns, in_features, "kronecker residual, columns")

        def uniform(*shape: int) -> Tensor:
            bound = 1 / math.sqrt(shape[1])  # PEFT's start: Kaiming uniform, a = √5
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)

        rank = self.rank
        tensors: dict[str, Tensor] = {}
        if rank is not None and self.both and rank < max(a, c) / 2:
            tensors |= {"lokr_w1_a": torch.zeros(a, rank), "lokr_w1_b": uniform(rank, c)}
        else:
            tensors["lokr_w1"] = torch.zeros(a, c)
        if rank is not None and rank < max(b, d) / 2:
            tensors |= {"lokr_w2_a": uniform(b, rank), "lokr_w2_b": uniform(rank, d)}
        else:
            tensors["lokr_w2"] = uniform(b, d)
        return KroneckerResidual(tensors, self.scaling)

    def from_tensors(self, tensors: dict[str, Tensor]) -> KroneckerResidual:
        names = []
        for number in "12":
            whole = f"lokr_w{number}"
            names += [whole] if whole in tensors else [f"{whole}_a", f"{whole}_b"]
        if "lokr_t2" in tensors and "lokr_w2" not in names:
            names.append("lokr_t2")
        taken = {name: take(tensors, name, dims=4 if name == "lokr_t2" else 2) for name in names}
        if any(0 in tensor.shape for tensor in taken.values()):
            raise CheckpointError(f"{names[0]}: a side of length 0 found, expected at least 1")
        turned = {"lokr_w2_a"} if "lokr_t2" in taken else set()
        ranks = {taken[name].shape[0 if name in turned else 1] for name in names if name.endswith("_a")}
        if ranks - {self.rank}:
            raise contradiction("rank", self.rank, *ranks)
        return KroneckerResidual(taken, self.scaling)
