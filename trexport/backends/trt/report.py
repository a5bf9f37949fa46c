"""What is in an engine: by its inspector where a GPU can load it, otherwise by the network it was built from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

# an engine's layer names the operators in it: "[ONNX Layer: node_linear]" for each
_OPERATOR = re.compile(r"\[ONNX Layer: [^\]]*\]")
_PLAIN = ("CONSTANT", "SHUFFLE", "SHAPE", "IDENTITY")


def layers_of_inspection(text: str) -> tuple[dict[str, Any], ...]:
    """The layers in `IEngineInspector.get_engine_information(JSON)`: `name`, `type`, `precision` (of the first output) and
    `fused`, how many of the model's operators each holds. Engines built with layer names only list mere strings."""
    layers = []
    for layer in json.loads(text)["Layers"]:
        if isinstance(layer, str):
            layers.append({"name": layer, "type": "unknown", "precision": "unknown", "fused": _fused(layer, "")})
            continue
        outputs = layer.get("Outputs") or [{}]
        layers.append(
            {
                "name": layer.get("Name", ""),
                "type": layer.get("LayerType", "unknown"),
                "precision": str(outputs[0].get("Format/Datatype", outputs[0].get("Datatype", "unknown"))),
                "fused": _fused(layer.get("Name", ""), layer.get("Metadata", "")),
            }
        )
    return tuple(layers)


def layers_of_network(network: Any) -> tuple[Mapping[str, Any], ...]:
    """The layers of a parsed network that compute, before the builder fuses them."""
    layers = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind = layer.type.name
        precision = layer.get_output(0).dtype.name if layer.num_outputs else "NONE"
        if kind in _PLAIN or precision in ("INT64", "INT32", "BOOL"):
            continue
        layers.append({"name": layer.name, "type": kind, "precision": precision, "fused": 1})
    return tuple(layers)


def _fused(name: str, metadata: str) -> int:
    found = len(_OPERATOR.findall(metadata))
    return found or max(1, len(re.split(r"\s\+\s", name)))
