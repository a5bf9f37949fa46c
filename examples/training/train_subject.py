"""Teach Stable Diffusion 1.x, 2.x or XL a subject from a few pictures (DreamBooth, arXiv 2208.12242) with a tensor-ring
adapter (TLoRA, arXiv 2501.08727), or any other that trlora has."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import record
import torch
from caches import Cache, hash_of_model
from class_images import draw_class_images
from components import Components
from drawing import added, draw_validation, unet_predictor
from failures import OptionError, finish, say
from images import check, images_in
from noising import errors, noised, sampled
from options import adapter_spec, add_shared_options, check_shared_options, training_config
from prompts import embed, negative
from setting_up import set_up, train
from subject_data import SubjectData, latent_makers, pictures_of
from torch import Tensor, nn

from trlora import BaseModel, inject_


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_shared_options(parser)
    add = parser.add_argument_group("subject").add_argument
    add("--instance_data_dir", type=Path, required=True, help="folder of the subject's pictures")
    add("--instance_prompt", required=True, help="what they show, for instance 'a photo of sks dog'")
    add("--with_prior_preservation", action="store_true", help="train on pictures of the class as well")
    add("--class_data_dir", type=Path, help="folder of them; those that are missing are drawn by the base")
    add("--class_prompt", help="what they show, for instance 'a photo of a dog'")
    add("--num_class_images", type=int, default=100, help="default: %(default)s")
    add("--prior_loss_weight", type=float, default=1.0, help="default: %(default)s")
    add("--sample_batch_size", type=int, default=4, help="of drawing class images (default: %(default)s)")
    options = parser.parse_args(arguments)
    check_shared_options(options)
    if options.with_prior_preservation and not (options.class_data_dir and options.class_prompt):
        raise OptionError("--with_prior_preservation needs --class_data_dir and --class_prompt")
    if not options.with_prior_preservation and (options.class_data_dir or options.class_prompt):
        raise OptionError(
            "--class_data_dir and --class_prompt are for --with_prior_preservation; add it, or leave them out"
        )
    if options.num_class_images < 1 or options.sample_batch_size < 1:
        raise OptionError("--num_class_images and --sample_batch_size must be 1 or more")
    if options.prior_loss_weight < 0:
        raise OptionError(f"--prior_loss_weight is {options.prior_loss_weight}, expected 0 or more")
    return options


def subject_loss(
    model: nn.Module,
    batch: dict[str, dict[str, Tensor]],
    *,
    components: Components,
    prior_loss_weight: float,
    snr_gamma: float | None,
) -> Tensor:
    """The mean error on the instances and, weighted, on the class: one run of the model for both."""
    parts = list(batch.values())
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    noisy, timesteps, target = noised(components.scheduler, sampled(joined, components.scale))
    predicted = model(noisy, timesteps, joined["states"], **added(joined), return_dict=False)[0]
    each = errors(predicted, target, components.scheduler, timesteps, snr_gamma)
    means = [part.mean() for part in each.split([len(part["mean"]) for part in parts])]
    return means[0] + prior_loss_weight * means[1] if len(means) > 1 else means[0]


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(arguments)
    spec = adapter_spec(options)
    checkpoint = record.check_output(options)
    paths = images_in(options.instance_data_dir)
    sizes = check(paths, options.resolution)
    training_config(options, len(paths), 1)  # what no training can have is refused before anything long
    if checkpoint is not None:
        record.check_same(record.describe("train_subject", options), options.output_dir)

    components, accelerator = set_up(options, len(paths))
    data, keys = cached_data(components, paths, sizes, options, accelerator)
    found = record.describe("train_subject", options, data.files())
    if checkpoint is not None:
        record.check_same(found, options.output_dir)
    layers = inject_(components.unet, spec, options.targets, seed=options.seed)

    def pictures() -> list[tuple[str, Any]]:
        without = negative(components, data.cache[keys[""]])
        asked = [(data.cache[keys[prompt]], without) for prompt in options.validation_prompt]
        return draw_validation(unet_predictor(components.unet), components, asked, options, accelerator.device)

    train(
        components.unet,
        data,
        partial(
            subject_loss,
            components=components,
            prior_loss_weight=options.prior_loss_weight,
            snr_gamma=options.snr_gamma,
        ),
        options,
        training_config(options, len(data), accelerator.num_processes),
        accelerator,
        checkpoint=checkpoint,
        found=found,
        base_model=BaseModel(components.name, "UNet2DConditionModel"),
        artist=pictures if options.validation_prompt else None,
        told=f"{len(layers)} layers, {data.told()}",
    )
    if accelerator.is_main_process:
        say(f"next: trexport merge {components.name} {options.output_dir / 'adapter'} -o MERGED")


def cached_data(
    components: Components,
    paths: list[Path],
    sizes: list[tuple[int, int]],
    options: argparse.Namespace,
    accelerator: Any,
) -> tuple[SubjectData, dict[str, str]]:
    """The data, all that can be computed once computed, and the prompts' names in the cache. Class images that are missing
    are drawn."""
    cache = Cache(options.output_dir / "cache")
    prompts = ["", options.instance_prompt, *options.validation_prompt]
    prompts += [options.class_prompt] if options.with_prior_preservation else []
    keys = embed(components, list(dict.fromkeys(prompts)), cache, accelerator)
    components.vae.to(accelerator.device)
    cut: Any = partial(
        pictures_of,
        vae_hash=hash_of_model(components.vae),
        resolution=options.resolution,
        center_crop=options.center_crop,
        random_flip=options.random_flip,
        seed=options.seed,
    )
    instances, classes = cut(paths, sizes), None
    if options.with_prior_preservation:
        asked = cache[keys[options.class_prompt]], negative(components, cache[keys[""]])
        draw_class_images(components, asked, options, accelerator)
        class_paths = images_in(options.class_data_dir)[: options.num_class_images]
        classes = cut(class_paths, check(class_paths, options.resolution))
    cache.fill(latent_makers(components, [*instances, *(classes or [])]), accelerator)
    if not options.validation_prompt:
        components.vae.to("cpu")
    data = SubjectData(
        cache,
        (instances, cache[keys[options.instance_prompt]]),
        None if classes is None else (classes, cache[keys[options.class_prompt]]),
    )
    return data, keys


if __name__ == "__main__":
    sys.exit(finish(main))
