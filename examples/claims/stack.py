"""The adapters of many runs side by side.

A run's adapter meets the UNet as 56 dense weights only. So all runs share every kernel of the UNet, whatever their methods,
and each method's own arithmetic runs once for all its seeds and all its layers of one shape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from encoder import ENCODER_SHAPES, encode, started_encoder
from methods import ALL_METHODS, Method, fitted, started
from runs import Run
from stacked_unet import Shape, StackedUNet
from torch import Tensor, nn
from torch.func import functional_call, vmap

from trlora import AdapterSpec
from trlora.layers import LayerAdapter


@dataclass(frozen=True)
class _Group:
    """Adapters of one spec on layers of one shape, of runs that differ in nothing but seed and rate."""

    template: LayerAdapter
    method: Method
    shape: Shape
    layers: Tensor
    """Places in `StackedUNet.paths[shape]`."""
    runs: slice
    names: list[str]
    leaves: list[Tensor]
    """(runs·layers, …) each."""

    @property
    def penalised(self) -> bool:
        """Whether the loss has a penalty on these."""
        return self.method.penalty_weight != 0 and not self.template.transform.trivial

    def weights(self, base: Tensor) -> Tensor:
        """The adapted weights, (runs, layers, out, in), of the layers' own weights (layers, out, in)."""
        count = self.runs.stop - self.runs.start
        given = base.expand(count, *base.shape).flatten(0, 1)
        if not self.names:
            return given.unflatten(0, (count, -1))
        return vmap(self._weight)(given, self.leaves).unflatten(0, (count, -1))

    def penalties(self) -> Tensor:
        """The penalty on the transforms, (runs,), summed over the layers."""
        return vmap(self._penalty)(self.leaves).unflatten(0, (self.runs.stop - self.runs.start, -1)).sum(1)

    def _weight(self, base: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        return self._called(lambda adapter: adapted_weight(adapter, base), leaves)

    def _penalty(self, leaves: Sequence[Tensor]) -> Tensor:
        kind = self.method.penalty_kind
        return self._called(lambda adapter: getattr(adapter.transform, f"{kind}_penalty")(), leaves)

    def _called(self, function: Callable[[LayerAdapter], Tensor], leaves: Sequence[Tensor]) -> Tensor:
        caller = _Caller(self.template, function)
        return functional_call(caller, dict(zip((f"adapter.{name}" for name in self.names), leaves, strict=True)), ())


class _Caller(nn.Module):
    """`function(adapter)` as a module's forward, which is what `functional_call` replaces parameters in."""

    def __init__(self, adapter: LayerAdapter, function: Callable[[LayerAdapter], Tensor]) -> None:
        super().__init__()
        self.adapter = adapter
        self.function = function

    def forward(self) -> Tensor:
        return self.function(self.adapter)


def adapted_weight(adapter: LayerAdapter, base: Tensor) -> Tensor:
    """`diag(gain)·(W0·T + Δ)`, (out, in), from the members' own formulas.

    `LayerAdapter.change` is the same, but picks its way by `requires_grad`, which the tensors inside of `vmap` do not have.
    """
    whole = base if adapter.transform.trivial else adapter.transform.multiply(base)
    if not adapter.residual.trivial:
        whole = whole + adapter.residual.delta()
    return whole if adapter.magnitude.trivial else adapter.magnitude.gain(lambda: whole)[:, None] * whole


class Stack:
    """The parameters of many runs, as views of one vector, and what they make of the weights.

    Args:
        runs: those of one method and budget must stand together.
        with_encoder: whether each run has a condition encoder beside its adapter.
    """

    def __init__(self, runs: Sequence[Run], unet: StackedUNet, with_encoder: bool) -> None:
        self.runs = list(runs)
        self.unet = unet
        self.specs: dict[tuple[str, int], dict[str, AdapterSpec]] = {}
        self.groups: list[_Group] = []
        leaves: list[tuple[int, Tensor]] = []  # with the first run that it belongs to
        kinds = [(run.method, run.budget) for run in self.runs]
        for kind, count in Counter(kinds).items():
            first = kinds.index(kind)
            assert kinds[first : first + count] == [kind] * count, "runs of one method and budget must stand together"
            for group in self._groups(kind, slice(first, first + count)):
                self.groups.append(group)
                leaves += [(first, leaf) for leaf in group.leaves]
        encoders = [started_encoder(run.seed) for run in self.runs] if with_encoder else []
        encoder_leaves = [torch.stack(tensors) for tensors in zip(*encoders, strict=True)]
        assert not encoders or [leaf.shape[1:] for leaf in encoder_leaves] == list(ENCODER_SHAPES)
        leaves += [(0, leaf) for leaf in encoder_leaves]
        self.adapter_elements = sum(leaf.numel() for group in self.groups for leaf in group.leaves)
        self._flatten(leaves)

    def _groups(self, kind: tuple[str, int], runs: slice) -> list[_Group]:
        method = ALL_METHODS[kind[0]]
        specs = self.specs[kind] = fitted(method, kind[1], self.unet.shapes)
        adapters = [self._adapters(method, specs, run) for run in self.runs[runs]]
        groups, device = [], self.unet.device
        for shape, paths in self.unet.paths.items():
            for spec in dict.fromkeys(specs[path] for path in paths):
                places = [place for place, path in enumerate(paths) if specs[path] == spec]
                template = adapters[0][paths[places[0]]]
                names = [name for name, _ in template.named_parameters()]
                members = [dict(of_run[paths[place]].named_parameters()) for of_run in adapters for place in places]
                leaves = [torch.stack([member[name].detach() for member in members]) for name in names]
                groups.append(_Group(template, method, shape, torch.tensor(places, device=device), runs, names, leaves))
        return groups

    def _adapters(self, method: Method, specs: Mapping[str, AdapterSpec], run: Run) -> dict[str, LayerAdapter]:
        """The adapters of one run at their start, from one generator through the layers as in `trlora.inject_`."""
        generator = torch.Generator().manual_seed(run.seed)
        adapters = {}
        for path, (out, inputs) in self.unet.shapes.items():
            place = self.unet.paths[out, inputs].index(path)
            weight = self.unet.base_weights[out, inputs][place]
            adapter = LayerAdapter.from_spec(specs[path], inputs, out, generator, weight.cpu())
            adapters[path] = started(adapter, method.start, generator)
        return adapters

    def _flatten(self, leaves: Sequence[tuple[int, Tensor]]) -> None:
        device = self.unet.device
        self.flat = (
            torch.cat([leaf.flatten() for _, leaf in leaves]).to(device) if leaves else torch.zeros(0, device=device)
        )
        sizes = [leaf.numel() for _, leaf in leaves]
        views = [part.view(leaf.shape) for part, (_, leaf) in zip(self.flat.split(sizes), leaves, strict=True)]
        self.leaves = [view.requires_grad_() for view in map(Tensor.detach, views)]
        rest = iter(self.leaves)
        for group in self.groups:
            group.leaves[:] = [next(rest) for _ in group.leaves]
        self.encoder = list(rest)
        spans = [group.runs for group in self.groups for _ in group.leaves] + [slice(0, len(self.runs))] * len(
            self.encoder
        )
        owners, lengths = [], []
        for span, size in zip(spans, sizes, strict=True):
            count = span.stop - span.start
            owners += range(span.start, span.stop)
            lengths += [size // count] * count
        self.segment_owner = torch.tensor(owners, dtype=torch.long, device=device)
        self.segment_length = torch.tensor(lengths, dtype=torch.long, device=device)
        self.owner = self.segment_owner.repeat_interleave(self.segment_length, output_size=len(self.flat))
        """The run that each element of `flat` belongs to."""

    def parameters_of(self, index: int) -> int:
        """The parameters of one run's adapter, its condition encoder not counted."""
        return int((self.owner[: self.adapter_elements] == index).sum())

    def new_weights(self) -> dict[Shape, Tensor]:
        """Room for the adapted weights of all runs, (runs, layers, out, in) for each shape."""
        return {shape: base.new_empty(len(self.runs), *base.shape) for shape, base in self.unet.base_weights.items()}

    def fill_(self, weights: Mapping[Shape, Tensor]) -> list[Tensor]:
        """Write the adapted weights of all runs to where they belong; gives them group by group, with their graph."""
        parts = [group.weights(self.unet.base_weights[group.shape][group.layers]) for group in self.groups]
        with torch.no_grad():
            for group, part in zip(self.groups, parts, strict=True):
                weights[group.shape][group.runs, group.layers] = part
        return parts

    def parts_of(self, weights: Mapping[Shape, Tensor]) -> list[Tensor]:
        """The same parts of tensors laid out as the weights are, of their gradients for example."""
        return [weights[group.shape][group.runs, group.layers] for group in self.groups]

    def penalty(self) -> Tensor | None:
        """The sum over all runs of weight times penalty; None where no run has one."""
        terms = [group.method.penalty_weight * group.penalties().sum() for group in self.groups if group.penalised]
        return torch.stack(terms).sum() if terms else None

    def hint(self, condition: Tensor) -> Tensor | None:
        """What the condition encoders make of conditions (runs, B, 1, 16, 16): (runs·B, 32, 16, 16)."""
        return encode(self.encoder, condition) if self.encoder else None
