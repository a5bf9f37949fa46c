"""Which modules of a model get an adapter."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from torch import nn

from trlora.errors import TargetError, nearest
from trlora.layers import ADAPTABLE, AdaptedLayer

Targets = str | Iterable[str] | Callable[[str, nn.Module], bool]
"""A preset's name, a regular expression for the whole path, a list of paths, or a predicate on (path, module)."""

# In UNets, ControlNets and the transformers of Stable Diffusion 3 and Flux, whose attention reads text through layers of its
# own; in CLIP's text encoders.
_ATTENTION = (
    r"(.*transformer_blocks\.\d+\.attn\d*\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    r"|.*encoder\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|out_proj))"
)
_FEED_FORWARD = (
    r"(.*transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)"
    r"|.*single_transformer_blocks\.\d+\.(proj_mlp|proj_out)"
    r"|.*encoder\.layers\.\d+\.mlp\.fc[12])"
)

PRESETS: dict[str, str] = {
    # the paper's: every attention projection of the transformer blocks; 128 layers in Stable Diffusion 1.5
    "attention": _ATTENTION,
    # the feed-forward layers as well
    "transformer": f"({_ATTENTION}|{_FEED_FORWARD})",
    # the convolutions of the residual blocks and between the resolutions
    "convolutions": r".*(resnets\.\d+\.(conv1|conv2|conv_shortcut)|(down|up)samplers\.\d+\.conv)",
}


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by path, without those inside its adapted layers."""
    modules = dict(model.named_modules())
    inside = tuple(f"{path}." for path, module in modules.items() if isinstance(module, AdaptedLayer))
    return {path: module for path, module in modules.items() if not path.startswith(inside)}


def find_targets(model: nn.Module, targets: Targets = "attention") -> dict[str, nn.Linear | nn.Conv2d]:
    """The `nn.Linear` and `nn.Conv2d` modules that `targets` chooses, by path, in the model's order.

    Raises:
        TargetError: nothing is chosen, a listed path does not exist, or a chosen module is
            neither `nn.Linear` nor `nn.Conv2d`.
    """
    modules = {path: module for path, module in modules_of(model).items() if path}
    if callable(targets):
        chosen = [path for path, module in modules.items() if targets(path, module)]
    elif isinstance(targets, str):
        pattern = re.compile(PRESETS.get(targets, targets))
        chosen = [path for path in modules if pattern.fullmatch(path)]
    else:
        chosen = list(targets)
        for path in chosen:
            if path not in modules:
                raise TargetError(f"no module {path!r} in {type(model).__name__}{nearest(path, modules)}")
    if not chosen:
        raise TargetError(f"targets {targets!r} choose no module of {type(model).__name__}; presets: {sorted(PRESETS)}")
    found: dict[str, nn.Linear | nn.Conv2d] = {}
    for path in chosen:
        module = modules[path]
        if isinstance(module, AdaptedLayer):
            raise TargetError(f"{path} has an adapter already; use attach_ to add another, or remove_ first")
        if not isinstance(module, ADAPTABLE):
            raise TargetError(f"{path} is a {type(module).__name__}, expected an nn.Linear or nn.Conv2d")
        found[path] = module
    return found
