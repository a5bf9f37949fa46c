"""What float32 means here: 24 bits in every product, on a GPU too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trexport.io_spec import ModelSpec


def is_float32(spec: ModelSpec) -> bool:
    """Whether a model gives float32 out, so that nobody expects less of what is inside."""
    return any(tensor.dtype == "fp32" for tensor in spec.outputs)


@contextmanager
def full_float32() -> Iterator[None]:
    """Products and convolutions of float32 on CUDA without TF32, whose eleven bits are a relative error of 4e-4 of a UNet's
    step; torch lets cuDNN take it unless told otherwise. The switches are the process's."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = products.fp32_precision, convolutions.fp32_precision
    products.fp32_precision = convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        products.fp32_precision, convolutions.fp32_precision = before
