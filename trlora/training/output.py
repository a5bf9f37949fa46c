"""The folder that a training writes to: on one process, whole or not at all, with a message where the disk is full."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from trlora.training.state import checkpoints
from trlora.training.step import TrainingError


@final
class Output:
    """
    Args:
        folder: None: nothing is written.
        accelerator: an `accelerate.Accelerator`, of all processes that train.
    """

    def __init__(self, folder: Path | None, accelerator: Any) -> None:
        self.folder = folder
        self._accelerator = accelerator

    def last_checkpoint(self) -> Path | None:
        """The newest one below the folder."""
        known = {} if self.folder is None else checkpoints(self.folder)
        return list(known.values())[-1] if known else None

    def kept(self) -> str:
        """The end of a message: which checkpoint there is to go on from."""
        last = self.last_checkpoint()
        return "" if last is None else f". The last checkpoint is {last}"

    def write(self, step: int, write: Callable[[Path], None]) -> None:
        """Have something written on one process, the others wait.

        Args:
            step: for the message.
            write: given the folder.

        Raises:
            TrainingError: the disk is full, or cannot be written.
        """
        if self.folder is None:
            return
        if self._accelerator.is_main_process:
            try:
                write(self.folder)
            except FileExistsError:
                raise
            except OSError as error:
                raise TrainingError(
                    f"step {step}: {self.folder} could not be written ({error.strerror or error}); make room and resume"
                    f"{self.kept()}"
                ) from error
        self._accelerator.wait_for_everyone()
