from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tests.helpers import (
    ATTENTION_PATHS,
    CONTEXT,
    IN,
    OUT,
    OUTPUT_TRANSFORMS,
    RESIDUALS,
    TRANSFORMS,
    Member,
    spec_of,
    state_bits,
    tiny_unet,
    trained,
)
from trlora import AdaptedLinear, AdapterSpec, TargetError, adapted_modules, inject_, remove_
from trlora.training import Penalty, TrainingError, penalty, train_, trainable_parameters

SPEC = AdapterSpec.from_dict(
    {"transform": {"type": "tensor_ring", "rank": 2}, "residual": {"type": "tensor_ring", "rank": 2}}
)
DIAGONAL = AdapterSpec.from_dict({"transform": {"type": "diagonal"}, "residual": {"type": "low_rank", "rank": 2}})

Batch = tuple[Tensor, Tensor, Tensor]


def model_with(spec: AdapterSpec = SPEC, seed: int = 0, name: str = "default") -> nn.Module:
    model = tiny_unet()
    inject_(model, spec, seed=seed, name=name)
    return model


def batches(count: int = 12, seed: int = 0) -> list[Batch]:
    """The same batch again and again, so that the loss must fall."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(4, 7, 9, generator=generator)
    context = torch.randn(4, 5, CONTEXT, generator=generator)
    return [(sample, context, sample.roll(1, -1))] * count


def loss(model: nn.Module, batch: Batch) -> Tensor:
    sample, context, wanted = batch
    return (model(sample, context) - wanted).square().mean()


def adam(model: nn.Module, rate: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.Adam(trainable_parameters(model), lr=rate)


def base_bits(model: nn.Module) -> dict[str, bytes]:
    """The base's tensors, under the names they have without adapters."""
    return {name.replace(".base.", "."): data for name, data in state_bits(model).items() if ".adapters." not in name}


def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


loops = pytest.mark.parametrize("make", [lambda: None, accelerator], ids=["plain", "accelerate"])


@loops
def test_the_loss_goes_down_and_the_base_stays(make) -> None:
    model = model_with()
    start = state_bits(model)
    losses = train_(model, batches(), loss, adam(model), accelerator=make())
    assert len(losses) == 12
    assert losses[-1] < 0.9 * losses[0]
    assert losses[0] == pytest.approx(loss(tiny_unet(), batches()[0]).item(), rel=1e-6)
    assert base_bits(model) == state_bits(tiny_unet())
    changed = {name for name, data in state_bits(model).items() if data != start[name]}
    assert changed == {name for name in start if ".adapters." in name}
    remove_(model)
    assert state_bits(model) == state_bits(tiny_unet())


@loops
def test_the_same_seed_gives_the_same_result(make) -> None:
    def result(seed: int) -> tuple[list[float], dict[str, bytes]]:
        model = model_with(seed=seed)
        return train_(model, batches(4), loss, adam(model), accelerator=make()), state_bits(model)

    assert result(1) == result(1)
    assert result(1)[1] != result(2)[1]


def test_both_loops_agree() -> None:
    results = []
    for helper in (None, accelerator()):
        model = model_with()
        options: dict[str, Any] = {"penalty_weight": 0.1, "max_grad_norm": 0.5, "accelerator": helper}
        losses = train_(model, batches(6), loss, adam(model), **options)
        results.append((losses, state_bits(model)))
    assert results[0] == results[1]


@loops
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_before_it_harms(make, value: float) -> None:
    model = model_with()
    seen: list[dict[str, bytes]] = []

    def broken(module: nn.Module, batch: Batch) -> Tensor:
        seen.append(state_bits(model))
        return loss(module, batch) * (value if len(seen) == 4 else 1.0)

    with pytest.raises(TrainingError, match=f"step 3.*{value}"):
        train_(model, batches(), broken, adam(model), accelerator=make())
    assert len(seen) == 4
    assert state_bits(model) == seen[-1]
    assert seen[-1] != seen[0]


def test_a_training_error_is_an_arithmetic_error() -> None:
    assert issubclass(TrainingError, ArithmeticError)


