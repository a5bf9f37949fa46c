"""Teach Stable Diffusion 1.x, 2.x or XL to follow condition images: a ControlNet (arXiv 2302.05543) whose attention has
tensor-ring adapters (TLoRA, arXiv 2501.08727), or any other that trlora has."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import record
from branch import CONTROL_LAYERS, control_predictor, inject_branch_, open_branch
from caches import Cache, hash_of_model
from components import PRECISIONS, Components
from conditions import as_control
from control_data import KINDS, ControlData, check_conditions, condition_of, edges_key, picture_of
from drawing import draw_validation
from failures import OptionError, finish, say
from images import Crop, check, read
from noising import errors, noised, sampled
from options import adapter_spec, add_shared_options, check_shared_options, training_config
from pairs import Columns, Pair, pairs_in
from prompts import embed, negative
from setting_up import set_up, train
from subject_data import latent_makers, pictures_of
from torch import Tensor, nn
from watching import Artist

from trlora import BaseModel


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_shared_options(parser)
    add = parser.add_argument_group("control").add_argument
    add("--train_data_dir", type=Path, required=True, help="metadata.jsonl, or image/, conditioning/ and captions/")
    add(
        "--conditioning",
        choices=KINDS,
        default="files",
        help="files; segmentation: files whose colours are never mixed; canny: edges of the images (default: %(default)s)",
    )
    add("--image_column", default="image", help="in metadata.jsonl; file_name goes before it (default: %(default)s)")
    add("--conditioning_image_column", default="conditioning_image", help="default: %(default)s")
    add("--caption_column", default="text", help="default: %(default)s")
    add("--proportion_empty_prompts", type=float, default=0.0, help="captions left out (default: %(default)s)")
    add("--controlnet_model_name_or_path", help="a ControlNet to go on from; default: a new branch, made of the UNet")
    add(
        "--control_rank",
        type=int,
        default=64,
        help=f"of the adapters on a new branch's {CONTROL_LAYERS} (default: %(default)s)",
    )
    add("--validation_image", nargs="+", type=Path, default=[], help="conditions (for canny: pictures) of the prompts")
    options = parser.parse_args(arguments)
    check_shared_options(options)
    if not 0 <= options.proportion_empty_prompts <= 1:
        raise OptionError(f"--proportion_empty_prompts is {options.proportion_empty_prompts}, expected 0 to 1")
    if options.control_rank < 1:
        raise OptionError(f"--control_rank is {options.control_rank}, expected 1 or more")
    images, prompts = len(options.validation_image), len(options.validation_prompt)
    if images != prompts and 1 not in (images, prompts):
        raise OptionError(
            f"{images} of --validation_image and {prompts} of --validation_prompt; expected as many of both, or one of one"
        )
    if bool(images) != bool(prompts):
        raise OptionError("--validation_prompt and --validation_image belong together; give both")
    return options


def control_loss(
    model: nn.Module, batch: dict[str, Tensor], *, components: Components, snr_gamma: float | None
) -> Tensor:
    """The mean error of the UNet, frozen, with what the branch adds."""
    noisy, timesteps, target = noised(components.scheduler, sampled(batch, components.scale))
    predicted = control_predictor(model, components.unet)(noisy, timesteps, batch)
    return errors(predicted, target, components.scheduler, timesteps, snr_gamma).mean()


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(arguments)
    spec = adapter_spec(options)
    checkpoint = record.check_output(options)
    made = options.conditioning == "canny"
    columns = Columns(options.image_column, options.conditioning_image_column, options.caption_column)
    pairs = pairs_in(options.train_data_dir, conditions=not made, columns=columns)
    sizes = check([pair.image for pair in pairs], options.resolution)
    conditions = [pair.condition or pair.image for pair in pairs]
    if not made:
        check_conditions(conditions, sizes)
    training_config(options, len(pairs), 1)  # what no training can have is refused before anything long
    found = record.describe("train_control", options, [path for pair in pairs for path in _files(pair)])
    if checkpoint is not None:
        record.check_same(found, options.output_dir)

    components, accelerator = set_up(options, len(pairs))
    data, keys = cached_data(components, pairs, sizes, conditions, options, accelerator)

    branch, branch_name = open_branch(components, options, accelerator, resumed=checkpoint is not None)
    branch = branch.to(PRECISIONS[options.mixed_precision])
    fresh = options.controlnet_model_name_or_path is None
    paths = inject_branch_(branch, spec, options, fresh=fresh)
    components.unet.to(accelerator.device)
    if options.gradient_checkpointing:
        components.unet.enable_gradient_checkpointing()  # the gradient goes through it as well
    train(
        branch,
        data,
        partial(control_loss, components=components, snr_gamma=options.snr_gamma),
        options,
        training_config(options, len(data), accelerator.num_processes),
        accelerator,
        checkpoint=checkpoint,
        found=found,
        base_model=BaseModel(branch_name, "ControlNetModel"),
        artist=artist_of(branch, components, data.cache, keys, options, accelerator.device),
        told=f"{len(paths)} layers, {len(pairs)} pictures",
    )
    if accelerator.is_main_process:
        say(f"next: trexport merge {branch_name} {options.output_dir / 'adapter'} -o CONTROLNET")


def cached_data(
    components: Components,
    pairs: list[Pair],
    sizes: list[tuple[int, int]],
    conditions: list[Path],
    options: argparse.Namespace,
    accelerator: Any,
) -> tuple[ControlData, dict[str, str]]:
    """The data, all that can be computed once computed, and the prompts' names in the cache."""
    cache = Cache(options.output_dir / "cache")
    prompts = dict.fromkeys(["", *(pair.caption for pair in pairs), *options.validation_prompt])
    keys = embed(components, list(prompts), cache, accelerator)
    components.vae.to(accelerator.device)
    pictures = pictures_of(
        [pair.image for pair in pairs],
        sizes,
        vae_hash=hash_of_model(components.vae),
        resolution=options.resolution,
        center_crop=options.center_crop,
        random_flip=options.random_flip,
        seed=options.seed,
    )
    cache.fill(latent_makers(components, pictures), accelerator)
    if options.conditioning == "canny":
        makers = {edges_key(picture): partial(_edges, picture.path, picture.crop) for picture in pictures}
        cache.fill(makers, accelerator)
    if not options.validation_prompt:
        components.vae.to("cpu")
    data = ControlData(
        cache,
        pictures,
        conditions,
        [pair.caption for pair in pairs],
        keys,
        kind=options.conditioning,
        empty_share=options.proportion_empty_prompts,
    )
    return data, keys


