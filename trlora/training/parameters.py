"""What of a model is trained."""

from __future__ import annotations

from torch import nn

from trlora.errors import TargetError
from trlora.inject import adapted_modules


def trainable_parameters(model: nn.Module, name: str = "default") -> list[nn.Parameter]:
    """The parameters of one adapter, for an optimiser.

    Raises:
        TargetError: the model has no adapter of that name.
    """
    adapters = [layer.adapters[name] for layer in adapted_modules(model).values() if name in layer.adapters]
    parameters = [parameter for adapter in adapters for parameter in adapter.parameters()]
    if not parameters:
        raise TargetError(f"{type(model).__name__} has no adapter {name!r} with parameters; use inject_ first")
    return parameters
