"""What PEFT makes of small models with rectangular layers of every kind, and of a UNet: the oracle of its formats."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn


class Layers(nn.Module):
    """Linear layers with and without a bias, and convolutions of several geometries."""

    def __init__(self) -> None:
        super().__init__()
        self.to_k = nn.Linear(24, 20, bias=False)
        self.ff = nn.Linear(24, 16)
        self.conv1 = nn.Conv2d(8, 12, 1)
        self.conv3 = nn.Conv2d(8, 12, 3, padding=1)
        self.strided = nn.Conv2d(8, 20, 3, stride=2, padding=1, bias=False)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.dilated = nn.Conv2d(8, 12, 3, dilation=2)

    def forward(self, x: Tensor, image: Tensor) -> dict[str, Tensor]:
        return {name: module(x if name in LINEAR else image) for name, module in self.named_children()}


LINEAR = ["to_k", "ff"]
CONVOLUTIONS = ["conv1", "conv3", "strided"]
ODD = ["grouped", "dilated"]
"""Convolutions that only some of PEFT's methods take."""


@dataclass(frozen=True)
class Case:
    """One way to write an adapter of PEFT."""

    config: Callable[..., Any]
    fields: dict[str, Any] = field(default_factory=dict)
    odd: Sequence[str] = ()
    """Convolutions of `ODD` that the method takes."""
    wrong_forward: Sequence[str] = ()
    """Layers of which PEFT's own forward is not that of its merged weight."""
    amount: float = 0.3
    limit: float = 1e-12
    """Of the difference, relative to the greatest entry."""
    needs_kernel: bool = False
    """Whether PEFT needs its CUDA kernel for it."""


CASES: dict[str, Case] = {
    "LoRA": Case(peft.LoraConfig, {"r": 3, "lora_alpha": 5}),
    "LoRA, patterns": Case(
        peft.LoraConfig,
        {
            "r": 3,
            "lora_alpha": 5,
            "rank_pattern": {"ff": 2, "conv.": 5},
            "alpha_pattern": {r"to_\w": 7, "strided": 1.5},
        },
    ),
    "rsLoRA": Case(peft.LoraConfig, {"r": 3, "lora_alpha": 5, "use_rslora": True}),
    "LoRA, fan in, fan out": Case(peft.LoraConfig, {"r": 3, "fan_in_fan_out": True}),
    "DoRA": Case(peft.LoraConfig, {"r": 3, "use_dora": True}),
    "DoRA, rank-stable": Case(
        peft.LoraConfig, {"r": 2, "use_dora": True, "use_rslora": True, "rank_pattern": {"ff": 4}}
    ),
    "OFT": Case(peft.OFTConfig, {"oft_block_size": 4}, wrong_forward=["conv3", "strided"]),
    "OFT, exact": Case(
        peft.OFTConfig, {"oft_block_size": 8, "use_cayley_neumann": False}, wrong_forward=["conv3", "strided"]
    ),
    "OFT, by number of blocks, short series": Case(
        peft.OFTConfig,
        {"r": 2, "oft_block_size": 0, "num_cayley_neumann_terms": 3},
        wrong_forward=["conv3", "strided"],
        amount=0.1,
    ),
    "OFT, one block": Case(
        peft.OFTConfig, {"oft_block_size": 4, "block_share": True}, wrong_forward=["conv3", "strided"]
    ),
    "OFT, constrained": Case(
        peft.OFTConfig,
        {"oft_block_size": 4, "coft": True, "eps": 0.7},
        wrong_forward=["conv3", "strided"],
        limit=1e-6,  # PEFT takes a root in float32
    ),
    "BOFT": Case(peft.BOFTConfig, {"boft_block_size": 4}),
    "BOFT, by number of blocks": Case(peft.BOFTConfig, {"boft_block_size": 0, "boft_block_num": 4}),
    "BOFT, two factors": Case(peft.BOFTConfig, {"boft_block_size": 4, "boft_n_butterfly_factor": 2}, needs_kernel=True),
    "BOFT, three factors": Case(
        peft.BOFTConfig, {"boft_block_size": 2, "boft_n_butterfly_factor": 3}, needs_kernel=True
    ),
    "LoHa": Case(peft.LoHaConfig, {"r": 2, "alpha": 3}, odd=ODD),
    "LoHa, Tucker": Case(
        peft.LoHaConfig, {"r": 2, "alpha": 3, "use_effective_conv2d": True, "alpha_pattern": {"ff": 4}}, odd=ODD
    ),
    "LoKr": Case(peft.LoKrConfig, {"r": 1, "alpha": 3}, odd=ODD),
    "LoKr, whole": Case(peft.LoKrConfig, {"r": 16, "alpha": 3}, odd=ODD),
    "LoKr, both factored, Tucker": Case(
        peft.LoKrConfig,
        {"r": 1, "alpha": 3, "decompose_both": True, "use_effective_conv2d": True, "rank_pattern": {"ff": 2}},
        odd=ODD,
        amount=0.8,
    ),
    "LoKr, another factor": Case(peft.LoKrConfig, {"r": 2, "decompose_factor": 2}, odd=ODD),
    "HRA": Case(peft.HRAConfig, {"r": 4}),
    "HRA, odd and orthogonal": Case(peft.HRAConfig, {"r": 3, "apply_GS": True}),
    "(IA)³": Case(peft.IA3Config, {"feedforward_modules": ["ff", "conv1", "strided"]}, odd=ODD),
    "(IA)³, by expression": Case(peft.IA3Config, {"feedforward_modules": r"(ff|conv3)"}, odd=ODD),
}

METHODS = ["LoRA", "DoRA", "OFT", "BOFT", "LoHa, Tucker", "LoKr, both factored, Tucker", "HRA", "(IA)³"]
"""A case of each method."""


def put_kernel(monkeypatch: pytest.MonkeyPatch, *, there: bool) -> None:
    """PEFT's BOFT with more than one factor needs its CUDA kernel, which puts blocks on a diagonal; without it, it takes one
    factor, whatever its config says."""
    kernel = SimpleNamespace(forward=lambda blocks: [torch.stack([torch.block_diag(*factor) for factor in blocks])])
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: kernel if there else None)


def adapted_by_peft(model: nn.Module, case: Case, targets: Any, seed: int = 1) -> Any:
    """A copy of a model with an adapter of PEFT, every parameter of which is moved at random."""
    config = case.config(target_modules=targets, **case.fields)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False)  # type: ignore[arg-type]
    wrapped.to(next(model.parameters()).dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter += case.amount * noise
    return wrapped


def save(wrapped: Any, folder: Path) -> Path:
    """The folder that PEFT writes."""
    wrapped.save_pretrained(folder)
    return folder
