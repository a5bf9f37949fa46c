"""Oracles, factories and a small model.

The oracles are loops over the formulas in NumPy, float64. They call nothing of trlora.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trlora import AdapterSpec, LayerAdapter
from trlora.residuals import AbstractResidual
from trlora.transforms import AbstractTransform

Array = NDArray[np.float64]

# --- oracles -----------------------------------------------------------------------------------------------------------


def digits_of(index: int, modes: Sequence[int]) -> tuple[int, ...]:
    """The little-endian digits of `index`: the first mode runs fastest."""
    digits = []
    for mode in modes:
        digits.append(index % mode)
        index //= mode
    assert index == 0
    return tuple(digits)


def matrix_oracle(cores: Sequence[Tensor]) -> Array:
    """`T[i, j] = tr(A^1[i_1, j_1] ··· A^D[i_D, j_D])`, entry by entry."""
    arrays = [core.detach().double().numpy() for core in cores]
    rows, columns = [a.shape[0] for a in arrays], [a.shape[1] for a in arrays]
    result = np.zeros((math.prod(rows), math.prod(columns)))
    for i, j in product(range(result.shape[0]), range(result.shape[1])):
        chain = np.eye(arrays[0].shape[2])
        for a, i_d, j_d in zip(arrays, digits_of(i, rows), digits_of(j, columns), strict=True):
            chain = chain @ a[i_d, j_d]
        result[i, j] = np.trace(chain)
    return result


def delta_oracle(row_cores: Sequence[Tensor], column_cores: Sequence[Tensor]) -> Array:
    """`Δ[i, j] = tr(B^1[i_1] ··· B^D[i_D] C^1[j_1] ··· C^E[j_E])`, entry by entry."""
    left, right = [[c.detach().double().numpy() for c in cores] for cores in (row_cores, column_cores)]
    rows, columns = [a.shape[0] for a in left], [a.shape[0] for a in right]
    result = np.zeros((math.prod(rows), math.prod(columns)))
    for i, j in product(range(result.shape[0]), range(result.shape[1])):
        chain = np.eye(left[0].shape[1])
        for a, digit in zip([*left, *right], [*digits_of(i, rows), *digits_of(j, columns)], strict=True):
            chain = chain @ a[digit]
        result[i, j] = np.trace(chain)
    return result


def product_oracle(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Array]:
    """`C^d[i, j] = Σ_l A^d[i, l] ⊗ B^d[j, l]`, Kronecker product by Kronecker product."""
    cores = []
    for x, y in zip([c.detach().double().numpy() for c in a], [c.detach().double().numpy() for c in b], strict=True):
        core = np.zeros((x.shape[0], y.shape[0], x.shape[2] * y.shape[2], x.shape[3] * y.shape[3]))
        for i, j, k in product(range(x.shape[0]), range(y.shape[0]), range(x.shape[1])):
            core[i, j] += np.kron(x[i, k], y[j, k])
        cores.append(core)
    return cores


def distance_oracle(cores: Sequence[Array], targets: Sequence[Array]) -> float:
    """`Σ_d Σ_{r,r'} ‖A^d[:, :, r, r'] − t_d[r, r']·I‖_F`."""
    total = 0.0
    for core, target in zip(cores, targets, strict=True):
        for r, s in product(range(core.shape[2]), range(core.shape[3])):
            total += math.sqrt(((core[:, :, r, s] - target[r, s] * np.eye(core.shape[0])) ** 2).sum())
    return total


def cayley_oracle(skew: Array) -> Array:
    """`(I + Q)(I − Q)⁻¹` of a skew-symmetric Q."""
    eye = np.eye(len(skew))
    return (eye + skew) @ np.linalg.inv(eye - skew)


def weight_oracle(weight: Tensor, adapters: Sequence[tuple[LayerAdapter, float]]) -> Array:
    """`W0 + Σ s_k (diag(gain_k)·(U_kᵀ·W0·T_k + Δ_k) − W0)` from the dense members, in NumPy."""
    w0 = weight.detach().double().numpy()
    result = w0.copy()
    for adapter, strength in adapters:
        whole = adapter.output_transform.matrix().detach().double().numpy().T @ w0
        whole = whole @ adapter.transform.matrix().detach().double().numpy()
        whole = whole + adapter.residual.delta().detach().double().numpy()
        result += strength * (gain_oracle(adapter, whole)[:, None] * whole - w0)
    return result


def bias_oracle(bias: Tensor, adapters: Sequence[tuple[LayerAdapter, float]]) -> Array:
    """`b + Σ s_k (gain_k − 1)·b` over the adapters that scale the bias."""
    b = bias.detach().double().numpy()
    result = b.copy()
    for adapter, strength in adapters:
        if adapter.spec.magnitude.to_dict().get("bias"):
            result += strength * (gain_oracle(adapter, None) - 1) * b
    return result


def gain_oracle(adapter: LayerAdapter, whole: Array | None) -> Array:
    """The gains, row by row, of a magnitude on the weight `Uᵀ·W0·T + Δ`."""
    tensors = {name: tensor.detach().double().numpy() for name, tensor in adapter.magnitude.named_parameters()}
    kind = adapter.spec.magnitude.type
    if kind == "norm":
        assert whole is not None
        return np.array([m / math.sqrt(sum(w * w for w in row)) for m, row in zip(tensors["norm"], whole, strict=True)])
    return tensors["scale"] if kind == "scale" else np.ones(adapter.out_features)


# --- random rings ------------------------------------------------------------------------------------------------------


def random_matrix_ring(rows: Sequence[int], columns: Sequence[int], ranks: Sequence[int]) -> list[Tensor]:
    """Cores `(I_d, J_d, R_d, R_{d+1})`, float64."""
    closed = [*ranks, ranks[0]]
    return [
        torch.randn(i, j, closed[d], closed[d + 1], dtype=torch.float64)
        for d, (i, j) in enumerate(zip(rows, columns, strict=True))
    ]


def random_ring(modes: Sequence[int], ranks: Sequence[int]) -> list[Tensor]:
    """Cores `(I_d, R_d, R_{d+1})`, float64."""
    closed = [*ranks, ranks[0]]
    return [torch.randn(mode, closed[d], closed[d + 1], dtype=torch.float64) for d, mode in enumerate(modes)]


def random_orthogonal(size: int) -> Tensor:
    """A random orthogonal matrix, float64."""
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q


MATRIX_RINGS = [
    ((5,), (7,), (1,)),
    ((5,), (7,), (3,)),
    ((3, 5), (2, 7), (2, 2)),
    ((3, 4), (5, 3), (2, 3)),
    ((3, 5, 2), (2, 3, 5), (2, 2, 2)),
    ((3, 1, 5), (5, 3, 1), (2, 3, 4)),
    ((3, 2, 1, 3), (2, 3, 5, 1), (2, 2, 2, 2)),
    ((1, 3, 2, 3), (3, 2, 1, 5), (2, 3, 1, 4)),
]
"""Row modes, column modes and ranks: orders 1 to 4, rectangular, odd modes, modes of one, uniform ranks and not."""

SQUARE_RINGS = [
    ((7,), (3,)),
    ((3, 5), (2, 2)),
    ((5, 3), (2, 3)),
    ((3, 5, 2), (2, 2, 2)),
    ((3, 1, 5), (2, 8, 2)),
    ((3, 2, 1, 3), (2, 3, 1, 4)),
]
"""Modes and ranks of square tensor-ring matrices."""


class LargestTensor(TorchDispatchMode):
    """Records the number of entries of the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, Tensor):
                self.entries = max(self.entries, item.numel())
        return result


