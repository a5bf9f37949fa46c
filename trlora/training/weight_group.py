"""The adapted weights of layers with equal shapes, built together, and their gradients.

What is kept for the backward pass is the parameters: the weights are computed a second time there, so that neither T nor
what stands between W0 and W' is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trlora.layers import AdaptedLayer, LayerAdapter
from trlora.training.traced import traced

_Function = Callable[..., Any]
_KINDS = 256
"""Of groups, whose programs are kept."""


@final
class _Whole(nn.Module):
    """An adapter as a function of the layer's weight."""

    def __init__(self, adapter: LayerAdapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, weight: Tensor) -> Tensor:
        return self.adapter.whole(weight)


@final
@dataclass(frozen=True, eq=False)
class Group:
    """Layers whose weights, and whose adapters' specs and shapes, are equal."""

    layers: tuple[AdaptedLayer, ...]
    template: _Whole
    """Of the first layer; all others' differ in the parameters' values alone."""
    names: tuple[str, ...]
    """Of the template's parameters."""
    places: tuple[tuple[nn.Module, str], ...]
    """Where the parameters of all layers are: one name's after another, of a name one layer's after another."""
    compiled: bool
    shared: dict[object, Callable[..., Any]]
    """Programs that were traced, which takes some tenths of a second each: of all groups of the kind."""
    own: dict[object, Callable[..., Any]] = field(default_factory=dict)
    """Those with tensors of this group in them."""
    held: list[nn.Parameter] = field(default_factory=list)
    """The stacks themselves, while they are what is trained (`ParameterStacks`); nothing otherwise."""
    windows: list[nn.Parameter] = field(default_factory=list)
    """The parameters, which show the stacks' values, for as long."""
    pointers: list[int] = field(default_factory=list)
    """Where they do."""

    @classmethod
    def of(cls, layers: Sequence[AdaptedLayer], name: str, kind: object, *, compiled: bool) -> Group:
        """
        Args:
            name: of the adapter, the only one of each layer.
            kind: what the layers have in common.
            compiled: by `torch.compile`.
        """
        functions = [_Whole(cast(LayerAdapter, layer.adapters[name])) for layer in layers]
        names = tuple(key for key, _ in functions[0].named_parameters())
        # found once: to look a thousand of them up by their paths takes longer than all else that the host does
        places = [(*path.rpartition("."), function) for path in names for function in functions]
        return cls(
            tuple(layers),
            functions[0],
            names,
            tuple((function.get_submodule(owner), key) for owner, _, key, function in places),
            compiled,
            _programs_of((kind, len(layers), compiled)),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(self.template.parameters()).dtype

    def parameters(self) -> list[nn.Parameter]:
        """As they lie at `places`."""
        return [cast(nn.Parameter, getattr(module, key)) for module, key in self.places]

    def inputs(self) -> Sequence[Tensor]:
        """What is trained: the parameters, or the stacks that hold them."""
        return self.held or self.parameters()

    def stacks(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """One tensor (layers, …) for each name, of `inputs()`."""
        return list(inputs) if self.held else self.stacked(inputs)

    def stacked(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """One tensor (layers, …) for each name, of `parameters()`."""
        count = len(self.layers)
        return [torch.stack(list(parameters[n : n + count])) for n in range(0, len(parameters), count)]

    def bases(self) -> list[Tensor]:
        """The layers' own weights, detached."""
        return [layer.weight.detach() for layer in self.layers]

    def weights(
        self, strengths: Tensor, bases: Sequence[Tensor], stacks: Sequence[Tensor], dtype: torch.dtype
    ) -> Tensor:
        """(layers, out, in) in `dtype`, from parameters as `stacks` gives them."""
        base = torch.stack(list(bases)).flatten(2).to(stacks[0].dtype)

        def one(weight: Tensor, *values: Tensor) -> Tensor:
            named = dict(zip(self.names, values, strict=True))
            return cast(Tensor, torch.func.functional_call(self.template, named, weight))

        whole = torch.vmap(one)(base, *stacks)
        return torch.lerp(base, whole, strengths[:, None, None]).to(dtype)

    def run(self, function: _Function, dtype: torch.dtype, wanted: tuple[bool, ...], *inputs: Tensor) -> Any:
        """`function(self, dtype, wanted, *inputs)`, traced once."""
        device = inputs[0].device
        key = function, dtype, wanted, tuple((tensor.dtype, tensor.device) for tensor in inputs)
        exact = dtype.itemsize <= 2 and self.layers[0].weight.dtype.itemsize <= 2
        precise = tf32_products() if device.type == "cuda" and exact else nullcontext()
        with torch.no_grad(), torch.autocast(device.type, enabled=False), precise:
            program = self.own.get(key, self.shared.get(key))
            if program is None:
                graph = traced(partial(function, self, dtype, wanted), *inputs)
                program = torch.compile(graph, dynamic=False) if self.compiled else graph
                holds_tensors = any(node.op == "get_attr" for node in graph.graph.nodes)
                (self.own if holds_tensors else self.shared)[key] = program
            return program(*inputs)


@lru_cache(maxsize=_KINDS)
def _programs_of(key: object) -> dict[object, Callable[..., Any]]:
    """Of all groups of a kind: a second model's are not traced again."""
    del key
    return {}


def _forward(group: Group, dtype: torch.dtype, wanted: tuple[bool, ...], *inputs: Tensor) -> Tensor:
    """From strengths, bases and stacks."""
    del wanted
    count = len(group.layers)
    return group.weights(inputs[0], inputs[1 : 1 + count], inputs[1 + count :], dtype)


def _backward(group: Group, dtype: torch.dtype, wanted: tuple[bool, ...], *inputs: Tensor) -> list[Tensor]:
    """From the weights' gradient, strengths, bases and stacks, the wanted stacks' gradients."""
    gradient, strengths, *others = inputs
    count = len(group.layers)
    pullback = cast(
        Callable[[Tensor], tuple[Tensor, ...]],
        torch.func.vjp(lambda *stacks: group.weights(strengths, others[:count], stacks, dtype), *others[count:])[1],
    )
    # autograd keeps a part as it is where its layout is the parameter's, and else copies it
    return [found.contiguous() for found, want in zip(pullback(gradient), wanted, strict=True) if want]


@final
class Build(torch.autograd.Function):
    """`Group.weights` from `Group.inputs`; nothing is kept for the backward pass but the stacks."""

    @staticmethod
    def forward(ctx: Any, group: Group, strengths: Tensor, dtype: torch.dtype, *inputs: Tensor) -> Tensor:
        stacks = group.stacks(inputs)
        bases = group.bases()
        ctx.group, ctx.dtype, ctx.bases, ctx.rows = group, dtype, bases, len(inputs) // len(stacks)
        ctx.save_for_backward(strengths, *stacks)
        return cast(Tensor, group.run(_forward, dtype, (), strengths, *bases, *stacks))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = grad_outputs
        group: Group = ctx.group
        strengths, *stacks = ctx.saved_tensors
        rows: int = ctx.rows
        needed = ctx.needs_input_grad[3:]
        wanted = tuple(any(needed[n : n + rows]) for n in range(0, len(needed), rows))
        found = iter(group.run(_backward, ctx.dtype, wanted, gradient, strengths, *ctx.bases, *stacks))
        gradients: list[Tensor | None] = []
        for want in wanted:
            if not want:
                gradients += [None] * rows
            else:
                gradient = next(found)
                gradients += [gradient] if group.held else gradient.unbind()
        return None, None, None, *(g if need else None for g, need in zip(gradients, needed, strict=True))


@contextmanager
def tf32_products() -> Iterator[None]:
    """Products of float32 on CUDA in TF32: for weights that have no more bits than its ten, and results that are rounded to
    as many. torch has two ways to say so, and refuses to read the older one where the newer one was used."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        older = cast("bool | None", matmul.allow_tf32)
    except RuntimeError:
        older = None
    if older is None:
        matmul.fp32_precision = "tf32"
    else:
        matmul.allow_tf32 = True
    try:
        yield
    finally:
        if older is not None:
            matmul.allow_tf32 = older
        matmul.fp32_precision = before  # the older way does not know "as torch.backends.fp32_precision says"
