"""The methods that are compared, as trlora's transforms and residuals, and how each is cut to a budget of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from trlora import AdapterSpec
from trlora.layers import LayerAdapter
from trlora.residuals.tensor_ring import TensorRingResidual
from trlora.training import Penalty

BUDGETS = (6_880, 13_440, 26_880)
"""Parameters of an adapter: LoRA of rank 3 and 6 for the last two, of 1 and 2 by turns for the first."""

Start = Literal["zero", "loretta", "small"]
Rungs = Callable[[int, int], list[AdapterSpec]]


@dataclass(frozen=True)
class Method:
    """One method in all its sizes.

    `rungs` gives the specs for a layer (in, out) from few parameters to many; `family` is the method whose learning rate it
    takes; `start` says what the residual starts from (see `started`).
    """

    title: str
    rungs: Rungs
    family: str
    start: Start = "zero"
    penalty_kind: Penalty = "identity"
    penalty_weight: float = 0.0


def _spec(transform: dict[str, Any] | None = None, residual: dict[str, Any] | None = None, **parts: Any) -> AdapterSpec:
    given = {"transform": transform, "residual": residual, **parts}
    return AdapterSpec.from_dict({name: fields for name, fields in given.items() if fields is not None})


def _ring(rank: int) -> dict[str, Any]:
    return {"type": "tensor_ring", "rank": rank}


def _low_rank(rank: int) -> dict[str, Any]:
    return {"type": "low_rank", "rank": rank}


def _lora(_in: int, _out: int) -> list[AdapterSpec]:
    return [_spec(residual=_low_rank(rank)) for rank in range(1, 17)]


def _dora(_in: int, _out: int) -> list[AdapterSpec]:
    return [_spec(residual=_low_rank(rank), magnitude={"type": "norm"}) for rank in range(1, 17)]


def _oft(features: int, _out: int) -> list[AdapterSpec]:
    sizes = [size for size in range(2, features + 1) if features % size == 0]
    return [_spec({"type": "block_orthogonal", "block_size": size}) for size in sizes]


def _boft(features: int, _out: int) -> list[AdapterSpec]:
    """Butterflies of two factors or more (with one it is OFT), one for each number of parameters."""
    found: dict[int, AdapterSpec] = {}
    for factors in range(2, 7):
        for size in range(2, features, 2):
            if features % (size * 2 ** (factors - 1)) == 0:
                spec = _spec({"type": "butterfly", "block_size": size, "factors": factors})
                found.setdefault(factors * features * (size - 1) // 2, spec)
    return [found[count] for count in sorted(found)]


def _ring_residual(_in: int, _out: int) -> list[AdapterSpec]:
    return [_spec(residual=_ring(rank)) for rank in range(1, 9)]


def _tlora_star(_in: int, _out: int) -> list[AdapterSpec]:
    ranks = [(1, 1), (1, 2), *((2, rank) for rank in range(1, 13))]
    return [_spec(_ring(transform), _low_rank(residual)) for transform, residual in ranks]


def _tlora(_in: int, _out: int) -> list[AdapterSpec]:
    ranks = [(1, 1), (1, 2), *((2, rank) for rank in range(2, 8))]
    return [_spec(_ring(transform), _ring(residual)) for transform, residual in ranks]


def _tlora_rank_1(_in: int, _out: int) -> list[AdapterSpec]:
    return [_spec(_ring(1), _ring(rank)) for rank in range(1, 8)]


def _nothing(_in: int, _out: int) -> list[AdapterSpec]:
    return [_spec()]


PENALTY = 1e-4
METHODS = {
    "lora": Method("LoRA", _lora, "lora"),
    "dora": Method("DoRA", _dora, "dora"),
    "oft": Method("OFT", _oft, "oft"),
    "boft": Method("BOFT", _boft, "boft"),
    "loretta": Method("LoRETTA-like: TR, random start", _ring_residual, "loretta", start="loretta"),
    "tr": Method("TR, zero start", _ring_residual, "tr"),
    "tlora_star": Method("TLoRA*: TRM + LoRA", _tlora_star, "tlora_star", penalty_weight=PENALTY),
    "tlora": Method("TLoRA: TRM + TR", _tlora, "tlora", penalty_weight=PENALTY),
}
"""What is compared at every budget."""

CLAIMS = {
    "tr_small": Method("TR, small random start", _ring_residual, "tr", start="small"),
    "tlora_random": Method("TLoRA, random start of TR", _tlora, "loretta", start="loretta", penalty_weight=PENALTY),
    "tlora_rank_1": Method("TLoRA, TRM of rank 1", _tlora_rank_1, "tlora", penalty_weight=PENALTY),
    "tlora_no_penalty": Method("TLoRA, no penalty", _tlora, "tlora"),
    "tlora_identity": Method("TLoRA, identity penalty x10", _tlora, "tlora", penalty_weight=10 * PENALTY),
    "tlora_orthogonal": Method("TLoRA, orthogonal penalty", _tlora, "tlora", "zero", "orthogonal", PENALTY),
    "tlora_orthogonal_10": Method("TLoRA, orthogonal penalty x10", _tlora, "tlora", "zero", "orthogonal", 10 * PENALTY),
}
"""What is compared at the middle budget only, each for one claim."""

NOTHING = {"nothing": Method("no adapter", _nothing, "lora")}
"""The base, and what is trained beside the adapter, alone."""

ALL_METHODS = {**METHODS, **CLAIMS, **NOTHING}

Shapes = Mapping[str, tuple[int, int]]


def parameters_of(spec: AdapterSpec, shape: tuple[int, int]) -> int:
    """The number of parameters of one layer's adapter; shape is (out, in)."""
    adapter = LayerAdapter.from_spec(spec, shape[1], shape[0], torch.Generator(), torch.ones(shape))
    return sum(parameter.numel() for parameter in adapter.parameters())


