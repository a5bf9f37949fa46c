"""What a diffusers pipeline's folder holds beside what denoises: models to export, folders to copy, and what is left out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, final

from trexport.errors import BaseError, MissingError
from trexport.models.base import WEIGHTS_STEM, Base, download, looks_like_hub_id, weight_files

INDEX_FILE = "model_index.json"

Kind = Literal["text_encoder", "vae_encoder", "vae_decoder"]

_TEXT_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
_VAE_CLASS = "AutoencoderKL"
_TEXT_NAMES = ("text_encoder", "text_encoder_2")
_COPIED = ("tokenizer", "tokenizer_2", "scheduler", "feature_extractor")
_COPIED_SUFFIXES = (".json", ".txt")
TOLD_SUFFIXES = (*_COPIED_SUFFIXES, ".model")
"""Endings of what a component is made of beside its weights."""
# what both libraries take where a config does not say
_TEXT_DEFAULTS = {
    "hidden_size": 512, "num_hidden_layers": 12, "projection_dim": 512, "vocab_size": 49408,
    "max_position_embeddings": 77, "eos_token_id": 49407,
}  # fmt: skip
_VAE_DEFAULTS = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": [64], "scaling_factor": 0.18215,
}  # fmt: skip
# transformers' own names of weight files; diffusers' are the UNet's
_TEXT_STEM, _TEXT_PICKLE_STEM = "model", "pytorch_model"


@final
@dataclass(frozen=True)
class Component:
    """One model of a pipeline. The encoder and the decoder of a VAE are two, with the same source."""

    name: str
    """As the folder that optimum gives it: `text_encoder`, `vae_decoder`, …"""
    kind: Kind
    class_name: str
    source: Base
    """Its config and weights."""
    hidden_states: bool = False
    """Of a text encoder: whether the pipeline takes its inner states, as Stable Diffusion XL does."""

    @property
    def parameters(self) -> int:
        """How many numbers this part of the source holds."""
        prefixes = {
            "text_encoder": ("",),
            "vae_encoder": ("encoder.", "quant_conv."),
            "vae_decoder": ("decoder.", "post_quant_conv."),
        }[self.kind]
        return sum(math.prod(shape) for name, shape in self.source.shapes().items() if name.startswith(prefixes))


@final
@dataclass(frozen=True)
class Pipeline:
    """A pipeline beside the model that denoises."""

    folder: Path
    index: Mapping[str, Any]
    """Its `model_index.json`, without what is left out."""
    components: Mapping[str, Component]
    copied: Mapping[str, Sequence[Path]]
    """Folder → the files in it that an export takes over as they are."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Name → class of what is not exported."""

    @property
    def text_encoders(self) -> dict[str, Base]:
        """The weights of its text encoders, by name."""
        return {name: found.source for name, found in self.components.items() if found.kind == "text_encoder"}


def text_encoders_of(base: Base) -> dict[str, Base] | None:
    """The text encoders of the pipeline that a base is part of, None where it is part of none. Raises as `open_pipeline`."""
    pipeline = open_pipeline(base)
    return None if pipeline is None else pipeline.text_encoders


def open_pipeline(base: Base) -> Pipeline | None:
    """The pipeline that a base's UNet is part of; None where the base is a model alone. Fetches what is missing of a Hub id.

    Raises:
        BaseError: an index or config that cannot be read, or a component without weights in safetensors.
        MissingError: `transformers` is not installed and the pipeline has a text encoder.
    """
    if base.folder is None or base.architecture.sampling is None or not (base.folder / INDEX_FILE).is_file():
        return None
    folder = base.folder
    index = _json(folder / INDEX_FILE)
    parts = {
        name: value[1] for name, value in index.items() if isinstance(value, list) and len(value) == 2 and value[1]
    }
    known = {name: kind for name, kind in parts.items() if _is_known(name, kind)}
    if _is_from_hub(base):
        folder = _fetch(base, folder.name, known)
    texts = [name for name in _TEXT_NAMES if name in known]
    if texts and find_spec("transformers") is None:
        raise MissingError(
            f"{base.name}: its {texts[0]} needs transformers, which is not installed; install trexport[pipelines], or "
            "export the model alone with --unet-only"
        )
    components: dict[str, Component] = {}
    for name in texts:
        source = _source(base, folder / name, parts[name], _TEXT_STEM, _TEXT_PICKLE_STEM)
        components[name] = Component(name, "text_encoder", parts[name], source, hidden_states="text_encoder_2" in known)
    if "vae" in known:
        source = _source(base, folder / "vae", parts["vae"])
        components["vae_encoder"] = Component("vae_encoder", "vae_encoder", parts["vae"], source)
        components["vae_decoder"] = Component("vae_decoder", "vae_decoder", parts["vae"], source)
    left_out = {name: kind for name, kind in parts.items() if name not in known and name != base.architecture.folder}
    kept = {name: [None, None] if name in left_out else value for name, value in index.items()}
    kept.pop("_name_or_path", None)
    if "safety_checker" in left_out and "requires_safety_checker" in kept:
        kept["requires_safety_checker"] = False
    copied = {name: _files(folder / name) for name in _COPIED if name in known}
    return Pipeline(folder, kept, components, copied, left_out)


