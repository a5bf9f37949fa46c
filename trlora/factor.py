"""One matrix of several that a member is the product of."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn


@final
class Factor(nn.Module):
    """A matrix named `weight`, so that keys read as PEFT's: `lora_A.weight`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
