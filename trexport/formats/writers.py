"""LoRA files that others read, from pairs of matrices."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import safetensors.torch
from torch import Tensor

from trlora.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from trlora.files import atomic_file, atomic_folder

Metadata = Mapping[str, str]
Pairs = Mapping[str, "Pair"]
"""By module path."""
Components = Mapping[str, Pairs]
"""By the name of a text encoder."""


@final
@dataclass(frozen=True)
class Pair:
    """`Δ = up·down`, of a convolution (r, in/groups, height, width) and (out, r, 1, 1)."""

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@final
@dataclass(frozen=True)
class LoraWriter:
    """How a format is written."""

    single_file: bool
    write: Callable[[Path, Pairs, Components, Metadata], None]
    """Into a file, or into a folder that is there."""
    text_encoders: bool = True
    """Whether it has a place for what is for text encoders."""

    def __call__(
        self, out: Path, pairs: Pairs, components: Components, metadata: Metadata, *, overwrite: bool = False
    ) -> None:
        """Write it, whole or not at all.

        Raises:
            FileExistsError: there is something at `out` and `overwrite` is not set.
        """
        if self.single_file:
            if out.exists() and not overwrite:
                raise FileExistsError(f"{out} exists; choose another name, or pass --overwrite")
            with atomic_file(out) as temporary:
                self.write(temporary, pairs, components, metadata)
            return
        with atomic_folder(out, overwrite=overwrite) as folder:
            self.write(folder, pairs, components, metadata)


def _peft(folder: Path, pairs: Pairs, components: Components, metadata: Metadata) -> None:
    tensors: dict[str, Tensor] = {}
    for path, pair in pairs.items():
        key = f"base_model.model.{path}"
        tensors |= {f"{key}.lora_A.weight": pair.down, f"{key}.lora_B.weight": pair.up}
    ranks = {path: pair.rank for path, pair in pairs.items()}
    most = max(ranks.values())
    others = {path: rank for path, rank in ranks.items() if rank != most}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": most,
        "r": most,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(pairs),
        "use_dora": False,
        "use_rslora": False,
    }
    safetensors.torch.save_file(tensors, folder / WEIGHTS_NAME, metadata={**metadata, "format": "pt"})
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _diffusers(file: Path, pairs: Pairs, components: Components, metadata: Metadata) -> None:
    tensors: dict[str, Tensor] = {}
    for model, own in {"unet": pairs, **components}.items():
        for path, pair in own.items():  # without an alpha the scale is one
            tensors |= {f"{model}.{path}.lora_A.weight": pair.down, f"{model}.{path}.lora_B.weight": pair.up}
    safetensors.torch.save_file(tensors, file, metadata={**metadata, "format": "pt"})


def _kohya(file: Path, pairs: Pairs, components: Components, metadata: Metadata) -> None:
    tensors: dict[str, Tensor] = {}
    first = "lora_te1_" if "text_encoder_2" in components else "lora_te_"  # of two they are numbered
    prefixes = {"text_encoder": first, "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"}
    ranks: set[int] = set()
    for prefix, own in {"lora_unet_": pairs, **{prefixes[name]: own for name, own in components.items()}}.items():
        for path, pair in own.items():
            name = f"{prefix}{path.replace('.', '_')}"
            alpha = pair.up.new_tensor(float(pair.rank))
            tensors |= {
                f"{name}.lora_down.weight": pair.down,
                f"{name}.lora_up.weight": pair.up,
                f"{name}.alpha": alpha,
            }
            ranks.add(pair.rank)
    about = {"ss_network_module": "networks.lora"}
    if len(ranks) == 1:
        about |= dict.fromkeys(("ss_network_dim", "ss_network_alpha"), str(*ranks))
    safetensors.torch.save_file(tensors, file, metadata={**metadata, **about})


WRITERS: dict[str, LoraWriter] = {
    "peft": LoraWriter(False, _peft, text_encoders=False),
    "diffusers": LoraWriter(True, _diffusers),
    "kohya": LoraWriter(True, _kohya),
}
"""By the name that `trexport convert --to` has."""
