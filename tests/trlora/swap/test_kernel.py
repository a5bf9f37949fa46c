"""The kernel's source compiles for every GPU that it is for; NVRTC needs none."""

from __future__ import annotations

import pytest
import torch

from trlora.swap.nvrtc import compile_cubin, missing
from trlora.swap.variant import Variant

pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")

VARIANTS = [
    Variant(1280, 1280, 80, False, terms=4, ring_pairs=3),
    Variant(320, 320, 32, True, terms=4, ring_pairs=3),
    Variant(640, 640, 64, False, adapters=2, terms=1, low_rank_steps=3),
    Variant(5120, 1280, 128, True, low_rank_steps=1),
    Variant(64, 64, 64, False, adapters=3, terms=1, ring_pairs=1),
]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: f"{variant.stride}-{variant.terms}")
def test_it_compiles(variant: Variant, capability: tuple[int, int]) -> None:
    fitted = variant.fitted()
    assert fitted is not None
    assert compile_cubin(fitted, capability).startswith(b"\x7fELF")


def test_without_a_gpu_it_says_so() -> None:
    assert missing(torch.device("cpu")) == "no kernel for cpu"
