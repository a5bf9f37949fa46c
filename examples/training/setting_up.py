"""What both recipes do alike: the accelerator, and the training itself once model, data and loss are there."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record
import torch
from components import PRECISIONS, Components, load_components
from failures import RecipeError, say
from noising import check_prediction
from options import training_config
from torch import nn
from watching import Artist, Bar, Pictures

from trlora import BaseModel
from trlora.training import Callback, Loss, Trainer, TrainingConfig, accelerator_for


def set_up(options: argparse.Namespace, samples: int) -> tuple[Components, Any]:
    """The base's parts and the accelerator.

    Raises:
        OptionError, RecipeError: of `load_components`; a prediction type or a resolution that the base does not take.
        TrainingConfigError, AccelerateMissingError: of `prepare_accelerator`.
    """
    components = load_components(
        options.pretrained_model_name_or_path,
        revision=options.revision,
        variant=options.variant,
        prediction_type=options.prediction_type,
        dtype=PRECISIONS[options.mixed_precision],
    )
    check_prediction(components.scheduler)
    components.check_resolution(options.resolution)
    return components, prepare_accelerator(options, samples)


def prepare_accelerator(options: argparse.Namespace, samples: int) -> Any:
    """
    Raises:
        TrainingConfigError: options that no training can have; before anything long starts.
        AccelerateMissingError: a package is missing.
    """
    log = options.output_dir / options.logging_dir if options.report_to == "tensorboard" else None
    accelerator = accelerator_for(training_config(options, samples, 1), log_folder=log)
    if options.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return accelerator


def train(
    model: nn.Module,
    data: Any,
    loss: Loss,
    options: argparse.Namespace,
    config: TrainingConfig,
    accelerator: Any,
    *,
    checkpoint: Path | None,
    found: dict[str, Any],
    base_model: BaseModel,
    artist: Artist | None,
    told: str,
) -> Trainer:
    """Train, with a bar, checkpoints and pictures, to the saved adapter.

    Args:
        checkpoint: to go on from.
        found: the recipe's record, written beside the result.
        artist: who draws pictures, if anybody.
        told: of the model and the data, for people.
    """
    trainer = Trainer(model, config, options.output_dir, accelerator=accelerator, base_model=base_model)
    done = 0 if checkpoint is None else trainer.resume_(checkpoint)
    if accelerator.is_main_process:
        try:
            record.write(found, options.output_dir)
        except OSError as error:
            raise RecipeError(
                f"{options.output_dir}: cannot be written ({error.strerror or error}); make room"
            ) from error
        count = sum(parameter.numel() for parameter in trainer.parameters)
        say(f"{told}: {count:,} parameters, steps {done} to {config.max_steps} on {accelerator.device}")
    with Bar(trainer) as bar:
        callbacks: Sequence[Callback] = [bar]
        if artist is not None:
            callbacks = [bar, Pictures(options.output_dir / "validation", options.validation_steps, artist)]
        trainer.run(data, loss, callbacks=callbacks)
    accelerator.end_training()
    if accelerator.is_main_process:
        say(f"written: {options.output_dir / 'adapter'}")
    return trainer
