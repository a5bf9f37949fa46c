"""One layer in many sizes: error against parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from trlora.errors import FitError
from trlora.fit.grow import grow_
from trlora.fit.layer import FitOptions, LayerFit, fit_layer
from trlora.fit.sizes import ladder
from trlora.layers import LayerAdapter
from trlora.spec import AdapterSpec


@final
@dataclass(frozen=True)
class Search:
    """Which sizes of a layer's adapter to try."""

    transform: bool
    """Whether the transform's size is to be chosen; as the spec says otherwise."""
    residual: bool
    """Whether the residual's is."""
    most: int
    """Parameters that the adapter of a layer may have."""
    enough: float = 0.0
    """The relative error at which the layer needs no more."""


def fit_curve(
    base: Tensor,
    tuned: Tensor,
    spec: AdapterSpec,
    search: Search,
    options: FitOptions | None = None,
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> list[LayerFit]:
    """Fits of one layer from the smallest size on, each the greater by one size of one member: of the two, that which takes
    off most of the squared error for its parameters. Every fit begins at the one before as well, where its members allow it.

    Args:
        base, tuned, spec, options, stopped: as `fit_layer` takes them.

    Returns:
        One fit at least.

    Raises:
        FitError: even the smallest has more parameters than it may.
        As `fit_layer` does.
    """
    options = options or FitOptions()
    outputs, inputs = base.shape[0], base.shape[1:].numel()
    dense = outputs * inputs
    transforms = (
        ladder(spec.transform, lambda tried: tried.build(inputs), dense) if search.transform else [spec.transform]
    )
    residuals = (
        ladder(spec.residual, lambda tried: tried.build(inputs, outputs), dense) if search.residual else [spec.residual]
    )
    if not transforms or not residuals:
        raise FitError(f"no size of the adapter has fewer parameters than the weight itself, {outputs}×{inputs}")

    def fitted(t: int, r: int, before: LayerAdapter | None) -> LayerFit | None:
        """None where it may not have so many parameters."""
        sized = replace(spec, transform=transforms[t], residual=residuals[r])
        generator = torch.Generator().manual_seed(options.seed)
        weight = base.detach().flatten(1)
        adapter = LayerAdapter.from_spec(sized, inputs, outputs, generator, weight)
        if sum(parameter.numel() for parameter in adapter.parameters()) > search.most:
            return None
        adapter = adapter.double().requires_grad_(False)
        begun = before is not None and adapter.magnitude.trivial and grow_(adapter, before, generator)
        return fit_layer(base, tuned, sized, options, begin=adapter if begun else None, stopped=stopped)

    at = (0, 0)
    first = fitted(*at, None)
    if first is None:
        raise FitError(
            f"the smallest adapter of a layer of {inputs} → {outputs} has more than {search.most} parameters"
        )
    found = [first]
    while found[-1].relative_error > search.enough:
        now = found[-1]
        better: tuple[float, tuple[int, int], LayerFit] | None = None
        for t, r in ((at[0] + 1, at[1]), (at[0], at[1] + 1)):
            if t < len(transforms) and r < len(residuals):
                fit = fitted(t, r, now.adapter)
                if fit is not None:
                    pays = (now.error**2 - fit.error**2) / (fit.parameters - now.parameters)
                    if better is None or pays > better[0]:
                        better = (pays, (t, r), fit)
        if better is None:
            break
        _, at, fit = better
        found.append(fit)
    return found
