"""The model of a UNet: Triton's own backend for its format, or Session in the python backend."""

from __future__ import annotations

import json
from typing import Any, Literal

from trexport.artifact import Artifact
from trexport.deploy.config import ModelConfig, Port, WarmUp
from trexport.deploy.names import ADAPTER, STRENGTH
from trexport.deploy.options import TritonOptions
from trexport.errors import UsageError
from trexport.io_spec import ADAPTER_INDEX, ADAPTER_STRENGTH
from trexport.models.architectures import default_sizes

Engine = Literal["python", "onnxruntime", "tensorrt"]

MODEL_PY = '''"""A model of Triton's python backend. All of it is in trexport, which the server's Python must have."""

from trexport.deploy.serve.{module} import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def unet_config(artifact: Artifact, options: TritonOptions) -> ModelConfig:
    """The configuration of a UNet's model.

    Raises:
        UsageError: Triton's own backend is asked for and cannot serve the artifact, or an engine is for another device.
    """
    manifest = artifact.manifest
    if manifest.kind == "engine" and artifact.engine_record.device != options.device:
        own = artifact.engine_record.device
        raise UsageError(
            f"{artifact.folder}: the engine was built for {own}, not for {options.device}; use --device {own}"
        )
    backend = _backend(artifact, options)
    chosen = (ADAPTER_INDEX, ADAPTER_STRENGTH)
    inputs = [Port.of(tensor) for tensor in manifest.io.inputs if tensor.name not in chosen]
    zeros = tuple(Port(port.name, port.type, usual_shape(artifact, port.name), scalar=port.scalar) for port in inputs)
    parameters: dict[str, str] = {}
    if backend == "python":
        parameters = {"device": options.device, "adapters_in_memory": str(options.adapters_in_memory)}
        parameters |= python_parameters(options)
    if manifest.form in ("factored", "swappable"):
        inputs += _ADAPTER_PORTS
    parameters["trexport"] = json.dumps(_record(artifact))
    return ModelConfig(
        options.name,
        backend,
        _max_batch(artifact, options),
        tuple(inputs),
        tuple(Port.of(tensor) for tensor in manifest.io.outputs),
        options.device == "cuda",
        options.instances,
        options.queue_delay_us,
        WarmUp(zeros),
        parameters,
    )


_ADAPTER_PORTS = [
    Port(ADAPTER, "TYPE_STRING", (-1,), optional=True),
    Port(STRENGTH, "TYPE_FP32", (-1,), optional=True),
]


def _backend(artifact: Artifact, options: TritonOptions) -> Engine:
    """Triton's own backend where there is one for the artifact."""
    reason = _why_not_native(artifact, options)
    if options.native and reason is not None:
        raise UsageError(f"{artifact.folder}: --native: {reason}; or serve it with --python")
    if reason is not None or options.native is False:
        return "python"
    return "onnxruntime" if artifact.manifest.kind == "onnx" else "tensorrt"


def _why_not_native(artifact: Artifact, options: TritonOptions) -> str | None:
    manifest = artifact.manifest
    if manifest.form not in ("base", "merged"):
        return f"the adapters of a {manifest.form} artifact are chosen by trexport's own code"
    if manifest.kind == "engine":
        record = artifact.engine_record
        if record.backend != "tensorrt":
            return f"Triton has no backend for engines of {record.backend}"
        if len(record.profiles) != 1 or record.profiles[0].min["batch_size"] > 1:
            return "the engine needs one profile that takes one sample too; build it with --profile"
    io = {tensor.name: tensor for tensor in manifest.io.inputs}
    if not io["timestep"].axes:
        return "its timestep is one for the whole batch, which Triton cannot batch; export with --timestep-per-sample"
    if isinstance(manifest.io.batch, int):
        return "its batch is fixed; export with the batch left free"
    return None


def _max_batch(artifact: Artifact, options: TritonOptions) -> int:
    """The batch asked for, as far as the artifact goes."""
    batch = artifact.manifest.io.batch
    if isinstance(batch, int):
        return batch
    if artifact.manifest.kind == "engine":
        return min(options.max_batch, max(profile.max["batch_size"] for profile in artifact.engine_record.profiles))
    return options.max_batch


def python_parameters(options: TritonOptions) -> dict[str, str]:
    """Which Python a python model runs in."""
    return {} if options.python_env is None else {"EXECUTION_ENV_PATH": options.python_env}


def _record(artifact: Artifact) -> dict[str, Any]:
    """What a client needs to know to prove a server right: see `trexport.deploy.check`."""
    manifest = artifact.manifest
    return {
        "form": manifest.form,
        "dtype": manifest.dtype,
        "base": vars(manifest.base),
        "adapters": [
            {
                "name": adapter.name,
                "strength": adapter.strength,
                "sha256": adapter.sha256,
                "components": dict(adapter.components),
            }
            for adapter in manifest.adapters
        ],
        "sizes": usual_sizes(artifact),
    }


def usual_sizes(artifact: Artifact) -> dict[str, int]:
    """The UNet's usual sizes, or those that the artifact fixes."""
    config = json.loads((artifact.model_folder / "config.json").read_bytes())
    sizes = default_sizes(config) | artifact.manifest.io.fixed_sizes()
    if artifact.manifest.kind == "engine":
        sizes |= artifact.engine_record.profiles[0].opt
    return sizes


def usual_shape(artifact: Artifact, name: str) -> tuple[int, ...]:
    """The shape of one sample of an input, at the usual sizes; (1,) for a number."""
    tensor = next(tensor for tensor in artifact.manifest.io.inputs if tensor.name == name)
    return tensor.shape(usual_sizes(artifact))[1:] if len(tensor.axes) > 1 else (1,)