# --- members: one line here for every member of a registry -------------------------------------------------------------

IN, OUT = 45, 28
"""The layer of the law tests: rectangular, with odd input modes."""


@dataclass(frozen=True)
class Member:
    """How the tests make one transform or residual for the layer `IN → OUT`."""

    fields: Mapping[str, Any]
    exact: bool = True
    """Whether its dense start is the base to the last bit; otherwise to rounding."""
    exact_factored: bool = True
    """Whether its factored start is: a ring of rank above 2 sums more than four equal parts, which rounds."""
    parameters: int = 0
    """How many it has, counted by hand."""

    @property
    def type(self) -> str:
        return self.fields["type"]

    def __str__(self) -> str:
        return "-".join(_brief(value) for value in self.fields.values() if value is not None)


def _brief(value: Any) -> str:
    if isinstance(value, Mapping):
        return "x".join(_brief(item) for item in value.values())
    return "_".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


TRANSFORMS = [
    Member({"type": "identity"}),
    Member({"type": "diagonal"}, parameters=45),
    Member({"type": "block_orthogonal", "block_size": 3}, parameters=15 * 3),
    Member({"type": "block_orthogonal", "block_size": 9}, parameters=5 * 36),
    Member({"type": "tensor_ring", "order": 1, "rank": 2, "modes": None}, parameters=45 * 45 * 4),
    Member({"type": "tensor_ring", "order": 2, "rank": [2, 3], "modes": [9, 5]}, False, False, 106 * 6),
    Member({"type": "tensor_ring", "order": 3, "rank": 2, "modes": None}, parameters=(9 + 9 + 25) * 4),
    Member({"type": "block_orthogonal", "block_size": 5, "neumann_terms": 5}, parameters=9 * 10),
    Member({"type": "block_orthogonal", "block_size": 9, "shared": True}, parameters=36),
    Member({"type": "butterfly", "block_size": 5, "factors": 1}, parameters=9 * 10),
    Member({"type": "householder", "rank": 4}, False, False, 4 * 45),
    Member({"type": "low_rank", "rank": 3, "alpha": 7.0}, parameters=2 * 3 * 45),
    Member({"type": "tensor_ring", "order": 3, "rank": [2, 8, 2], "modes": [5, 3, 3]}, True, False, 544 + 36),
    Member(
        {"type": "tensor_ring", "order": 4, "rank": [2, 3, 1, 4], "modes": [3, 1, 5, 3]},
        False,
        False,
        54 + 3 + 100 + 72,
    ),
]
"""Every registered transform, in the shapes that could go wrong."""

