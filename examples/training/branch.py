"""The ControlNet branch: made of a UNet or opened, adapted, and asked."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from components import Components
from diffusers import ControlNetModel
from drawing import Predictor, added
from failures import RecipeError
from torch import Tensor, nn

from trlora import AdapterSpec, inject_
from trlora.files import atomic_folder
from trlora.residuals import LowRankResidualSpec
from trlora.targets import find_targets
from trlora.transforms import IdentityTransformSpec

FOLDER = "branch"
CONTROL_LAYERS = "condition embedding and zero convolutions"
_WIDTHS = (16, 32, 96, 256)
"""Of the condition embedding, each half as large as the one before: the condition comes in pixels, the UNet sees latents."""


def open_branch(
    components: Components, options: argparse.Namespace, accelerator: Any, *, resumed: bool
) -> tuple[Any, str]:
    """The branch before it is trained, and the name that the adapter's base has.

    A new one is a copy of the UNet's first half with a condition embedding from the seed. It is written below the output
    folder, for the adapter's sake, and read from there when a training goes on.

    Raises:
        RecipeError: it cannot be read or written, or is not made for this UNet.
    """
    name = options.controlnet_model_name_or_path
    folder = options.output_dir / FOLDER
    if name is not None:
        branch = _stored(name)
        for field in ("cross_attention_dim", "in_channels", "block_out_channels"):
            own, expected = list_of(branch.config[field]), list_of(components.unet.config[field])
            if own != expected:
                raise RecipeError(f"{name}: {field} is {own}, the UNet of {components.name} has {expected}")
        return branch, name
    if resumed:
        return _stored(str(folder)), str(folder)
    depth = len(components.vae.config["block_out_channels"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        branch = ControlNetModel.from_unet(components.unet, conditioning_embedding_out_channels=_WIDTHS[:depth])
    branch.requires_grad_(False).eval()
    if accelerator.is_main_process:
        try:
            with atomic_folder(folder, overwrite=True) as temporary:
                branch.save_pretrained(temporary, safe_serialization=True)
        except OSError as error:
            raise RecipeError(f"{folder}: cannot be written ({error.strerror or error}); make room") from error
    accelerator.wait_for_everyone()
    return branch, str(folder)


def inject_branch_(
    branch: ControlNetModel, spec: AdapterSpec, options: argparse.Namespace, *, fresh: bool
) -> list[str]:
    """Adapt the branch's attention and, where it is new, the layers that are zero or random: each gets a low-rank residual,
    so that one adapter holds all that is trained.

    Their biases stay as they are: those of the zero convolutions zero.
    """
    paths = list(find_targets(branch, options.targets))
    overrides: dict[str, AdapterSpec] = {}
    for path, layer in (find_targets(branch, _controls) if fresh else {}).items():
        outputs, inputs = layer.weight.flatten(1).shape
        rank = min(options.control_rank, inputs, outputs)
        overrides[path] = AdapterSpec(IdentityTransformSpec(), LowRankResidualSpec(rank))
    return inject_(branch, spec, [*paths, *overrides], overrides=overrides, seed=options.seed)


def control_predictor(branch: Any, unet: Any) -> Predictor:
    """The UNet with what a branch makes of the condition `control` (batch, 3, height, width) in [0, 1]."""

    def predict(latents: Tensor, timestep: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        states, more = conditions["states"], added(conditions)
        down, middle = branch(
            latents, timestep, states, controlnet_cond=conditions["control"], **more, return_dict=False
        )
        return unet(
            latents,
            timestep,
            states,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            **more,
            return_dict=False,
        )[0]

    return predict


def _controls(path: str, module: nn.Module) -> bool:
    return path.startswith("controlnet_") and isinstance(module, nn.Conv2d)


def list_of(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _stored(name: str) -> ControlNetModel:
    try:
        branch = ControlNetModel.from_pretrained(name, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RecipeError(f"{name}: no ControlNet that can be loaded ({reason})") from error
    assert isinstance(branch, ControlNetModel)
    return branch.requires_grad_(False).eval()
