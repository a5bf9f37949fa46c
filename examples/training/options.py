"""The options that both recipes have, by the names of diffusers' training scripts, and what they say."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from failures import OptionError

from trlora import AdapterSpec, SpecError
from trlora.shorthand import fields_from_text
from trlora.training import TrainingConfig

SCHEDULES = {"constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine"}
MEMBER = "NAME, NAME:SIZE, or a JSON object as in a checkpoint"


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """Model, adapter, training, what is written."""
    add = parser.add_argument_group("base model").add_argument
    add("--pretrained_model_name_or_path", required=True, metavar="BASE", help="folder, Hub id, or random:sd15, …")
    add("--revision", help="branch, tag or commit of a Hub id")
    add("--variant", help="of the weight files, for instance fp16")
    add("--prediction_type", choices=("epsilon", "v_prediction"), help="default: as the pipeline's scheduler says")

    add = parser.add_argument_group("adapter").add_argument
    add("--transform", default="tensor_ring:2", help=f"{MEMBER} (default: %(default)s)")
    add("--residual", default="tensor_ring:6", help=f"{MEMBER} (default: %(default)s)")
    add("--magnitude", default="none", help="none, norm (as in DoRA), scale (default: %(default)s)")
    add("--targets", default="attention", help="attention, transformer, or a regular expression (default: %(default)s)")
    add("--penalty", choices=("identity", "orthogonal"), default="identity", help="on the transforms")
    add("--penalty_weight", type=float, default=0.0, help="default: %(default)s, no penalty")
    add("--use_ema", action="store_true", help="save the moving average of the adapter")
    add("--ema_decay", type=float, default=0.999, help="default: %(default)s")

    add = parser.add_argument_group("images").add_argument
    add("--resolution", type=int, default=512, help="of the squares trained on (default: %(default)s)")
    add("--center_crop", action="store_true", help="cut the middle; else one random place, drawn once an image")
    add("--random_flip", action="store_true", help="mirror half of them")

    add = parser.add_argument_group("training").add_argument
    add("--train_batch_size", type=int, default=4, help="of a process (default: %(default)s)")
    add("--gradient_accumulation_steps", type=int, default=1, help="batches a step (default: %(default)s)")
    add("--gradient_checkpointing", action="store_true", help="less memory, more time")
    add("--max_train_steps", type=int, help="default: as --num_train_epochs gives")
    add("--num_train_epochs", type=int, default=1, help="default: %(default)s")
    add("--learning_rate", type=float, default=1e-4, help="the paper: 5e-4, 1e-4, 5e-5 (default: %(default)s)")
    add("--scale_lr", action="store_true", help="times batch size, accumulation and processes")
    add("--lr_scheduler", choices=tuple(SCHEDULES), default="constant", help="default: %(default)s")
    add("--lr_warmup_steps", type=int, default=0, help="default: %(default)s")
    add("--adam_beta1", type=float, default=0.9, help="default: %(default)s")
    add("--adam_beta2", type=float, default=0.999, help="default: %(default)s")
    add("--adam_weight_decay", type=float, default=0.0, help="default: %(default)s")
    add("--adam_epsilon", type=float, default=1e-8, help="default: %(default)s")
    add("--max_grad_norm", type=float, default=1.0, help="default: %(default)s")
    add("--snr_gamma", type=float, help="weigh timesteps by min-SNR (arXiv 2303.09556); 5 is usual")
    add("--path", choices=("weight", "activations"), default="weight", help="how adapted layers are computed")
    add("--compile", action="store_true", help="by torch.compile; the first step takes minutes")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), default="no", help="the adapter stays float32")
    add("--allow_tf32", action="store_true", help="faster float32 products on Ampere and later")
    add("--seed", type=int, default=0, help="of everything random (default: %(default)s)")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=Path, required=True, help="adapter/, checkpoint-…/, validation/, logs/")
    add("--checkpointing_steps", type=int, default=500, help="default: %(default)s")
    add("--checkpoints_total_limit", type=int, help="the last ones that stay (default: all)")
    add("--resume_from_checkpoint", metavar="CHECKPOINT", help="latest, or a checkpoint's name or path")
    add("--validation_prompt", nargs="+", default=[], metavar="PROMPT", help="drawn on the way and at the end")
    add("--validation_steps", type=int, default=100, help="steps between two drawings (default: %(default)s)")
    add("--num_validation_images", type=int, default=4, help="of a prompt (default: %(default)s)")
    add("--num_inference_steps", type=int, default=25, help="of a drawing (default: %(default)s)")
    add("--guidance_scale", type=float, default=7.5, help="of a drawing (default: %(default)s)")
    add("--report_to", choices=("tensorboard", "none"), default="tensorboard", help="default: %(default)s")
    add("--logging_dir", default="logs", help="below --output_dir (default: %(default)s)")


def check_shared_options(options: argparse.Namespace) -> None:
    """
    Raises:
        OptionError: a value that cannot be meant.
    """
    whole = ("resolution", "train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_train_steps")
    whole += ("checkpointing_steps", "validation_steps", "num_validation_images", "num_inference_steps")
    for name in (*whole, "checkpoints_total_limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise OptionError(f"--{name} is {value}, expected 1 or more")
    if options.snr_gamma is not None and not (math.isfinite(options.snr_gamma) and options.snr_gamma > 0):
        raise OptionError(f"--snr_gamma is {options.snr_gamma}, expected a number above 0")
    if options.lr_scheduler == "constant" and options.lr_warmup_steps:
        raise OptionError("--lr_scheduler constant has no warm-up; use constant_with_warmup")
    if options.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise OptionError("--mixed_precision fp16 needs a GPU, and there is none; use bf16 or no")


def adapter_spec(options: argparse.Namespace) -> AdapterSpec:
    """What `--transform`, `--residual` and `--magnitude` say.

    Raises:
        OptionError: not to be read, an unknown member, or a wrong value.
    """
    texts = {"transform": options.transform, "residual": options.residual, "magnitude": options.magnitude}
    try:
        return AdapterSpec.from_dict({part: fields_from_text(part, text) for part, text in texts.items()})
    except SpecError as error:
        raise OptionError(str(error)) from error


def training_config(options: argparse.Namespace, samples: int, processes: int) -> TrainingConfig:
    """
    Args:
        samples: of the data set.
        processes: that train together.

    Raises:
        TrainingConfigError: a value that no training can have.
    """
    together = options.train_batch_size * options.gradient_accumulation_steps * processes
    steps = options.max_train_steps
    if steps is None:
        steps = max(1, options.num_train_epochs * samples // together)
    return TrainingConfig(
        max_steps=steps,
        batch_size=options.train_batch_size,
        accumulation=options.gradient_accumulation_steps,
        learning_rate=options.learning_rate * (together if options.scale_lr else 1),
        schedule=SCHEDULES[options.lr_scheduler],  # pyright: ignore[reportArgumentType]
        warmup_steps=options.lr_warmup_steps,
        weight_decay=options.adam_weight_decay,
        beta1=options.adam_beta1,
        beta2=options.adam_beta2,
        epsilon=options.adam_epsilon,
        max_grad_norm=options.max_grad_norm,
        penalty=options.penalty,
        penalty_weight=options.penalty_weight,
        mixed_precision=options.mixed_precision,
        path=options.path,
        compile=options.compile,
        gradient_checkpointing=options.gradient_checkpointing,
        ema_decay=options.ema_decay if options.use_ema else None,
        seed=options.seed,
        checkpoint_every=options.checkpointing_steps,
        keep_checkpoints=options.checkpoints_total_limit,
    )
