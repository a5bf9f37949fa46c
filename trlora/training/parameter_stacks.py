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

from trlora.training.weight_group import Group


@final
class ParameterStacks:
    """What an optimiser takes in the place of the layers' own parameters, while `held`.

    ```python
    path = WeightPath(model)
    parameters = trainable_parameters(model)
    stacks = ParameterStacks(path.groups, parameters)
    optimizer = torch.optim.AdamW(stacks.leaves)
    with stacks.held():
        for batch in batches:
            with path.built():
                loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    ```

    While they are held the layers' parameters show the stacks' values, and what a loss asks of them directly (a penalty) is
    gathered into the stacks' gradients when `WeightPath.built` ends. Afterwards they are as they were, with the values that
    were reached. A group with a frozen parameter is not stacked.

    Args:
        groups: of a `WeightPath`, on the device where they are trained.
        parameters: all that is trained, those of the groups among them.
    """

    def __init__(self, groups: Sequence[Group], parameters: Sequence[nn.Parameter]) -> None:
        self.leaves: list[nn.Parameter] = []
        """What is trained: stacks (layers, …), then those of `parameters` that are in none."""
        self._rows: list[tuple[int, ...]] = []
        """Of each leaf, which of the parameters it holds."""
        self._groups: list[tuple[Group, list[nn.Parameter]]] = []
        place = {id(parameter): number for number, parameter in enumerate(parameters)}
        for group in groups:
            own = group.parameters()
            numbers = [place.pop(id(parameter), -1) for parameter in own]
            if -1 in numbers or not all(parameter.requires_grad for parameter in own):
                place |= {id(p): number for p, number in zip(own, numbers, strict=True) if number >= 0}
                continue
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
        """The stacks are what is trained, from the values that the parameters have now."""
        try:
            for group, leaves in self._groups:
                own = group.parameters()
                for number, (leaf, values) in enumerate(zip(leaves, group.stacked(own), strict=True)):
                    leaf.data.copy_(values)
                    for row, value in enumerate(leaf.data.unbind()):
                        own[number * len(group.layers) + row].data = value
                group.held[:], group.windows[:] = leaves, own
            yield
        finally:
            for group, leaves in self._groups:
                for parameter in group.windows:
                    parameter.data = parameter.data.clone()
                group.held.clear()
                group.windows.clear()
                for leaf in leaves:
                    leaf.grad = None

    def split(self, state: Mapping[int, Mapping[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        """An optimiser's state of the leaves, by their places, as one of the parameters."""
        found: dict[int, dict[str, Tensor]] = {}
        for leaf, entry in state.items():
            rows = self._rows[leaf]
            for row, number in enumerate(rows):
                found[number] = {
                    # a count of steps is one for all rows
                    name: (value[row] if leaf < self._stacked and value.dim() else value).clone()
                    for name, value in entry.items()
                }
        return dict(sorted(found.items()))

    def join(self, state: Mapping[int, Mapping[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        """The other way round."""
        found: dict[int, dict[str, Tensor]] = {}
        for leaf, rows in enumerate(self._rows):
            entries = [state[number] for number in rows if number in state]
            if entries and leaf < self._stacked:
                found[leaf] = {
                    name: torch.stack([entry[name] for entry in entries]) if value.dim() else value
                    for name, value in entries[0].items()
                }
            elif entries:
                found[leaf] = dict(entries[0])
        return found


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
