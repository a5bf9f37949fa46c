"""Components of a pipeline as torch modules with optimum's inputs and outputs, and what to feed them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, final

import torch
from torch import Tensor, nn

from trexport.errors import BaseError
from trexport.io_spec import Axis, Dtype, ModelSpec, TensorSpec
from trexport.models.adapters import BoundAdapter, as_text_names
from trexport.models.architectures import ARCHITECTURES
from trexport.models.model import DTYPES, add_offsets_, attach_all_, merge_into_
from trexport.models.pipeline import Component
from trexport.models.text_models import config_of_text_model, load_text_model

_OLD_BUFFER = "position_ids"  # a constant that older checkpoints hold


@final
@dataclass(frozen=True)
class LoadedComponent:
    """A component in memory, float32 on the CPU."""

    module: nn.Module
    """Takes the tensors of `component_spec` in their order, and returns a tuple of its outputs."""
    prefix: str
    """What `module` puts before the model's own parameter names."""
    config: Mapping[str, Any]
    """The whole config, defaults included, as a `config.json` holds it."""

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters by the names that PyTorch gives them in the model itself."""
        return {name.removeprefix(self.prefix): value for name, value in self.module.named_parameters()}


def component_spec(component: Component, dtype: Dtype, fixed: Mapping[str, int] | None = None) -> ModelSpec:
    """The inputs and outputs of a component, named as optimum's.

    Args:
        dtype: of all but `input_ids`, which is int64.
        fixed: the fixed axes of the model that denoises, in latents. The batch stays free, for guidance doubles that
            model's alone.
    """
    fixed, config = fixed or {}, component.source.config
    batch = "batch_size"
    if component.kind == "text_encoder":
        # Stable Diffusion 3 and Flux read T5's tokens too, which are more than CLIP can have
        most = config["max_position_embeddings"]
        sizes = {axis: min(size, most) for axis, size in fixed.items() if axis == "sequence_length"}
        spec = ARCHITECTURES[component.class_name](config).spec(dtype, sizes)
        if not component.hidden_states:
            return spec
        state = next(tensor for tensor in spec.outputs if tensor.name == "last_hidden_state")
        count = config["num_hidden_layers"] + 1
        inner = tuple(replace(state, name=f"hidden_states.{i}") for i in range(count))
        return replace(spec, outputs=spec.outputs + inner)
    scale = scale_of(component)
    channels = config["latent_channels"]

    def axis(name: str, latent: str, factor: int) -> Axis:
        return fixed[latent] * factor if latent in fixed else name

    if component.kind == "vae_decoder":
        latents = (batch, channels, axis("latent_height", "height", 1), axis("latent_width", "width", 1))
        image = (batch, config["out_channels"], _times(latents[2], scale), _times(latents[3], scale))
        return ModelSpec((TensorSpec("latent_sample", dtype, latents),), (TensorSpec("sample", dtype, image),))
    image = (batch, config["in_channels"], axis("sample_height", "height", scale), axis("sample_width", "width", scale))
    latents = (batch, 2 * channels, _over(image[2], scale), _over(image[3], scale))
    return ModelSpec((TensorSpec("sample", dtype, image),), (TensorSpec("latent_parameters", dtype, latents),))


def scale_of(component: Component) -> int:
    """How many pixels of a VAE's image a latent is wide."""
    return 2 ** (len(component.source.config["block_out_channels"]) - 1)


def _times(axis: Axis, factor: int) -> Axis:
    return axis * factor if isinstance(axis, int) else f"{axis} * {factor}"


def _over(axis: Axis, factor: int) -> Axis:
    return axis // factor if isinstance(axis, int) else f"{axis} / {factor}"


