"""The parameters of layers whose weights are built together, as one tensor for each of their names.

An adapter of a Stable Diffusion UNet has a thousand small parameters. To an optimiser, a loss scaler and autograd, which see
to each of them in Python or by a node of its own, they cost as much time as the model's own kernels; fifty do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn

from trlora.errors import CheckpointError
from trlora.training.config import TrainingConfigError
from trlora.training.weight_group import Group

_STACKED = "_trlora_stacked"
"""Attribute of a parameter that shows a row of a stack."""


@final
class ParameterStacks:
    """What an optimiser takes in the place of the layers' own parameters, while `held`.

    ```python
    path = WeightPath(model)
    stacks = ParameterStacks(path.groups, trainable_parameters(model))
    optimizer = torch.optim.AdamW(stacks.leaves)
    with stacks.held():
        for batch in batches:
            stacks.zero_grad()
            with path.built():
                loss(model, batch).backward()
            optimizer.step()
    ```

    While they are held the layers' parameters show rows of the stacks. What a loss asks of them directly (a penalty) is
    added to the stacks' gradients when `WeightPath.built` ends; the gradients are the stacks', so that a parameter's `grad`
    is None between two steps, and `torch.autograd.grad` of the model's outputs knows the stacks only. Afterwards the
    parameters are as they were, with the values that were reached.

    A group with a parameter that is frozen, or that has a hook, is not stacked: that parameter has to be seen to by itself.

    Args:
        groups: of a `WeightPath`, on the device where they are trained.
        parameters: all that is trained, those of the groups among them.
    """

    def __init__(self, groups: Sequence[Group], parameters: Sequence[nn.Parameter]) -> None:
        self.leaves: list[nn.Parameter] = []
        """What is trained: stacks (layers, …), then those of `parameters` that are in none."""
        self._rows: list[tuple[int, ...]] = []
        """Of each leaf, which of the parameters it holds."""
        self._shapes = [parameter.shape for parameter in parameters]
        self._groups: list[tuple[Group, list[nn.Parameter]]] = []
        place = {id(parameter): number for number, parameter in enumerate(parameters)}
        for group in groups:
            own = group.parameters()
            numbers = [place.get(id(parameter), -1) for parameter in own]
            if -1 in numbers or len(set(numbers)) < len(numbers) or not all(map(_plain, own)):
                continue
            for parameter in own:
                del place[id(parameter)]
            leaves = [nn.Parameter(stack.detach()) for stack in group.stacked(own)]
            self._groups.append((group, leaves))
            self.leaves += leaves
            rows = len(group.layers)
            self._rows += [tuple(numbers[n : n + rows]) for n in range(0, len(numbers), rows)]
        self._stacked = len(self.leaves)
        for number in sorted(place.values()):
            self.leaves.append(parameters[number])
            self._rows.append((number,))

    @contextmanager
    def held(self) -> Iterator[None]:
        """The stacks are what is trained, from the values that the parameters have now.

        Raises:
            TrainingConfigError: a parameter is held already, by another training of the same adapter; or it has been frozen,
                or given a hook, since.
        """
        opened: list[tuple[Group, list[nn.Parameter]]] = []
        try:
            for group, leaves in self._groups:
                own = group.parameters()
                if any(hasattr(parameter, _STACKED) for parameter in own):
                    raise TrainingConfigError(
                        "this adapter is being trained already; let the other training end before another one begins"
                    )
                opened.append((group, leaves))
                group.held[:], group.windows[:] = leaves, own
                for parameter in own:
                    setattr(parameter, _STACKED, True)
                _look_through_(group)
            self.zero_grad()
            yield
        finally:
            for group, leaves in opened:
                for parameter in group.windows:
                    parameter.data, parameter.grad = parameter.data.clone(), None
                    delattr(parameter, _STACKED)
                for leaf in leaves:
                    leaf.grad = None
                for state in (group.held, group.windows, group.pointers):
                    state.clear()

    def zero_grad(self) -> None:
        """No gradient is left, of stacks and of parameters."""
        for leaf in self.leaves:
            leaf.grad = None
        for group, _ in self._groups:
            for parameter in group.windows:
                parameter.grad = None

    def split(self, state: Mapping[int, Mapping[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        """An optimiser's state of the leaves, by their places, as one of the parameters."""
        found: dict[int, dict[str, Tensor]] = {}
        for leaf, entry in state.items():
            for row, number in enumerate(self._rows[leaf]):
                found[number] = {
                    # a count of steps is one for all rows
                    name: (value[row] if leaf < self._stacked and value.dim() else value).clone()
                    for name, value in entry.items()
                }
        return dict(sorted(found.items()))

    def join(self, state: Mapping[int, Mapping[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        """The other way round.

        Raises:
            CheckpointError: it is not a state of these parameters: of another shape, or of some rows of a stack only, or of
                rows that have made different numbers of steps.
        """
        for number, entry in state.items():
            known = number < len(self._shapes)
            for name, value in entry.items():
                if not known or (value.dim() and value.shape != self._shapes[number]):
                    expected = tuple(self._shapes[number]) if known else "no such parameter"
                    raise CheckpointError(
                        f"the optimiser's {name} of parameter {number} has shape {tuple(value.shape)}, expected {expected}"
                    )
        found: dict[int, dict[str, Tensor]] = {}
        for leaf, rows in enumerate(self._rows):
            entries = [state[number] for number in rows if number in state]
            if not entries:
                continue
            if leaf >= self._stacked:
                found[leaf] = dict(entries[0])
                continue
            counts = {tuple((name, float(v)) for name, v in sorted(e.items()) if not v.dim()) for e in entries}
            if len(entries) < len(rows) or len(counts) > 1 or len({frozenset(entry) for entry in entries}) > 1:
                raise CheckpointError(
                    "the optimiser's state is of a training in which some layers were frozen that are not now; freeze the "
                    "same ones, or start anew from its adapter"
                )
            found[leaf] = {
                name: torch.stack([entry[name] for entry in entries]) if value.dim() else value
                for name, value in entries[0].items()
            }
        return found


def look_again_(group: Group) -> None:
    """Before a step: the parameters of a held group show the stacks, also where the model has been moved and back since.

    Raises:
        TrainingConfigError: as of `ParameterStacks.held`, or the model is somewhere else.
    """
    _check_plain(group)
    if [parameter.data_ptr() for parameter in group.windows] != group.pointers:
        _look_through_(group)


def gather_(group: Group) -> None:
    """What a loss has asked of the parameters of a held group directly, added to the stacks' gradients."""
    if all(parameter.grad is None for parameter in group.windows):
        return
    rows = len(group.layers)
    for number, leaf in enumerate(group.held):
        chosen = group.windows[number * rows : (number + 1) * rows]
        if any(parameter.grad is not None for parameter in chosen):
            found = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in chosen])
            leaf.grad = found if leaf.grad is None else leaf.grad + found
            for parameter in chosen:
                parameter.grad = None


def _plain(parameter: nn.Parameter) -> bool:
    hooks = parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    return parameter.requires_grad and not hooks


def _check_plain(group: Group) -> None:
    if not all(map(_plain, group.windows)):
        raise TrainingConfigError(
            "a parameter of the adapter was frozen, or given a hook, after its training was set up; do so before"
        )


def _look_through_(group: Group) -> None:
    """The parameters' values into the stacks, whose rows they show from now on."""
    _check_plain(group)
    rows = len(group.layers)
    for number, leaf in enumerate(group.held):
        own = group.windows[number * rows : (number + 1) * rows]
        for parameter in own:
            if (parameter.device, parameter.dtype) != (leaf.device, leaf.dtype):
                raise TrainingConfigError(
                    f"the adapter is {parameter.dtype} on {parameter.device}, and was {leaf.dtype} on {leaf.device} when "
                    "its training was set up; move it back, or set the training up anew"
                )
        leaf.data.copy_(torch.stack([parameter.detach() for parameter in own]))
        for parameter, row in zip(own, leaf.data.unbind(), strict=True):
            parameter.data = row
    group.pointers[:] = [parameter.data_ptr() for parameter in group.windows]
