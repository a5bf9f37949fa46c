"""Which ONNX opset an export uses, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from trexport.errors import UsageError
from trexport.io_spec import Dtype

OLDEST, NEWEST = 18, 23


@final
@dataclass(frozen=True)
class OpsetChoice:
    """An opset with the reason for it, as it goes into the manifest."""

    opset: int
    reason: str


def choose_opset(dtype: Dtype, asked: int | None = None) -> OpsetChoice:
    """The opset for a precision, unless one is asked for.

    Raises:
        UsageError: an opset outside 18 to 23.
    """
    if asked is not None:
        if not OLDEST <= asked <= NEWEST:
            raise UsageError(f"opset {asked} asked for, expected {OLDEST} to {NEWEST}")
        return OpsetChoice(asked, "asked for")
    if dtype == "fp32":
        return OpsetChoice(
            23, "its Attention and GroupNormalization are single nodes, fastest in ONNX Runtime on a CPU"
        )
    return OpsetChoice(
        20, "has Gelu, and attention as plain products: ONNX Runtime's CUDA Attention of opset 23 is wrong in fp16"
    )