def fitted(method: Method, budget: int, shapes: Shapes) -> dict[str, AdapterSpec]:
    """One spec for each layer (path → (out, in)), so that all together have `budget` parameters.

    A layer's share goes by in + out, as LoRA's does. A layer takes the size nearest to its share and what the layers before
    it left over or overdrew, so sizes alternate along the model where no single one fits.
    """
    total = sum(map(sum, shapes.values()))
    rungs: dict[tuple[int, int], list[tuple[int, AdapterSpec]]] = {}
    for out, inputs in set(shapes.values()):
        specs = method.rungs(inputs, out)
        rungs[out, inputs] = [(parameters_of(spec, (out, inputs)), spec) for spec in specs]
    chosen, owed = {}, 0.0
    for path, shape in shapes.items():
        owed += budget * sum(shape) / total
        size, chosen[path] = min(rungs[shape], key=lambda rung: abs(rung[0] - owed))
        owed -= size
    return chosen


def started(adapter: LayerAdapter, start: Start, generator: torch.Generator) -> LayerAdapter:
    """The adapter with its ring residual started as the method has it.

    "zero" is trlora's own start (the paper's: the first core zero). "loretta" is that of LoRETTA's released code, carried
    over to a ring: every core normal, so that the entries of Δ have the variance 1 / (in + out). "small" fills the first
    core too with the paper's own deviation `√n_out / n_in`.
    """
    residual = adapter.residual
    if start == "zero":
        return adapter
    assert isinstance(residual, TensorRingResidual)
    cores = [*residual.row_core, *residual.column_core]
    deviation = (residual.in_features + residual.out_features) ** -0.5
    with torch.no_grad():
        for d, core in enumerate(cores):
            mode, rank, following = core.shape
            if start == "loretta":
                scale = deviation ** (1 / len(cores)) / math.sqrt(following)
            elif d == 0:
                scale = math.sqrt(following) / (mode * rank)
            else:
                continue
            core.copy_(torch.randn(core.shape, generator=generator) * scale)
    return adapter
