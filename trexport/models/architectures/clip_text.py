"""CLIP's text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from trexport.errors import BaseError, MissingError
from trexport.io_spec import Dtype, ModelSpec, TensorSpec
from trexport.models.architectures.base import Architecture, Limit, axes_of
from trexport.models.text_models import build_text_model, config_of_text_model

# of Stable Diffusion 1.x
_CLIP_L: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}

_TINY: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 24,
    "intermediate_size": 40,
    "projection_dim": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "hidden_act": "quick_gelu",
    "bos_token_id": 298,
    "eos_token_id": 299,
    "pad_token_id": 299,
}

_PREFIX = "text_model"
_IDS = 256


@final
class _Prefixed(nn.Module):
    """A text encoder whose parameters are called as transformers 4 does: a child of the name `text_model`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.text_model = model

    @property
    def config(self) -> Any:
        return self.text_model.config

    def forward(self, input_ids: Tensor) -> Any:
        return self.text_model(input_ids)


class _ClipText(Architecture):
    """`input_ids` → what the text encoder makes of them. The names of the files' own parameters decide which ones the model
    in memory has, with or without `text_model.` before them."""

    noun: ClassVar[str] = "text encoder"
    folder: ClassVar[str] = "text_encoder"
    stem: ClassVar[str] = "model"
    pickle_stem: ClassVar[str] = "pytorch_model"
    not_loaded: ClassVar[tuple[str, ...]] = ("position_ids",)  # a constant that older checkpoints hold
    defaults: ClassVar[Mapping[str, Any]] = {"hidden_size": 512, "projection_dim": 512, "max_position_embeddings": 77}

    @final
    def default_sizes(self) -> dict[str, int]:
        """A prompt and an empty one, as long as they can be."""
        return {"batch_size": 2, "sequence_length": self.config["max_position_embeddings"]}

    @final
    def limits(self) -> Mapping[str, Limit]:
        return {"sequence_length": Limit(most=self.config["max_position_embeddings"])}

    @classmethod
    @final
    def arguments(cls, feeds: Mapping[str, Any]) -> dict[str, Any]:
        return dict(feeds)

    @classmethod
    @final
    def outputs(cls, result: Any) -> tuple[Tensor, ...]:
        return result.to_tuple()

    @classmethod
    @final
    def example(cls, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randint(0, _IDS, shape, generator=generator).float()

    @final
    def is_layer(self, path: str) -> bool:
        return not path.endswith("_embedding")

    @final
    def build(self) -> nn.Module:
        if find_spec("transformers") is None:
            raise MissingError(
                f"a {self.class_name} needs transformers, which is not installed; install trexport[pipelines]"
            )
        try:
            model = build_text_model(self.class_name, self.config)
        except (ValueError, TypeError, KeyError) as error:
            raise BaseError(f"transformers cannot build a {self.class_name} from this config: {error}") from error
        bare = not hasattr(model, _PREFIX)  # transformers 5
        named = not self.names or any(name.startswith(f"{_PREFIX}.") for name in self.names)
        return _Prefixed(model) if bare and named else model

    @classmethod
    @final
    def is_of(cls, model: nn.Module) -> bool:
        return super().is_of(model.text_model if isinstance(model, _Prefixed) else model)

    @final
    def full_config(self, model: nn.Module) -> dict[str, Any]:
        return config_of_text_model(model) | {"architectures": [self.class_name]}

    @final
    def _ids(self, sizes: Mapping[str, int] | None) -> tuple[TensorSpec, int | str, int | str]:
        batch, tokens = axes_of(sizes, "batch_size", "sequence_length")
        return TensorSpec("input_ids", "int64", (batch, tokens)), batch, tokens


@final
class ClipText(_ClipText):
    """transformers' `CLIPTextModel`: `last_hidden_state` and `pooler_output`."""

    class_name: ClassVar[str] = "CLIPTextModel"
    random: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "clip-l": _CLIP_L,
        "clip-tiny": _TINY | {"num_hidden_layers": 1},
    }

    def spec(
        self, dtype: Dtype, sizes: Mapping[str, int] | None = None, *, timestep_per_sample: bool = False
    ) -> ModelSpec:
        ids, batch, tokens = self._ids(sizes)
        width = self.config["hidden_size"]
        outputs = (
            TensorSpec("last_hidden_state", dtype, (batch, tokens, width)),
            TensorSpec("pooler_output", dtype, (batch, width)),
        )
        return ModelSpec((ids,), outputs, dict(sizes or {}), self.class_name)


@final
class ClipTextWithProjection(_ClipText):
    """transformers' `CLIPTextModelWithProjection`: `text_embeds` and `last_hidden_state`."""

    class_name: ClassVar[str] = "CLIPTextModelWithProjection"
    random: ClassVar[Mapping[str, Mapping[str, Any]]] = {"clip-projection-tiny": _TINY}

    def spec(
        self, dtype: Dtype, sizes: Mapping[str, int] | None = None, *, timestep_per_sample: bool = False
    ) -> ModelSpec:
        ids, batch, tokens = self._ids(sizes)
        outputs = (
            TensorSpec("text_embeds", dtype, (batch, self.config["projection_dim"])),
            TensorSpec("last_hidden_state", dtype, (batch, tokens, self.config["hidden_size"])),
        )
        return ModelSpec((ids,), outputs, dict(sizes or {}), self.class_name)
