"""Pictures of the class, drawn by the base itself, for prior preservation."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from components import Components
from drawing import draw, unet_predictor, with_sizes
from failures import say
from images import SUFFIXES
from torch import Tensor
from watching import save_picture

from trlora.training.order import mixed


def draw_class_images(
    components: Components,
    asked: tuple[dict[str, Tensor], dict[str, Tensor]],
    options: argparse.Namespace,
    accelerator: Any,
) -> None:
    """Fill `--class_data_dir` up to `--num_class_images`, each from a seed of its own; each process draws its share. What is
    there stays, and a run that was stopped goes on.

    Args:
        asked: the embeddings of the class prompt and of the empty one.
    """
    folder: Path = options.class_data_dir
    folder.mkdir(parents=True, exist_ok=True)
    there = {path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES}
    accelerator.wait_for_everyone()  # all have looked before one writes
    wanted = max(0, options.num_class_images - len(there))
    numbers = [number for number in range(options.num_class_images) if _name(number) not in there][:wanted]
    if numbers and accelerator.is_main_process:
        say(f"drawing {len(numbers)} class images into {folder}")
    share = numbers[accelerator.process_index :: accelerator.num_processes]
    components.unet.to(accelerator.device)
    conditions, without = (with_sizes(one, options.resolution) for one in asked)
    for start in range(0, len(share), options.sample_batch_size):
        chosen = share[start : start + options.sample_batch_size]
        with accelerator.autocast():
            drawn = draw(
                unet_predictor(components.unet),
                components,
                conditions,
                without,
                resolution=options.resolution,
                seeds=[mixed(options.seed, number) for number in chosen],
                steps=options.num_inference_steps,
                guidance=options.guidance_scale,
                device=accelerator.device,
            )
        for number, picture in zip(chosen, drawn, strict=True):
            save_picture(folder / _name(number), picture)
    accelerator.wait_for_everyone()


def _name(number: int) -> str:
    return f"drawn-{number:05d}.png"