RESIDUALS = [
    Member({"type": "none"}),
    Member({"type": "low_rank", "rank": 4, "alpha": None}, parameters=4 * (IN + OUT)),
    Member({"type": "low_rank", "rank": 3, "alpha": 7.0}, parameters=3 * (IN + OUT)),
    Member({"type": "tensor_ring", "order": 1, "rank": [2, 3], "modes": None}, parameters=6 * (IN + OUT)),
    Member(
        {"type": "tensor_ring", "order": 2, "rank": 3, "modes": {"row": [7, 4], "column": [5, 9]}}, parameters=25 * 9
    ),
    Member({"type": "tensor_ring", "order": 3, "rank": 2, "modes": None}, parameters=4 * (2 + 2 + 7 + 3 + 3 + 5)),
    Member({"type": "hadamard", "rank": 3, "alpha": 2.0, "kernel": None}, parameters=2 * 3 * (IN + OUT)),
    Member({"type": "hadamard", "rank": 2, "alpha": None, "kernel": [1, 3]}, parameters=4 * (28 + 15) + 2 * 12),
    Member({"type": "kronecker", "rank": None, "alpha": None, "modes": None, "both": False}, parameters=2 * 5 + 14 * 9),
    Member(
        {"type": "kronecker", "rank": 2, "alpha": 5.0, "modes": {"row": [7, 4], "column": [5, 9]}, "both": True},
        parameters=2 * (7 + 5 + 4 + 9),
    ),
    Member(
        {
            "type": "tensor_ring",
            "order": 4,
            "rank": [2, 3, 1, 4, 2, 1, 3, 2],
            "modes": {"row": [2, 7, 1, 2], "column": [3, 1, 5, 3]},
        },
        parameters=2 * 6 + 7 * 3 + 4 + 2 * 8 + 3 * 2 + 3 + 5 * 6 + 3 * 4,
    ),
]
"""Every registered residual, in the shapes that could go wrong."""

MAGNITUDES = [
    Member({"type": "none"}),
    Member({"type": "norm"}, parameters=OUT),
    Member({"type": "scale", "bias": False}, parameters=OUT),
    Member({"type": "scale", "bias": True}, parameters=OUT),
]
"""Every registered magnitude."""


OUTPUT_TRANSFORMS = [
    Member({"type": "diagonal"}, parameters=28),
    Member({"type": "block_orthogonal", "block_size": 7}, parameters=4 * 21),
    Member({"type": "block_orthogonal", "block_size": 4, "shared": True}, parameters=6),
    Member({"type": "butterfly", "block_size": 2, "factors": 2}, parameters=2 * 14),
    Member({"type": "householder", "rank": 2}, False, False, 2 * 28),
    Member({"type": "low_rank", "rank": 3, "alpha": None}, parameters=2 * 3 * 28),
    Member({"type": "tensor_ring", "order": 2, "rank": [2, 3], "modes": [4, 7]}, False, False, (16 + 49) * 6),
]
"""Every transform that is not the identity, on the outputs."""


def spec_of(
    transform: Member | None = None,
    residual: Member | None = None,
    magnitude: Member | None = None,
    output_transform: Member | None = None,
) -> AdapterSpec:
    """The adapter spec of some members; None is the trivial one."""
    parts = {
        "transform": transform,
        "residual": residual,
        "magnitude": magnitude,
        "output_transform": output_transform,
    }
    return AdapterSpec.from_dict({part: member.fields for part, member in parts.items() if member is not None})


