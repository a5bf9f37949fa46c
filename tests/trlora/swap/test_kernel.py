"""The kernel's source compiles for every GPU that it is for; NVRTC needs none."""

from __future__ import annotations

import pytest
import torch

from trlora.swap.nvrtc import compile_cubin, missing
from trlora.swap.variant import Variant

pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")

VARIANTS = [
    Variant(1280, 1280, 80, False, (4,), (3,)),
    Variant(320, 320, 32, True, (4,), (3,)),
    Variant(1280, 1280, 80, False, (4, 4), (3, 3), (0, 0)),  # its transforms' factors do not fit into registers
    Variant(640, 640, 64, False, (1, 0), (0, 0), (3, 1)),
    Variant(5120, 1280, 128, True, low_rank_steps=(1,)),
    Variant(64, 64, 64, False, (1, 2, 0), (1, 0, 2), (0, 0, 0)),
]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: f"{variant.stride}-{variant.terms}")
def test_it_compiles(variant: Variant, capability: tuple[int, int]) -> None:
    fitted = variant.fitted()
    assert fitted is not None
    assert compile_cubin(fitted, capability).startswith(b"\x7fELF")


def test_without_a_gpu_it_says_so() -> None:
    assert missing(torch.device("cpu")) == "no kernel for cpu"
