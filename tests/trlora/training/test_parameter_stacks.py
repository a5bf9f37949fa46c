"""Training stacks of parameters is training the parameters."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import IN
from tests.trlora.training.test_weight_path import CASES, Case, Three, each_case, model_with, plain
from trlora import CheckpointError, adapter_from_model, inject_
from trlora.inject import adapted_modules
from trlora.training import ParameterStacks, TrainingConfigError, WeightPath, penalty, trainable_parameters

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


def stepped(model: nn.Module, path: WeightPath, optimizer: torch.optim.Optimizer) -> None:
    x = torch.randn(3, IN, dtype=next(model.parameters()).dtype, generator=torch.Generator().manual_seed(1))
    optimizer.zero_grad()
    with path.built():
        model(x).square().sum().backward()
    optimizer.step()


def test_a_failure_gives_the_parameters_back_with_what_was_reached() -> None:
    model = model_with(RING)
    path, stacks = stacks_of(model)
    optimizer = adam(stacks.leaves)
    before = {key: tensor.clone() for key, tensor in adapter_from_model(model).tensors().items()}

    def broken() -> None:
        with stacks.held():
            stepped(model, path, optimizer)
            before.update({key: tensor.clone() for key, tensor in adapter_from_model(model).tensors().items()})
            penalty(model).backward()
            raise KeyError

    start = {key: tensor.clone() for key, tensor in before.items()}
    with pytest.raises(KeyError):
        broken()
    after = adapter_from_model(model).tensors()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert not any(torch.equal(after[key], tensor) for key, tensor in start.items())
    assert all(p.grad is None for p in (*trainable_parameters(model), *stacks.leaves))
    assert len({p.untyped_storage().data_ptr() for p in trainable_parameters(model)}) == len(
        trainable_parameters(model)
    )


def test_a_model_that_was_moved_and_back_is_trained_on() -> None:
    results = []
    for moved in (False, True):
        model = seeded(RING).float()
        path, stacks = stacks_of(model)
        optimizer = adam(stacks.leaves)
        with stacks.held():
            stepped(model, path, optimizer)
            if moved:
                model.double()
                model.float()
            stepped(model, path, optimizer)
        results.append(adapter_from_model(model).tensors())
    assert all(torch.equal(results[1][key], tensor) for key, tensor in results[0].items())
    model = model_with(RING)
    path, stacks = stacks_of(model)
    with stacks.held():
        model.float()
        with pytest.raises(TrainingConfigError, match=r"float32 on cpu, and was torch\.float64"), path.built():
            pass


def test_gradients_from_before_do_not_count() -> None:
    model = model_with(RING)
    path, stacks = stacks_of(model)
    penalty(model).backward()
    with stacks.held():
        assert all(p.grad is None for p in trainable_parameters(model))
        penalty(model).backward()
        stacks.zero_grad()
        with path.built():
            pass
        assert all(leaf.grad is None for leaf in stacks.leaves)


@pytest.mark.parametrize("late", ["frozen", "hook"])
def test_what_changes_too_late_is_refused(late: str) -> None:
    model = model_with(RING)
    path, stacks = stacks_of(model)
    first = trainable_parameters(model)[0]

    def change() -> None:
        if late == "frozen":
            first.requires_grad_(False)
        else:
            first.register_hook(lambda gradient: gradient)

    with stacks.held():
        change()
        with pytest.raises(TrainingConfigError, match="was frozen, or given a hook, after"), path.built():
            pass
    with pytest.raises(TrainingConfigError, match="was frozen, or given a hook, after"), stacks.held():
        pass
    if late == "hook":  # in time, its group is left as it is
        path, stacks = stacks_of(model)
        assert [id(leaf) for leaf in stacks.leaves] == [id(p) for p in trainable_parameters(model)]


def test_one_training_at_a_time() -> None:
    model = model_with(RING)
    path, stacks = stacks_of(model)
    other_path, other = stacks_of(model)
    optimizer = adam(stacks.leaves)
    with stacks.held():
        for inner in (stacks, other):
            with pytest.raises(TrainingConfigError, match="being trained already"), inner.held():
                pass
        before = [p.detach().clone() for p in trainable_parameters(model)]
        stepped(model, path, optimizer)
        assert not any(torch.equal(p, value) for p, value in zip(trainable_parameters(model), before, strict=True))
    with other.held(), other_path.built():
        pass


def test_the_state_of_another_training_is_refused() -> None:
    model = model_with(RING)
    path, stacks = stacks_of(model)
    optimizer = adam(stacks.leaves)
    with stacks.held():
        stepped(model, path, optimizer)
    state = stacks.split(optimizer.state_dict()["state"])
    assert stacks.join(state).keys() == optimizer.state_dict()["state"].keys()
    with pytest.raises(CheckpointError, match="some layers were frozen"):
        stacks.join({number: entry for number, entry in state.items() if number})
    other = {**state, 0: {**state[0], "step": state[0]["step"] + 1}}
    with pytest.raises(CheckpointError, match="some layers were frozen"):
        stacks.join(other)
    with pytest.raises(CheckpointError, match="exp_avg of parameter 0 has shape"):
        stacks.join({**state, 0: {**state[0], "exp_avg": torch.zeros(3)}})
    with pytest.raises(CheckpointError, match="no such parameter"):
        stacks.join({**state, 1000: state[0]})