def adapter_of(
    transform: Member | None = None,
    residual: Member | None = None,
    seed: int = 0,
    magnitude: Member | None = None,
    weight: Tensor | None = None,
    output_transform: Member | None = None,
) -> LayerAdapter:
    """The adapter `IN → OUT` at its start, float32."""
    spec = spec_of(transform, residual, magnitude, output_transform)
    return LayerAdapter.from_spec(spec, IN, OUT, torch.Generator().manual_seed(seed), weight)


AnyModule = TypeVar("AnyModule", bound=nn.Module)


def trained(module: AnyModule, seed: int = 1, amount: float = 0.3) -> AnyModule:
    """The module in float64, every parameter moved at random, so that no law holds for being at the start."""
    module.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += amount * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return module


def dense_matrix(transform: AbstractTransform) -> Tensor:
    return transform.matrix().detach().double()


def dense_delta(residual: AbstractResidual) -> Tensor:
    return residual.delta().detach().double()


# --- a small model -----------------------------------------------------------------------------------------------------

HIDDEN, CONTEXT, INNER = 12, 15, 20
"""Widths of the small model: every one of its linear layers is rectangular."""


class _Attention(nn.Module):
    def __init__(self, context: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(HIDDEN, INNER, bias=False)
        self.to_k = nn.Linear(context, INNER, bias=False)
        self.to_v = nn.Linear(context, INNER, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(INNER, HIDDEN), nn.Dropout(0.0)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y = nn.functional.scaled_dot_product_attention(self.to_q(x), self.to_k(context), self.to_v(context))
        for module in self.to_out:
            y = module(y)
        return y


class _Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(HIDDEN, 2 * INNER)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, -1)
        return value * torch.sigmoid(gate)


class _FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([_Gate(), nn.Dropout(0.0), nn.Linear(INNER, HIDDEN)])

    def forward(self, x: Tensor) -> Tensor:
        for module in self.net:
            x = module(x)
        return x


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1 = _Attention(HIDDEN)
        self.attn2 = _Attention(CONTEXT)
        self.ff = _FeedForward()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(x, x)
        x = x + self.attn2(x, context)
        return x + self.ff(x)


class _Attentions(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(9, HIDDEN)
        self.transformer_blocks = nn.ModuleList(_Block() for _ in range(blocks))
        self.proj_out = nn.Linear(HIDDEN, 9)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y = self.proj_in(x)
        for block in self.transformer_blocks:
            y = block(y, context)
        return x + self.proj_out(y)


class _Down(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([_Attentions(blocks)])


class TinyUNet(nn.Module):
    """The module paths of a diffusers UNet on rectangular layers: `(batch, tokens, 9) → (batch, tokens, 9)`."""

    def __init__(self, blocks: int = 1) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([_Down(blocks)])
        self.norm = nn.LayerNorm(9)

    def forward(self, sample: Tensor, context: Tensor) -> Tensor:
        for down in self.down_blocks:
            assert isinstance(down, _Down)
            for attention in down.attentions:
                sample = attention(sample, context)
        return self.norm(sample)


BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
"""The path of the small model's first transformer block."""

ATTENTION_PATHS = [f"{BLOCK}.attn{n}.{leaf}" for n in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out.0")]
"""The paths that the `attention` preset chooses in a small model of one block."""


def tiny_unet(seed: int = 0, blocks: int = 1) -> TinyUNet:
    """The small model with seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyUNet(blocks)


def tiny_inputs(seed: int = 0, batch: int = 3) -> tuple[Tensor, Tensor]:
    """Inputs of the small model."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 7, 9, generator=generator), torch.randn(batch, 5, CONTEXT, generator=generator)


# --- comparisons -------------------------------------------------------------------------------------------------------


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor, so that −0 and +0, or two NaN, are told apart."""
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def state_bits(module: nn.Module) -> dict[str, bytes]:
    """The bytes of every tensor in a module's state."""
    return {name: bits(tensor) for name, tensor in module.state_dict().items()}


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """How many representable numbers lie between the entries of two half-precision tensors."""
    assert a.dtype == b.dtype
    assert a.element_size() == 2
    lines = []
    for tensor in (a, b):
        code = tensor.contiguous().view(torch.int16).int()
        lines.append(torch.where(code < 0, -(code & 0x7FFF), code))  # sign and magnitude → a line of integers
    return (lines[0] - lines[1]).abs()


def permutations_of(items: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Some orders of `items`: as given, reversed, and rotated."""
    yield tuple(items)
    yield tuple(reversed(items))
    yield (*items[1:], items[0])
