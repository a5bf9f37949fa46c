"""What to do where memory has run out."""

from __future__ import annotations

from torch import nn

from trlora.training.config import TrainingConfig


def what_takes_less(config: TrainingConfig, model: nn.Module) -> str:
    """Which options of a training would take less memory and change its result little, for a message."""
    ways = []
    if config.batch_size > 1:
        half = config.batch_size // 2
        ways.append(f"a batch size of {half} with {config.accumulation * -(-config.batch_size // half)} accumulated")
    if not config.gradient_checkpointing and hasattr(model, "enable_gradient_checkpointing"):
        ways.append("gradient checkpointing")
    if config.mixed_precision == "no":
        ways.append("mixed precision (bf16 or fp16)")
    return f"try {', or '.join(ways)}" if ways else "use smaller images, or a device with more memory"
