"""Weights without a model: what tensors there are, and each on demand, so that nobody needs all of them in memory."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, final

import safetensors
import torch
from torch import Tensor

from trexport.errors import BaseError
from trexport.io_spec import Dtype
from trlora.checkpoint import why_no_safetensors

# safetensors' names, see its README
TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SAFETENSORS_DTYPES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}
SHORT_DTYPES: dict[Dtype, str] = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


@final
@dataclass(frozen=True)
class Entry:
    """One tensor of a weight file."""

    name: str
    dtype: str
    """safetensors' name, for instance F32."""
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize


class WeightFile(Protocol):
    """A file of tensors, or what would be one."""

    @property
    def name(self) -> str: ...
    @property
    def entries(self) -> Sequence[Entry]: ...
    @property
    def metadata(self) -> Mapping[str, str]: ...
    def tensor(self, name: str) -> Tensor:
        """One tensor; memory-mapped where there is a file."""
        ...

    def place(self, name: str) -> tuple[int, int] | None:
        """Where a tensor's bytes lie: an open file and the offset in it; None where there is no file."""
        ...


@final
class SafetensorsFile:
    """A safetensors file, memory-mapped.

    Raises:
        BaseError: it is no safetensors file, truncated, or corrupt.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        try:
            self._reader = safetensors.safe_open(path, framework="pt")  # checks the header and the size
        except safetensors.SafetensorError as error:
            raise BaseError(f"{path}: {why_no_safetensors(path, error)}") from error
        except OSError as error:
            raise BaseError(f"{path}: cannot be read ({error})") from error
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        self.metadata: Mapping[str, str] = header.pop("__metadata__", {})
        for key, fields in header.items():
            if fields["dtype"] not in TORCH_DTYPES:
                raise BaseError(f"{path}: {key} has dtype {fields['dtype']}, expected one of {sorted(TORCH_DTYPES)}")
        self._stream = path.open("rb")
        self._offsets = {key: 8 + length + fields["data_offsets"][0] for key, fields in header.items()}
        ordered = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        self.entries: Sequence[Entry] = [Entry(key, fields["dtype"], tuple(fields["shape"])) for key, fields in ordered]

    def tensor(self, name: str) -> Tensor:
        return self._reader.get_tensor(name)

    def place(self, name: str) -> tuple[int, int]:
        return self._stream.fileno(), self._offsets[name]


@final
class RandomWeights:
    """Seeded random weights for every parameter of an architecture, each made when it is asked for.

    Linear and convolution weights and biases are uniform in ±1/√fan_in, torch's own start. Norms are perturbed, 1 + 0.1·N
    and 0.1·N, for equal ones hide mistakes. Tables of something else are uniform in ±1. Every parameter has a seed of its
    own, from its name.
    """

    def __init__(
        self, label: str, shapes: Mapping[str, tuple[int, ...]], seed: int = 0, stem: str = "diffusion_pytorch_model"
    ) -> None:
        self.name = f"{stem}.safetensors"
        self.metadata: Mapping[str, str] = {"format": "pt"}
        self.entries: Sequence[Entry] = [Entry(name, "F32", shape) for name, shape in shapes.items()]
        self._shapes = shapes
        self._label = f"{label}, seed {seed}"

    def place(self, name: str) -> None:
        return None

    def tensor(self, name: str) -> Tensor:
        shape = self._shapes[name]
        digest = hashlib.sha256(f"{self._label}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        stem, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):  # a table, of positions for instance
            return torch.empty(shape).uniform_(-1, 1, generator=generator)
        weight_shape = self._shapes.get(f"{stem}.weight", shape)
        if len(weight_shape) == 1:
            noise = torch.randn(shape, generator=generator).mul_(0.1)
            return noise.add_(1) if kind == "weight" else noise
        bound = 1 / math.sqrt(math.prod(weight_shape[1:]))
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
