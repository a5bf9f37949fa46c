"""Which ONNX opset an export uses, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from trexport.errors import UsageError
from trexport.io_spec import Dtype

OLDEST, NEWEST = 18, 23
_OLDEST_BF16 = 22


@final
@dataclass(frozen=True)
class OpsetChoice:
    """An opset with the reason for it, as it goes into the manifest."""

    opset: int
    reason: str


def choose_opset(dtype: Dtype, asked: int | None = None) -> OpsetChoice:
    """The opset for a precision, unless one is asked for.

    Raises:
        UsageError: an opset outside 18 to 23, or below 22 for bfloat16.
    """
    oldest = _OLDEST_BF16 if dtype == "bf16" else OLDEST
    if asked is not None:
        if not oldest <= asked <= NEWEST:
            raise UsageError(f"opset {asked} asked for, expected {oldest} to {NEWEST} in {dtype}")
        return OpsetChoice(asked, "asked for")
    if dtype == "fp32":
        return OpsetChoice(
            23, "its Attention and GroupNormalization are single nodes, fastest in ONNX Runtime on a CPU"
        )
    if dtype == "bf16":
        return OpsetChoice(22, "the oldest whose Conv takes bfloat16; attention as plain products, as in fp16")
    return OpsetChoice(
        20, "has Gelu, and attention as plain products: ONNX Runtime's CUDA Attention of opset 23 is wrong in fp16"
    )