def load_component(
    component: Component, adapters: Sequence[BoundAdapter] = (), *, merged: bool = True
) -> LoadedComponent:
    """The component as PyTorch computes it, from its safetensors files only.

    Args:
        adapters: of a text encoder, that are to be in it.
        merged: whether they are merged into its weights, or kept beside them.

    Raises:
        BaseError: diffusers or transformers cannot build it, or weights are missing, unknown or of a wrong shape.
    """
    source = component.source
    with _quiet(), torch.random.fork_rng(devices=[]):
        try:
            model, found = _from_pretrained(component)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError) as error:
            raise BaseError(f"{source.name}: no {component.class_name} can be loaded ({error})") from error
    wrong = [key for key in found["unexpected_keys"] if not key.endswith(_OLD_BUFFER)]
    mismatched = [entry[0] if isinstance(entry, tuple) else entry for entry in found["mismatched_keys"]]
    for kind, keys in (("missing", found["missing_keys"]), ("unknown", wrong), ("of a wrong shape", mismatched)):
        if keys:
            hint = ""
            if component.kind == "text_encoder" and kind == "missing" and version("transformers").startswith("4."):
                hint = "; saved by transformers 5 it has names that 4 does not know: install transformers 5, or save it by 4"
            raise BaseError(f"{source.name}: {len(list(keys))} weights are {kind}, {sorted(keys)[0]} first{hint}")
    model = model.float().eval().requires_grad_(False)
    if adapters:
        known = [name for name, _ in model.named_parameters()]
        named = [_renamed(adapter, known) for adapter in adapters]
        if merged:
            merge_into_(model, named)
        else:
            add_offsets_(model, named)
            attach_all_(model, named)
    if component.kind == "text_encoder":
        config = config_of_text_model(model)
        module: nn.Module = _TextEncoder(model, [tensor.name for tensor in component_spec(component, "fp32").outputs])
    else:
        config = dict(model.config) | {"_class_name": component.class_name}
        module = _VaeEncoder(model) if component.kind == "vae_encoder" else _VaeDecoder(model)
    config = {name: value for name, value in config.items() if name != "_name_or_path"}
    return LoadedComponent(
        module.eval().requires_grad_(False), "model." if component.kind == "text_encoder" else "", config
    )


def _renamed(adapter: BoundAdapter, known: Sequence[str]) -> BoundAdapter:
    """The adapter with the names that the parameters have in memory."""
    offsets = as_text_names(adapter.adapter.offsets, known)
    return replace(
        adapter, adapter=replace(adapter.adapter, offsets=offsets), layers=as_text_names(adapter.layers, known)
    )


def _from_pretrained(component: Component) -> tuple[Any, Mapping[str, Any]]:
    folder = component.source.folder
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    options["variant"] = component.source.variant
    if component.kind == "text_encoder":
        return load_text_model(component.class_name, folder, options)
    from diffusers import AutoencoderKL

    loaded: Any = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False, **options)
    return loaded


def component_feeds(
    component: Component, spec: ModelSpec, sizes: Mapping[str, int], *, seed: int = 0
) -> dict[str, Tensor]:
    """Inputs as the pipeline's own might be: prompts that end and are padded; pictures in −1…1; latents of the size that
    the VAE's scaling factor stands for. Made in float32 and cast.

    Args:
        sizes: of the free axes.
    """
    generator = torch.Generator().manual_seed(seed)
    (tensor,) = spec.inputs
    shape = tensor.shape(sizes)
    config = component.source.config
    if component.kind == "text_encoder":
        vocabulary = config["vocab_size"]
        given = config["eos_token_id"]
        # configs from before 2023 say 2, and transformers then takes the greatest id of a row
        end = vocabulary - 1 if given == 2 else given
        ids = torch.randint(0, vocabulary - 2, shape, generator=generator)
        lengths = torch.randint(1, shape[1], (shape[0], 1), generator=generator) if shape[1] > 1 else torch.zeros(shape)
        value = torch.where(torch.arange(shape[1]) >= lengths, torch.tensor(end), ids).to(torch.int64)
    elif component.kind == "vae_encoder":
        value = torch.rand(shape, generator=generator) * 2 - 1
    else:
        value = torch.randn(shape, generator=generator) / config["scaling_factor"]
    return {tensor.name: value.to(DTYPES[tensor.dtype])}


@final
class _TextEncoder(nn.Module):
    def __init__(self, model: nn.Module, outputs: list[str]) -> None:
        super().__init__()
        self.model = model
        self._outputs = outputs

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        inner = any(name.startswith("hidden_states.") for name in self._outputs)
        found = self.model(input_ids=input_ids, output_hidden_states=inner, return_dict=True)
        return tuple(
            found["hidden_states"][int(name.rpartition(".")[2])] if name.startswith("hidden_states.") else found[name]
            for name in self._outputs
        )


@final
class _VaeEncoder(nn.Module):
    """The half of a VAE that encodes, its submodules under their own names."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.encoder = vae.encoder
        self.quant_conv = vae.quant_conv

    def forward(self, sample: Tensor) -> tuple[Tensor, ...]:
        hidden = self.encoder(sample)
        return (hidden if self.quant_conv is None else self.quant_conv(hidden),)


@final
class _VaeDecoder(nn.Module):
    """The half of a VAE that decodes."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder

    def forward(self, latent_sample: Tensor) -> tuple[Tensor, ...]:
        hidden = latent_sample if self.post_quant_conv is None else self.post_quant_conv(latent_sample)
        return (self.decoder(hidden),)


@contextmanager
def _quiet() -> Iterator[None]:
    """What loading warns of is an error here, raised with our own words."""
    import os

    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
