"""Training stacks of parameters is training the parameters."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import IN, trained
from tests.trlora.training.test_weight_path import CASES, Case, Three, each_case, model_with, plain
from trlora import adapter_from_model, inject_
from trlora.inject import adapted_modules
from trlora.training import ParameterStacks, WeightPath, penalty, trainable_parameters

RING = CASES[6]


def stacks_of(model: nn.Module, together: int = 2**25) -> tuple[WeightPath, ParameterStacks]:
    path = WeightPath(model, together=together)
    return path, ParameterStacks(path.groups, trainable_parameters(model))


def seeded(case: Case) -> Three:
    torch.manual_seed(0)
    return cast(Three, model_with(case))


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, fused=True)


@each_case
def test_steps_are_those_of_the_parameters(case: Case) -> None:
    """Against the plain formula, with a loss that asks for the parameters themselves too; in two goes."""
    x = torch.randn(3, IN, dtype=torch.float64)
    alone, together = seeded(case), seeded(case)
    own = trainable_parameters(alone)
    one = adam(own)
    path, stacks = stacks_of(together)
    other = adam(stacks.leaves)
    losses: list[Tensor] = []
    for _ in range(4):
        one.zero_grad()
        value = plain(alone, x).square().mean() + 0.1 * penalty(alone)
        value.backward()
        one.step()
        losses.append(value.detach())
    found: list[Tensor] = []
    for _ in range(2):
        with stacks.held():
            for _ in range(2):
                other.zero_grad()
                with path.built():
                    value = together(x).square().mean() + 0.1 * penalty(together)
                    value.backward()
                other.step()
                found.append(value.detach())
    torch.testing.assert_close(found, losses, rtol=1e-6, atol=1e-9)
    for mine, wanted in zip(trainable_parameters(together), own, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)


def test_the_layers_show_the_values_and_keep_them() -> None:
    model = model_with(RING, torch.float32)
    parameters = trainable_parameters(model)
    path, stacks = stacks_of(model)
    assert len(stacks.leaves) * 2 == len(parameters)
    optimizer = adam(stacks.leaves)
    with torch.no_grad():
        parameters[0].fill_(0.25)  # a resumed training changes them before it goes on
    before = [parameter.detach().clone() for parameter in parameters]
    with stacks.held():
        assert all(torch.equal(p, value) for p, value in zip(parameters, before, strict=True))
        with path.built():
            model(torch.randn(3, IN)).square().sum().backward()
        optimizer.step()
        inside = {key: tensor.clone() for key, tensor in adapter_from_model(model).tensors().items()}
        assert not any(torch.equal(p, value) for p, value in zip(parameters, before, strict=True))
    after = adapter_from_model(model).tensors()
    assert all(torch.equal(after[key], tensor) for key, tensor in inside.items())
    assert [id(p) for p in trainable_parameters(model)] == [id(p) for p in parameters]
    assert all(p.requires_grad and p.is_leaf and p.grad is None for p in parameters)
    with torch.no_grad():
        stacks.leaves[0].zero_()
    assert all(torch.equal(adapter_from_model(model).tensors()[key], tensor) for key, tensor in inside.items())
    with path.built():  # the path goes on without them
        model(torch.randn(3, IN)).square().sum().backward()
    assert all(p.grad is not None for p in parameters)


def test_what_cannot_be_stacked_is_trained_by_itself() -> None:
    """A group with a frozen parameter, and a layer that is not built."""
    model = model_with(RING)
    frozen = trainable_parameters(model)[0].requires_grad_(False)
    path, stacks = stacks_of(model)
    assert [id(leaf) for leaf in stacks.leaves] == [id(p) for p in trainable_parameters(model)]
    optimizer = adam(stacks.leaves)
    kept = frozen.detach().clone()
    with stacks.held():
        with path.built():
            model(torch.randn(3, IN, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    assert torch.equal(frozen, kept)

    mixed = nn.Sequential(*(nn.Linear(IN, IN) for _ in range(3)))
    inject_(mixed, adapted_modules(model)["a"].adapters["default"].spec, ["0", "1"], name="a")  # type: ignore[arg-type]
    path = WeightPath(mixed, "a")
    stacks = ParameterStacks(path.groups, [*trainable_parameters(mixed, "a"), *mixed[2].parameters()])
    stacked = 2 * (len(stacks.leaves) - 2)
    assert stacked == len(trainable_parameters(mixed, "a"))
    assert [id(leaf) for leaf in stacks.leaves[-2:]] == [id(p) for p in mixed[2].parameters()]


@pytest.mark.parametrize("together", [1, 2**25])
def test_an_optimisers_state_is_that_of_the_parameters(together: int) -> None:
    x = torch.randn(3, IN, dtype=torch.float64)
    states = []
    for stacked in (False, True):
        model = seeded(RING)
        path, stacks = stacks_of(model, together)
        optimizer = adam(stacks.leaves if stacked else trainable_parameters(model))
        if stacked:
            with stacks.held():
                with path.built():
                    model(x).square().sum().backward()
                optimizer.step()
        else:
            with path.built():
                model(x).square().sum().backward()
            optimizer.step()
        state = optimizer.state_dict()["state"]
        states.append(stacks.split(state) if stacked else state)
        if stacked:
            again = stacks.join(states[-1])
            assert list(again) == list(state)
            for place, entry in state.items():
                assert all(torch.equal(again[place][name], value) for name, value in entry.items())
    loose, split = states
    assert list(split) == list(loose)
    for place, entry in loose.items():
        assert entry.keys() == split[place].keys()
        for name, value in entry.items():
            torch.testing.assert_close(split[place][name], value, rtol=1e-9, atol=1e-12)
    assert stacks.join({}) == {}


def test_a_failure_gives_the_parameters_back() -> None:
    model = model_with(RING)
    for number, layer in enumerate(adapted_modules(model).values()):
        trained(layer.adapters["default"], seed=number)
    _, stacks = stacks_of(model)
    before = {key: tensor.clone() for key, tensor in adapter_from_model(model).tensors().items()}
    with pytest.raises(KeyError), stacks.held():
        raise KeyError
    after = adapter_from_model(model).tensors()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert len({p.untyped_storage().data_ptr() for p in trainable_parameters(model)}) == len(
        trainable_parameters(model)
    )
