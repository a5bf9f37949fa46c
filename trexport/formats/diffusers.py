"""diffusers' `pytorch_lora_weights.safetensors`, of new and of old keys."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, final

from torch import Tensor

from trexport.formats.content import Content, listed
from trexport.formats.peft.config import PeftConfig
from trexport.formats.peft.method import kernel_of, take
from trexport.formats.text import text_note
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
        by_layer: dict[str, dict[str, Tensor]] = {}
        encoders: Counter[str] = Counter()
        unknown: list[str] = []
        for key, tensor in content.tensors.items():
            text, ending = _TEXT.match(key), _leaf_of(key)
            if text is not None:
                encoders[text[1]] += 1
            elif ending is None:
                unknown.append(key)
            else:
                path = _without_model(key).removesuffix(ending).replace(".processor.", ".")
                path = f"{path}.0" if path.endswith("to_out") else path
                by_layer.setdefault(path, {})[_LEAVES[ending]] = tensor
        if unknown:
            raise CheckpointError(
                f"{len(unknown)} of {len(content.tensors)} keys are none of a LoRA of diffusers: {listed(unknown)}"
            )
        if not by_layer:
            raise CheckpointError(
                f"nothing for the UNet or transformer inside{': ' if encoders else ''}{text_note(encoders)}"
            )
        content.check_tensors()
        config = PeftConfig(_config_of(content.metadata))
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
        notes = (text_note(encoders),) if encoders else ()
        return Adapter.of(layers, 1.0, None, str(content.path), "diffusers", notes, provenance(content.metadata))


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


def _config_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's config of the model that denoises, empty where the file has none."""
    if METADATA not in metadata:
        return {}
    try:
        fields = json.loads(metadata[METADATA])
        return {_without_model(key): value for key, value in fields.items() if _MODEL.match(key)}
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"header metadata {METADATA}: no JSON object ({error})") from error
