"""Penalties on the transforms of a model, as terms of a loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast, final

import torch
from torch import Tensor, nn

from trlora.errors import TargetError
from trlora.inject import adapted_modules
from trlora.layers import LayerAdapter
from trlora.transforms import AbstractTransform

Penalty = Literal["identity", "orthogonal"]


def penalty(model: nn.Module, kind: Penalty = "identity", name: str = "default") -> Tensor:
    """The sum of a penalty over the transforms of one adapter, a scalar to be weighted and added to a loss.

    Args:
        kind: "identity" holds the weights near the pre-trained ones; "orthogonal" leaves them free to turn.
        name: the adapter's name.

    Raises:
        ValueError: another kind.
        TargetError: the model has no adapter of that name.
    """
    if kind not in ("identity", "orthogonal"):
        raise ValueError(f"penalty {kind!r}, expected 'identity' or 'orthogonal'")
    layers = [layer for layer in adapted_modules(model).values() if name in layer.adapters]
    if not layers:
        raise TargetError(f"{type(model).__name__} has no adapter {name!r}; use inject_ first")
    alike: dict[object, list[_Term]] = {}
    for layer in layers:
        adapter = layer.adapters[name]
        assert isinstance(adapter, LayerAdapter)
        spec = adapter.spec
        for transform, of in ((adapter.transform, spec.transform), (adapter.output_transform, spec.output_transform)):
            if not transform.trivial:
                values = tuple((key, p.shape, p.dtype, p.device) for key, p in transform.named_parameters())
                # blocks that are shared are of one shape whatever the layer's width
                alike.setdefault((of, transform.features, values), []).append(_Term(transform, kind))
    return torch.stack([_sum(terms) for terms in alike.values()]).sum() if alike else torch.zeros(())


@final
class _Term(nn.Module):
    """A transform's penalty as a function of its parameters."""

    def __init__(self, transform: AbstractTransform, kind: Penalty) -> None:
        super().__init__()
        self.transform = transform
        self.kind = kind

    def forward(self) -> Tensor:
        transform = self.transform
        return transform.identity_penalty() if self.kind == "identity" else transform.orthogonal_penalty()


def _sum(terms: Sequence[_Term]) -> Tensor:
    """Over transforms that differ in the values of their parameters alone: together, for a hundred of them one by one take
    the host a third of a step's time."""
    first = terms[0]
    if len(terms) == 1:
        return cast(Tensor, first())
    names = [key for key, _ in first.named_parameters()]
    stacks = [torch.stack([term.get_parameter(key) for term in terms]) for key in names]

    def one(*values: Tensor) -> Tensor:
        return cast(Tensor, torch.func.functional_call(first, dict(zip(names, values, strict=True)), ()))

    return torch.vmap(one)(*stacks).sum()
