"""`config.pbtxt`, what Triton reads about a model, from plain values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, final

from trexport.io_spec import TensorDtype, TensorSpec

TritonType = Literal["TYPE_FP32", "TYPE_FP16", "TYPE_BF16", "TYPE_INT64", "TYPE_INT32", "TYPE_STRING"]
TYPES: dict[TensorDtype, TritonType] = {
    "fp32": "TYPE_FP32",
    "fp16": "TYPE_FP16",
    "bf16": "TYPE_BF16",
    "int64": "TYPE_INT64",
}


@final
@dataclass(frozen=True)
class Port:
    """One input or output of a served model; the batch comes before `dims`."""

    name: str
    type: TritonType
    dims: tuple[int, ...]
    """Sizes without the batch, −1 for a free one."""
    optional: bool = False
    scalar: bool = False
    """One number a sample: clients send (batch, 1), the model sees (batch,)."""

    @classmethod
    def of(cls, tensor: TensorSpec) -> Port:
        """A UNet's input or output; a timestep becomes one for each sample, whatever the model takes."""
        if len(tensor.axes) < 2:
            return cls(tensor.name, TYPES[tensor.dtype], (1,), scalar=True)
        dims = tuple(axis if isinstance(axis, int) else -1 for axis in tensor.axes[1:])
        return cls(tensor.name, TYPES[tensor.dtype], dims)

    def to_pbtxt(self) -> str:
        parts = [f"name: {_text(self.name)}", f"data_type: {self.type}", f"dims: {list(self.dims)}"]
        parts += ["reshape: { shape: [] }"] if self.scalar else []
        parts += ["optional: true"] if self.optional else []
        return "{ " + ", ".join(parts) + " }"


@final
@dataclass(frozen=True)
class WarmUp:
    """A run on zeros before the model is called ready."""

    inputs: tuple[Port, ...]
    """With every size fixed."""

    def to_pbtxt(self) -> str:
        entries = [
            f"  inputs {{ key: {_text(port.name)}, value: {{ data_type: {port.type}, dims: {list(port.dims)}, "
            "zero_data: true } }"
            for port in self.inputs
        ]
        return "\n".join(['model_warmup {\n  name: "zeros"\n  batch_size: 1', *entries, "}"])


@final
@dataclass(frozen=True)
class ModelConfig:
    """One model of a repository."""

    name: str
    backend: Literal["python", "onnxruntime", "tensorrt"]
    max_batch: int
    """Samples that run together, at least 1."""
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    gpu: bool = False
    instances: int = 1
    queue_delay_us: int = 0
    """How long a request may wait for others that it could run with."""
    warm_up: WarmUp | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)

    def to_pbtxt(self) -> str:
        """In protobuf's text format."""
        lines = [
            f"name: {_text(self.name)}",
            f"backend: {_text(self.backend)}",
            f"max_batch_size: {self.max_batch}",
            *[f"input {port.to_pbtxt()}" for port in self.inputs],
            *[f"output {port.to_pbtxt()}" for port in self.outputs],
            f"instance_group {{ kind: {'KIND_GPU' if self.gpu else 'KIND_CPU'}, count: {self.instances} }}",
            f"dynamic_batching {{ max_queue_delay_microseconds: {self.queue_delay_us} }}",
            "version_policy { latest { num_versions: 1 } }",
            *([self.warm_up.to_pbtxt()] if self.warm_up is not None else []),
            *[
                f"parameters {{ key: {_text(key)}, value: {{ string_value: {_text(value)} }} }}"
                for key, value in sorted(self.parameters.items())
            ],
        ]
        return "\n".join(lines) + "\n"


def _text(value: str) -> str:
    return json.dumps(value)  # protobuf's text format has the same escapes for what JSON escapes in ASCII
