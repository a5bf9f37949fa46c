"""diffusers' `pytorch_lora_weights.safetensors`, of new and of old keys."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, final

from torch import Tensor

from trexport.formats.content import Content, listed
from trexport.formats.peft.config import PeftConfig
from trexport.formats.peft.method import kernel_of, take
from trexport.formats.text import projection_name
from trlora import Adapter, AdapterSpec, CheckpointError, LayerParts, TrloraError
from trlora.checkpoint import provenance

METADATA = "lora_adapter_metadata"
"""Header metadata with PEFT's configs, by `<component>.<field>`."""

_MODEL = re.compile(r"(unet|transformer)\.")
_TEXT = re.compile(r"(text_encoder(_\d)?)\.")
_LEAVES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    ".lora_linear_layer.down.weight": "A",
    ".lora_linear_layer.up.weight": "B",
    "_lora.down.weight": "A",
    "_lora.up.weight": "B",
    ".lora_magnitude_vector.weight": "norm",
    ".lora_magnitude_vector": "norm",
    ".alpha": "alpha",
}
"""How keys end → what they are."""


@final
class DiffusersFormat:
    """Keys `unet.<module>.lora_A.weight`, of Stable Diffusion 3 and Flux `transformer.<module>…`, `….lora.down.weight`, or
    `<module>.processor.to_q_lora.down.weight`."""

    name = "diffusers"

    def recognises(self, content: Content) -> bool:
        return METADATA in content.metadata or any(
            _leaf_of(key) is not None and (_MODEL.match(key) or _TEXT.match(key) or "_lora." in key)
            for key in content.tensors
        )

    def read(self, content: Content) -> Adapter:
        try:
            return self._read(content)
        except TrloraError as error:
            raise CheckpointError(f"{content.path}: {error}") from error

    def _read(self, content: Content) -> Adapter:
        models: dict[str, dict[str, dict[str, Tensor]]] = {}
        unknown: list[str] = []
        for key, tensor in content.tensors.items():
            text, ending = _TEXT.match(key), _leaf_of(key)
            if ending is None:
                unknown.append(key)
                continue
            path = (_without_model(key) if text is None else key[text.end() :]).removesuffix(ending)
            if text is not None:
                path = projection_name(path)
            else:
                path = path.replace(".processor.", ".")
                path = f"{path}.0" if path.endswith("to_out") else path
            models.setdefault("" if text is None else text[1], {}).setdefault(path, {})[_LEAVES[ending]] = tensor
        if unknown:
            raise CheckpointError(
                f"{len(unknown)} of {len(content.tensors)} keys are none of a LoRA of diffusers: {listed(unknown)}"
            )
        if not models:
            raise CheckpointError("no tensors inside, expected at least one layer")
        content.check_tensors()
        found = {model: _adapter(model, by_layer, content) for model, by_layer in sorted(models.items())}
        unet = found.pop("", None) or Adapter.of({}, 1.0, None, str(content.path), self.name)
        return replace(unet, components=found)


def _adapter(model: str, by_layer: Mapping[str, Mapping[str, Tensor]], content: Content) -> Adapter:
    """What is for one model: a component, or the UNet, whose name is empty."""
    config = PeftConfig(_config_of(content.metadata, model))
    problems: list[str] = []
    layers: dict[str, LayerParts] = {}
    for path, tensors in by_layer.items():
        try:
            layers[path] = _layer(path, tensors, config)
        except TrloraError as error:
            problems.append(str(error))
    if problems:
        more = f" (and {len(problems) - 1} more of {len(by_layer)} layers)" if len(problems) > 1 else ""
        raise CheckpointError(f"{problems[0]}{more}")
    return Adapter.of(layers, 1.0, None, str(content.path), DiffusersFormat.name, provenance(content.metadata))


def _layer(path: str, tensors: Mapping[str, Tensor], config: PeftConfig) -> LayerParts:
    a = take(path, tensors, "A", (2, 4))
    b = take(path, tensors, "B", (a.ndim,))
    if kernel_of(b).count(1) != b.ndim - 2:
        raise CheckpointError(f"{path}: the upper matrix has shape {tuple(b.shape)}, expected (out, r, 1, 1)")
    rank = b.shape[1]
    alpha = float(rank)
    if "alpha" in tensors:
        alpha = float(tensors["alpha"].flatten()[0])
    elif config.fields:
        alpha = config.alpha(path, "lora_alpha") * (math.sqrt(rank) if config.flag("use_rslora", False) else 1)
    spec: dict[str, Any] = {"residual": {"type": "low_rank", "rank": rank, "alpha": alpha}}
    parts = {"residual": {"lora_A.weight": a.flatten(1), "lora_B.weight": b.flatten(1)}}
    if "norm" in tensors:
        spec["magnitude"] = {"type": "norm"}
        parts["magnitude"] = {"norm": tensors["norm"].flatten()}
    return LayerParts.from_tensors(path, AdapterSpec.from_dict(spec), parts, kernel_of(a))


def _leaf_of(key: str) -> str | None:
    """The end of a key that tells what it is; the longest that fits."""
    return next((ending for ending in sorted(_LEAVES, key=len, reverse=True) if key.endswith(ending)), None)


def _without_model(key: str) -> str:
    found = _MODEL.match(key)
    return key if found is None else key[found.end() :]


def _config_of(metadata: Mapping[str, str], model: str) -> dict[str, Any]:
    """PEFT's config of a component, or of the model that denoises, whose name is empty; empty where the file has none."""
    if METADATA not in metadata:
        return {}
    try:
        fields = json.loads(metadata[METADATA])
        if not model:
            return {_without_model(key): value for key, value in fields.items() if _MODEL.match(key)}
        return {key.removeprefix(f"{model}."): value for key, value in fields.items() if key.startswith(f"{model}.")}
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"header metadata {METADATA}: no JSON object ({error})") from error
