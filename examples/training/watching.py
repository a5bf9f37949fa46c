"""Those who look at a training: a progress bar, and somebody who has pictures drawn."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from failures import RecipeError, say
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trlora.files import atomic_file
from trlora.training import StepRecord, Trainer

Artist = Callable[[], list[tuple[str, Image.Image]]]
"""Gives file names, without their ending, and pictures of the model as it stands."""


class Bar:
    """A bar with the loss where somebody is watching, else a line now and then."""

    LINES = 20

    def __init__(self, trainer: Trainer) -> None:
        self.watched = sys.stderr.isatty() and trainer.accelerator.is_main_process
        self.total = trainer.config.max_steps
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, TextColumn("{task.fields[told]}"), console=Console(stderr=True))
        self._task = self._bar.add_task("", total=self.total, completed=trainer.step, told="")

    def __enter__(self) -> Bar:
        if self.watched:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.watched:
            self._bar.stop()

    def __call__(self, trainer: Trainer, record: StepRecord) -> None:
        told = f"loss {record.loss:.4f}  rate {record.learning_rate:.2e}"
        if self.watched:
            self._bar.update(self._task, completed=record.step, told=told)
        elif trainer.accelerator.is_main_process and (
            record.step % max(1, self.total // self.LINES) == 0 or record.step == self.total
        ):
            say(f"step {record.step}/{self.total}  {told}  {record.seconds:.2f} s")


class Pictures:
    """Has pictures drawn every so many steps and after the last, into files and TensorBoard's log. They are drawn on the
    main process, with the moving average where there is one, and change nothing of the training."""

    def __init__(self, folder: Path, every: int, artist: Artist) -> None:
        self.folder, self.every, self.artist = folder, every, artist

    def __call__(self, trainer: Trainer, record: StepRecord) -> None:
        if record.step % self.every and record.step != trainer.config.max_steps:
            return
        if trainer.accelerator.is_main_process:
            was_training = trainer.model.training
            trainer.model.eval()
            average = nullcontext() if trainer.average is None else trainer.average.in_place()
            with average, trainer.accelerator.autocast():
                drawn = self.artist()
            trainer.model.train(was_training)
            for name, picture in drawn:
                save_picture(self.folder / f"step-{record.step:06d}-{name}.png", picture)
            self._log(trainer, record.step, drawn)
        trainer.accelerator.wait_for_everyone()

    def _log(self, trainer: Trainer, step: int, drawn: list[tuple[str, Image.Image]]) -> None:
        from images import pixels

        for tracker in trainer.accelerator.trackers:
            values: Any = torch.stack([pixels(picture) for _, picture in drawn]).numpy()
            tracker.writer.add_images("validation", values, step, dataformats="NCHW")


def save_picture(path: Path, picture: Image.Image) -> None:
    """A PNG, whole or not there.

    Raises:
        RecipeError: the disk is full.
    """
    try:
        with atomic_file(path) as temporary:
            picture.save(temporary, format="PNG")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be written ({error.strerror or error}); make room") from error