def _is_known(name: str, class_name: str) -> bool:
    if name in _TEXT_NAMES:
        return class_name in _TEXT_CLASSES
    return class_name == _VAE_CLASS if name == "vae" else name in _COPIED


def _source(
    base: Base, folder: Path, class_name: str, stem: str = WEIGHTS_STEM, pickle_stem: str = WEIGHTS_STEM
) -> Base:
    file = folder / "config.json"
    if not file.is_file():
        raise BaseError(
            f"{folder}: no config.json, {INDEX_FILE} lists a {class_name} there; export without it: --unet-only"
        )
    text = _TEXT_DEFAULTS | {"architectures": [class_name]}
    config = (_VAE_DEFAULTS if stem == WEIGHTS_STEM else text) | _json(file)
    return _opened(base, folder, config, stem, pickle_stem)


def _opened(base: Base, folder: Path, config: Mapping[str, Any], stem: str, pickle_stem: str) -> Base:
    # as diffusers does: a component that lacks the variant is taken without it
    variant = base.variant if _has_variant(folder, stem, base.variant) else None
    weights, index = weight_files(folder, variant, stem, pickle_stem)
    return Base(f"{base.name}/{folder.name}", config, weights, folder, index, variant)


def _has_variant(folder: Path, stem: str, variant: str | None) -> bool:
    names = (f"{stem}.{variant}.safetensors", f"{stem}.safetensors.index.{variant}.json")
    return variant is not None and any((folder / name).is_file() for name in names)


def _files(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.glob("*") if path.is_file() and path.suffix in _COPIED_SUFFIXES)
    if not found:
        raise BaseError(f"{folder}: nothing there, {INDEX_FILE} lists it; expected its JSON files")
    return found


def fetch_listed(base: Base, pipeline: Pipeline, names: Iterable[str]) -> None:
    """Fetch the components of a Hub id's pipeline that are missing in its folder; nothing where it is no Hub id's.

    Args:
        names: of all that are wanted, whether `open_pipeline` knows their classes or not.

    Raises:
        BaseError: they cannot be fetched.
    """
    if _is_from_hub(base):
        _fetch(base, pipeline.folder.name, names)


def weights_of_component(base: Base, folder: Path) -> Base | None:
    """The weights of a component of any class in the base's variant, or without it where there is none; None of a component
    that has none in safetensors.

    Raises:
        BaseError: weights that cannot be read, or of another variant only.
    """
    if not any(".safetensors" in path.name for path in folder.glob("*")):
        return None
    own = any(folder.glob(f"{WEIGHTS_STEM}*"))
    stem, pickle_stem = (WEIGHTS_STEM, WEIGHTS_STEM) if own else (_TEXT_STEM, _TEXT_PICKLE_STEM)
    return _opened(base, folder, {}, stem, pickle_stem)


def _is_from_hub(base: Base) -> bool:
    return not Path(base.name).exists() and looks_like_hub_id(base.name)


def _fetch(base: Base, commit: str, names: Iterable[str]) -> Path:
    """The snapshot of a Hub id with its parts; of the commit that the UNet came from, which names the snapshot's folder."""
    names = list(names)
    told = [f"{name}/*{suffix}" for name in names for suffix in TOLD_SUFFIXES]
    stems = [(name, stem) for name in names if name not in _COPIED for stem in (WEIGHTS_STEM, _TEXT_STEM)]
    folder = download(base.name, commit, [*told, *_weight_patterns(stems, base.variant)])
    lacking = [(name, stem) for name, stem in stems if not _has_variant(folder / name, stem, base.variant)]
    if base.variant is not None and lacking:
        folder = download(base.name, commit, _weight_patterns(lacking, None))
    return folder


def _weight_patterns(stems: Sequence[tuple[str, str]], variant: str | None) -> list[str]:
    infix = f".{variant}" if variant else ""
    endings = (f"{infix}.safetensors", f"{infix}-*.safetensors", f".safetensors.index{infix}.json")
    return [f"{name}/{stem}{ending}" for name, stem in stems for ending in endings]


def _json(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_bytes())
    except ValueError as error:
        raise BaseError(f"{file}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise BaseError(f"{file}: a {type(fields).__name__}, expected a JSON object")
    return fields
