"""The weights that are built for a step are those of the plain formula, with its gradients."""

from __future__ import annotations

import subprocess
import sys
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tests.helpers import IN, MAGNITUDES, OUT, OUTPUT_TRANSFORMS, RESIDUALS, TRANSFORMS, Member, spec_of, trained
from trlora import LayerAdapter, inject_
from trlora.inject import adapted_modules
from trlora.training import WeightPath, trainable_parameters

CASES = [
    *[(t, RESIDUALS[1], MAGNITUDES[0], None) for t in TRANSFORMS],
    *[(TRANSFORMS[0], r, MAGNITUDES[0], None) for r in RESIDUALS[1:]],
    *[(TRANSFORMS[6], RESIDUALS[5], m, None) for m in MAGNITUDES[1:3]],
    *[(TRANSFORMS[1], RESIDUALS[1], MAGNITUDES[1], o) for o in OUTPUT_TRANSFORMS],
]
Case = tuple[Member, Member, Member, Member | None]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "+".join(str(part) for part in case))


class Three(nn.Module):
    """Two layers of one shape, with a bias and without, and a third of another."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(IN, OUT)
        self.b = nn.Linear(IN, OUT, bias=False)
        self.c = nn.Linear(OUT, IN)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.b(x) + self.a(self.c(self.b(x)))


def model_with(case: Case, dtype: torch.dtype = torch.float64, strength: float = 0.7) -> nn.Module:
    transform, residual, magnitude, output = case
    model = Three().to(dtype)
    spec = spec_of(transform, residual, magnitude, output)
    inject_(model, spec, ["a", "b"], strength=strength)
    for number, layer in enumerate(adapted_modules(model).values()):
        trained(layer.adapters["default"], seed=number, amount=0.1)
        layer.adapters["default"].to(dtype)
    return model


def plain(model: Three, x: Tensor) -> Tensor:
    """The same in float64: dense matrices of every part, and nothing else."""

    def layer(module: nn.Module, x: Tensor) -> Tensor:
        adapter = cast(LayerAdapter, module.adapters["default"])  # type: ignore[index]
        strength = module.strengths["default"]  # type: ignore[index]
        weight = cast(Tensor, module.weight)
        whole = adapter.output_transform.matrix().to(weight).T @ weight @ adapter.transform.matrix().to(weight)
        whole = whole + adapter.residual.delta()
        if not adapter.magnitude.trivial:
            whole = adapter.magnitude.gain(lambda: whole)[:, None] * whole
        bias = cast("Tensor | None", module.bias)
        return functional.linear(x, weight + strength * (whole - weight), bias)

    return layer(model.a, x) * layer(model.b, x) + layer(model.a, model.c(layer(model.b, x)))


@each_case
def test_outputs_and_gradients_are_those_of_the_plain_formula(case: Case) -> None:
    model = cast(Three, model_with(case))
    x = torch.randn(3, 5, IN, dtype=torch.float64)
    parameters = trainable_parameters(model)
    wanted = plain(model, x)
    gradients = torch.autograd.grad(wanted.square().sum(), parameters)
    path = WeightPath(model)
    assert path.paths == ("a", "b")
    with path.built():
        found = model(x)
        own = torch.autograd.grad(found.square().sum(), parameters)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(own, gradients, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(model(x), wanted)  # factored again


def test_at_the_start_the_weight_is_the_bases_to_the_bit() -> None:
    model = Three().half()
    inject_(model, spec_of(TRANSFORMS[6], RESIDUALS[5]), ["a", "b"])
    with WeightPath(model).built():
        for layer in adapted_modules(model).values():
            assert layer.built is not None
            assert torch.equal(layer.built, layer.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_weight_is_rounded_once(dtype: torch.dtype) -> None:
    model = model_with(CASES[6], torch.float32)
    layer = adapted_modules(model)["a"]
    with WeightPath(model, dtype=dtype).built():
        assert layer.built is not None
        exact = layer.merged_weight(torch.float64).double()
        torch.testing.assert_close(layer.built.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6)


def test_products_under_autocast_stay_in_float32() -> None:
    model = model_with(CASES[6], torch.float32)
    layer = adapted_modules(model)["a"]
    wanted = layer.merged_weight()
    with torch.autocast("cpu", torch.bfloat16), WeightPath(model).built():
        assert layer.built is not None
        torch.testing.assert_close(layer.built, wanted)


def test_gradient_checkpointing_meets_the_same_weights() -> None:
    model = model_with(CASES[6])
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    parameters = trainable_parameters(model)
    path = WeightPath(model)
    with path.built():
        wanted = torch.autograd.grad(model(x).square().sum(), parameters)
    with path.built():
        again = checkpoint(model, x, use_reentrant=False)
        found = torch.autograd.grad(cast(Tensor, again).square().sum(), parameters)
    torch.testing.assert_close(found, wanted)


def test_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(6, 10, (3, 5), stride=2, groups=2), nn.Conv2d(10, 6, 1)).double()
    inject_(model, spec_of(TRANSFORMS[1], RESIDUALS[1]), ["0", "1"])
    for layer in adapted_modules(model).values():
        trained(layer.adapters["default"])
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    wanted = model(x)
    with WeightPath(model).built():
        torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("why", ["another", "bias"])
def test_what_is_no_dense_layer_is_left_factored(why: str) -> None:
    model = model_with((TRANSFORMS[1], RESIDUALS[1], MAGNITUDES[3 if why == "bias" else 0], None))
    layer = adapted_modules(model)["a"]
    if why == "another":
        layer.add("another", trained(LayerAdapter.from_spec(spec_of(None, RESIDUALS[1]), IN, OUT), seed=9))
    path = WeightPath(model)
    assert path.paths == ("b",)  # without a bias there is nothing to scale
    x = torch.randn(3, IN, dtype=torch.float64)
    wanted = model(x)
    with path.built():
        torch.testing.assert_close(model(x), wanted)


def test_a_failure_leaves_no_weight_behind() -> None:
    model = model_with(CASES[6])
    with pytest.raises(KeyError), WeightPath(model).built():
        raise KeyError
    assert all(layer.built is None for layer in adapted_modules(model).values())


def test_many_layers_are_built_a_few_at_a_time() -> None:
    model = model_with(CASES[6])
    x = torch.randn(3, IN, dtype=torch.float64)
    wanted = model(x)
    with WeightPath(model, together=1).built():
        torch.testing.assert_close(model(x), wanted)


def test_a_strength_may_change_between_two_steps() -> None:
    model = model_with(CASES[6])
    x = torch.randn(3, IN, dtype=torch.float64)
    path = WeightPath(model)
    for strength in (0.7, 0.2, 0.0, 0.7):
        for layer in adapted_modules(model).values():
            layer.set_strength("default", strength)
        with path.built():
            torch.testing.assert_close(model(x), plain(cast(Three, model), x))


def test_a_frozen_parameter_gets_no_gradient_until_it_is_free_again() -> None:
    model = model_with(CASES[6])
    parameters = trainable_parameters(model)
    first = parameters[0]
    shared = [layer.adapters["default"].get_parameter("transform.core.0") for layer in adapted_modules(model).values()]
    x = torch.randn(3, IN, dtype=torch.float64)
    path = WeightPath(model)
    for frozen in ([], [first], shared, []):  # one of a stack, and the whole of it
        for parameter in parameters:
            parameter.requires_grad_(not any(parameter is other for other in frozen)).grad = None
        free = [parameter for parameter in parameters if parameter.requires_grad]
        wanted = torch.autograd.grad(plain(cast(Three, model), x).square().sum(), free)
        with path.built():
            model(x).square().sum().backward()
        assert all(parameter.grad is None for parameter in frozen)
        for parameter, gradient in zip(free, wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)


def test_pictures_and_another_dtype_in_between() -> None:
    model = model_with(CASES[6], torch.float32)
    path = WeightPath(model)
    x = torch.randn(3, IN)
    with torch.inference_mode(), path.built():
        model(x)
    with path.built():
        model(x).square().sum().backward()
    model.double()
    with path.built():
        torch.testing.assert_close(model(x.double()), plain(cast(Three, model), x.double()))


def test_tf32_is_asked_for_and_left_as_it_was() -> None:
    """In whichever of torch's two ways a user has spoken before; each in a process of its own."""
    script = """
import os, torch
from trlora.training.weight_group import tf32_products
b = torch.backends
def state():
    try:
        older = b.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:
        older = None
    return b.fp32_precision, b.cuda.matmul.fp32_precision, b.mkldnn.matmul.fp32_precision, older
def look(said):
    exec(said)
    before = state()
    with tf32_products():
        assert b.cuda.matmul.fp32_precision == "tf32"
        assert (state()[3] is None) == (before[3] is None)
    assert state() == before, (said, state(), before)
for said in (
    "", "b.cuda.matmul.allow_tf32 = True", "torch.set_float32_matmul_precision('high')", "b.fp32_precision = 'tf32'",
    "b.cuda.matmul.fp32_precision = 'tf32'", "b.cuda.matmul.fp32_precision = 'ieee'",
):
    if os.fork() == 0:
        try:
            look(said)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    assert os.wait()[1] == 0, said
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@each_case
def test_another_models_programs_are_its_own_or_fit(case: Case) -> None:
    """What was traced for one model is run for the next one of its kind, with that one's tensors."""
    x = torch.randn(3, IN, dtype=torch.float64)
    for seed in range(3):
        model = cast(Three, model_with(case, strength=0.3 + seed))
        for number, layer in enumerate(adapted_modules(model).values()):
            trained(layer.adapters["default"], seed=10 * seed + number, amount=0.1)
            layer.adapters["default"].to(torch.float64)
        parameters = trainable_parameters(model)
        wanted = plain(model, x)
        gradients = torch.autograd.grad(wanted.square().sum(), parameters)
        with WeightPath(model).built():
            found = model(x)
            own = torch.autograd.grad(found.square().sum(), parameters)
        torch.testing.assert_close(found, wanted)
        for one, other in zip(own, gradients, strict=True):
            torch.testing.assert_close(one, other)
