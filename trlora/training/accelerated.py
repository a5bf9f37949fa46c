"""The only file that imports `accelerate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trlora.errors import TrloraError
from trlora.training.config import TrainingConfig


class AccelerateMissingError(TrloraError, ImportError):
    """`accelerate` is not installed."""


def accelerator_for(config: TrainingConfig, *, log_folder: Path | None = None, cpu: bool = False) -> Any:
    """An `accelerate.Accelerator` for a training: one process, or as many as `accelerate launch` has started.

    Args:
        log_folder: where TensorBoard's log goes; None: there is none.
        cpu: even where there is a GPU.

    Raises:
        AccelerateMissingError: `accelerate`, or `tensorboard` for the log, is not installed.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import is_tensorboard_available
    except ImportError as error:
        raise AccelerateMissingError('training needs accelerate; pip install "trexport[train]"') from error
    if log_folder is None:
        return Accelerator(mixed_precision=config.mixed_precision, cpu=cpu)
    if not is_tensorboard_available():
        raise AccelerateMissingError('a log needs tensorboard; pip install "trexport[train]"')
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, cpu=cpu, log_with="tensorboard", project_dir=str(log_folder)
    )
    accelerator.init_trackers("log", {key: value for key, value in config.to_dict().items() if value is not None})
    return accelerator


def seed_(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, of all devices."""
    from accelerate.utils import set_seed

    set_seed(seed)
