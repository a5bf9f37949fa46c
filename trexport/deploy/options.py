"""How an artifact is to be served."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

from trexport.backends import Device


@final
@dataclass(frozen=True)
class TritonOptions:
    """How to serve."""

    name: str = "unet"
    """Of the UNet's model; `<name>_image` denoises."""
    adapters: Path | None = None
    """A folder of checkpoints, `NAME/` or `NAME.safetensors`, to lay beside the model."""
    adapters_in_memory: int = 16
    max_batch: int = 8
    instances: int = 1
    queue_delay_us: int = 0
    device: Device = "cpu"
    python_env: str | None = None
    """A virtual environment on the server for its python models; the first `python3` on the server's PATH unless given."""
    native: bool | None = None
    """Triton's own backend for the model's format, or (False) the python backend; None for what fits."""
    image: bool = True
    """Add the model that denoises."""
    image_instances: int = 2