def test_the_penalty_is_part_of_what_is_minimised() -> None:
    """With a loss that is always zero, the penalty alone drives the transforms home."""
    model = model_with(DIAGONAL)
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter += 0.3
    before = penalty(model).item()
    calls: list[tuple[int, float]] = []
    losses = train_(
        model,
        batches(20),
        lambda module, batch: 0.0 * loss(module, batch),
        adam(model, 0.02),
        penalty_weight=2.0,
        on_step=lambda step, value: calls.append((step, value)),
    )
    assert penalty(model).item() < 0.2 * before
    assert losses == [0.0] * 20  # what is returned leaves the penalty out
    assert calls == [(step, 0.0) for step in range(20)]


def test_one_step_follows_the_gradient_of_loss_and_penalty() -> None:
    model, twin = model_with(DIAGONAL), model_with(DIAGONAL)
    for each in (model, twin):
        with torch.no_grad():
            for parameter in trainable_parameters(each):
                parameter += 0.2
    train_(
        model,
        batches(1),
        loss,
        torch.optim.SGD(trainable_parameters(model), lr=0.5),
        penalty_kind="orthogonal",
        penalty_weight=0.3,
    )
    total = loss(twin, batches(1)[0])
    for layer in adapted_modules(twin).values():
        ((adapter, _),) = layer.active()
        scale = adapter.transform.get_parameter("scale")
        total = total + 0.3 * torch.linalg.vector_norm(scale * scale - 1)
    parameters = trainable_parameters(twin)
    for moved, parameter, gradient in zip(
        trainable_parameters(model), parameters, torch.autograd.grad(total, parameters), strict=True
    ):
        torch.testing.assert_close(moved, parameter - 0.5 * gradient, rtol=1e-5, atol=1e-6)


@loops
def test_the_gradient_is_clipped_as_a_whole(make) -> None:
    model = model_with()
    parameters = trainable_parameters(model)
    before = [parameter.detach().clone() for parameter in parameters]
    train_(model, batches(1), loss, torch.optim.SGD(parameters, lr=1.0), max_grad_norm=1e-3, accelerator=make())
    step = torch.cat([(new - old).flatten() for new, old in zip(parameters, before, strict=True)])
    assert step.norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_the_schedule_is_stepped_once_a_step() -> None:
    model = model_with()
    optimizer = adam(model, 1.0)
    rates: list[float] = []
    train_(
        model,
        batches(3),
        loss,
        optimizer,
        schedule=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        on_step=lambda step, value: rates.append(optimizer.param_groups[0]["lr"]),
    )
    assert rates == [0.5, 0.25, 0.125]


def test_no_batches_are_no_steps() -> None:
    model = model_with()
    before = state_bits(model)
    assert train_(model, [], loss, adam(model)) == []
    assert state_bits(model) == before


# --- parameters and penalties ------------------------------------------------------------------------------------------


def test_trainable_parameters_are_those_of_one_adapter() -> None:
    model = model_with(name="style")
    found = trainable_parameters(model, "style")
    wanted = [parameter for name, parameter in model.named_parameters() if ".adapters.style." in name]
    assert [id(parameter) for parameter in found] == [id(parameter) for parameter in wanted]
    assert len(found) == 8 * 9
    assert all(parameter.requires_grad for parameter in found)


@pytest.mark.parametrize("function", [trainable_parameters, lambda model, name: penalty(model, name=name)])
def test_an_adapter_that_is_not_there_is_refused(function) -> None:
    """A penalty on nothing would be zero for ever, and nobody would see."""
    with pytest.raises(TargetError, match="'style'"):
        function(model_with(), "style")
    with pytest.raises(TargetError, match="'default'"):
        function(tiny_unet(), "default")


def test_an_adapter_without_parameters_cannot_be_trained() -> None:
    with pytest.raises(TargetError, match="'default'"):
        trainable_parameters(model_with(AdapterSpec.from_dict({})))


def test_a_model_trains_an_adapter_of_any_name_with_its_penalty() -> None:
    model = model_with(DIAGONAL, name="style")
    parameters = trainable_parameters(model, "style")
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.3
    before = penalty(model, name="style").item()
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    train_(model, batches(10), lambda m, b: 0.0 * loss(m, b), optimizer, penalty_weight=1.0, name="style")
    assert penalty(model, name="style").item() < 0.6 * before