def artist_of(
    branch: Any,
    components: Components,
    cache: Cache,
    keys: dict[str, str],
    options: argparse.Namespace,
    device: Any,
) -> Artist | None:
    """Who draws every validation prompt with its condition, and the condition beside it."""
    if not options.validation_prompt:
        return None
    images, prompts = list(options.validation_image), list(options.validation_prompt)
    count = max(len(images), len(prompts))
    images, prompts = (values * count if len(values) == 1 else values for values in (images, prompts))
    controls = []
    for path in images:
        crop = Crop.of(read(path).size, options.resolution)
        controls.append({"control": as_control(condition_of(path, crop, options.conditioning))})

    without = negative(components, cache[keys[""]])
    asked = [
        (cache[keys[prompt]] | control, without | control) for prompt, control in zip(prompts, controls, strict=True)
    ]

    def pictures() -> list[tuple[str, Any]]:
        shown = [(f"{number}-condition", picture_of(one["control"])) for number, one in enumerate(controls)]
        return shown + draw_validation(control_predictor(branch, components.unet), components, asked, options, device)

    return pictures


def _edges(path: Path, crop: Crop) -> dict[str, Tensor]:
    return {"edges": condition_of(path, crop, "canny")}


def _files(pair: Pair) -> list[Path]:
    return [pair.image] if pair.condition is None else [pair.image, pair.condition]


if __name__ == "__main__":
    sys.exit(finish(main))
