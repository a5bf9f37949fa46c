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
    write: Callable[[Path, Mapping[str, Pair], Metadata], None]
    """Into a file, or into a folder that is there."""

    def __call__(self, out: Path, pairs: Mapping[str, Pair], metadata: Metadata, *, overwrite: bool = False) -> None:
        """Write it, whole or not at all.

        Raises:
            FileExistsError: there is something at `out` and `overwrite` is not set.
        """
        if self.single_file:
            if out.exists() and not overwrite:
                raise FileExistsError(f"{out} exists; choose another name, or pass --overwrite")
            with atomic_file(out) as temporary:
                self.write(temporary, pairs, metadata)
            return
        with atomic_folder(out, overwrite=overwrite) as folder:
            self.write(folder, pairs, metadata)


def _peft(folder: Path, pairs: Mapping[str, Pair], metadata: Metadata) -> None:
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


def _diffusers(file: Path, pairs: Mapping[str, Pair], metadata: Metadata) -> None:
    tensors: dict[str, Tensor] = {}
    for path, pair in pairs.items():  # without an alpha the scale is one
        tensors |= {f"unet.{path}.lora_A.weight": pair.down, f"unet.{path}.lora_B.weight": pair.up}
    safetensors.torch.save_file(tensors, file, metadata={**metadata, "format": "pt"})


def _kohya(file: Path, pairs: Mapping[str, Pair], metadata: Metadata) -> None:
    tensors: dict[str, Tensor] = {}
    for path, pair in pairs.items():
        name = f"lora_unet_{path.replace('.', '_')}"
        alpha = pair.up.new_tensor(float(pair.rank))
        tensors |= {f"{name}.lora_down.weight": pair.down, f"{name}.lora_up.weight": pair.up, f"{name}.alpha": alpha}
    ranks = {pair.rank for pair in pairs.values()}
    about = {"ss_network_module": "networks.lora"}
    if len(ranks) == 1:
        about |= dict.fromkeys(("ss_network_dim", "ss_network_alpha"), str(*ranks))
    safetensors.torch.save_file(tensors, file, metadata={**metadata, **about})


WRITERS: dict[str, LoraWriter] = {
    "peft": LoraWriter(False, _peft),
    "diffusers": LoraWriter(True, _diffusers),
    "kohya": LoraWriter(True, _kohya),
}
"""By the name that `trexport convert --to` has."""
