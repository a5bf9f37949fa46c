"""Linear layers with a weight for every sample: how torch computes a batch of samples with adapters of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn

from trexport.errors import UsageError


@final
class Choice:
    """What the layers of a banked model read: the weights of all places, and which of them each sample takes."""

    def __init__(self) -> None:
        self.index: Tensor
        self.strength: Tensor
        self.weights: Mapping[str, Tensor] = {}

    @contextmanager
    def of(self, index: Tensor, strength: Tensor, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """For the time of a call.

        Args:
            index: (batch,), int64, from 0, the place of the base.
            strength: (batch,).
            weights: name → (places, out, in), the base's own first.
        """
        self.index, self.strength, self.weights = index, strength, weights
        try:
            yield
        finally:
            del self.index, self.strength
            self.weights = {}


@final
class BankLinear(nn.Module):
    """A linear layer with the weight `W_0 + s·(W_i − W_0)` for a sample of index i and strength s: at i = 0 and at s = 1 it
    is that of the place to the last bit.

    Args:
        linear: what it stands for; its bias is taken over.
        name: of its weights in `Choice.weights`.
    """

    def __init__(self, linear: nn.Linear, name: str, choice: Choice) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self._name = name
        self._choice = choice

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (batch, …, in).

        Returns:
            (batch, …, out).
        """
        weights = self._choice.weights[self._name]
        strength = self._choice.strength.to(weights.dtype)[:, None, None]
        weight = torch.lerp(weights[0].expand(x.shape[0], -1, -1), weights[self._choice.index], strength)
        out = torch.bmm(x.reshape(x.shape[0], -1, self.in_features), weight.transpose(1, 2))
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias


def bank_(model: nn.Module, names: Iterable[str], choice: Choice) -> None:
    """Put `BankLinear` in the place of linear layers.

    Args:
        names: of their weights, as parameters of the model.

    Raises:
        UsageError: one is no linear layer.
    """
    for name in names:
        path = name.removesuffix(".weight")
        layer = model.get_submodule(path)
        if type(layer) is not nn.Linear:
            raise UsageError(
                f"{path}: a {type(layer).__name__}; only linear layers take a weight for every sample here"
            )
        parent, _, key = path.rpartition(".")
        setattr(model.get_submodule(parent), key, BankLinear(layer, name, choice))