@pytest.mark.parametrize("kind", ["identity", "orthogonal"])
def test_the_penalty_is_the_sum_over_the_layers(kind) -> None:
    model = model_with()
    assert penalty(model, kind).item() == 0
    with torch.no_grad():
        for number, parameter in enumerate(trainable_parameters(model)):
            parameter += 0.01 * (number + 1)
    expected = 0.0
    for layer in adapted_modules(model).values():
        ((adapter, _),) = layer.active()
        transform = adapter.transform
        expected += (transform.identity_penalty() if kind == "identity" else transform.orthogonal_penalty()).item()
    assert penalty(model, kind).item() == pytest.approx(expected, rel=1e-5)
    assert expected > 1
    gradients = torch.autograd.grad(penalty(model, kind), trainable_parameters(model), allow_unused=True)
    assert sum(gradient is not None for gradient in gradients) == 3 * len(ATTENTION_PATHS)  # the transforms' cores


@pytest.mark.parametrize("kind", ["identity", "orthogonal"])
@pytest.mark.parametrize("transform", TRANSFORMS[1:], ids=str)
def test_layers_of_a_kind_are_penalised_together_as_one_by_one(transform: Member, kind: Penalty) -> None:
    model = nn.ModuleList([nn.Linear(IN, OUT) for _ in range(3)]).double()
    model.append(nn.Linear(2 * IN, OUT).double())  # another width; a shared block is of one shape for all
    own = {} if transform.fields.get("modes") else {"3": spec_of(transform, RESIDUALS[0])}
    inject_(
        model,
        spec_of(transform, RESIDUALS[0], output_transform=OUTPUT_TRANSFORMS[0]),
        ["0", "1", "2", *own],
        overrides=own,
    )
    model.double()
    for number, layer in enumerate(adapted_modules(model).values()):
        trained(layer.adapters["default"], seed=number, amount=0.1)
        layer.adapters["default"].to(torch.float64)
    wanted = torch.zeros((), dtype=torch.float64)
    for layer in adapted_modules(model).values():
        ((adapter, _),) = layer.active()
        for part in (adapter.transform, adapter.output_transform):
            wanted = wanted + (part.identity_penalty() if kind == "identity" else part.orthogonal_penalty())
    found = penalty(model, kind)
    torch.testing.assert_close(found, wanted)
    parameters = trainable_parameters(model)
    gradients = [torch.autograd.grad(value, parameters, materialize_grads=True) for value in (found, wanted)]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_layers_without_a_transform_add_nothing_to_the_penalty() -> None:
    model = tiny_unet()
    low_rank = AdapterSpec.from_dict({"residual": {"type": "low_rank"}})
    inject_(model, DIAGONAL, overrides={path: low_rank for path in ATTENTION_PATHS[:-2]})
    for layer in adapted_modules(model).values():
        with torch.no_grad():
            for parameter in layer.adapters.parameters():
                parameter.fill_(3.0)
    # the last two layers are of 15 and of 20 inputs, and each scale is off by two
    assert penalty(model).item() == pytest.approx(2 * (math.sqrt(15) + math.sqrt(20)))


def test_an_adapter_without_transforms_has_no_penalty() -> None:
    model = model_with(AdapterSpec.from_dict({"residual": {"type": "low_rank"}}))
    assert penalty(model).item() == 0


def test_an_unknown_penalty_is_refused() -> None:
    with pytest.raises(ValueError, match="'frobenius'"):
        penalty(model_with(), "frobenius")  # type: ignore[arg-type]


def test_training_keeps_the_adapted_layers() -> None:
    model = model_with()
    layers = adapted_modules(model)
    train_(model, batches(2), loss, adam(model), accelerator=accelerator())
    assert adapted_modules(model) == layers
    assert all(isinstance(layer, AdaptedLinear) for layer in layers.values())


def test_a_gradient_that_is_not_finite_is_refused_before_the_step() -> None:
    model, batches = nn.Sequential(nn.Linear(6, 6)), [torch.randn(4, 6)]
    inject_(model, AdapterSpec.from_dict({"residual": {"type": "low_rank", "rank": 2}}), "0")
    parameters = trainable_parameters(model)
    before = [parameter.detach().clone() for parameter in parameters]

    def loss(m: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return (m(batch) - m(batch).detach()).abs().sum().sqrt()  # zero, with an infinite slope

    with pytest.raises(TrainingError, match="step 0"):
        train_(model, batches, loss, torch.optim.SGD(parameters, lr=0.1))
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
