from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.helpers import IN, MAGNITUDES, OUT, RESIDUALS, TRANSFORMS, Member, adapter_of, bits, trained, weight_oracle
from tests.trlora.swap.cases import KERNEL, RING2, Case
from trlora.errors import ShapeError
from trlora.swap import WeightWriter

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.gpu),
]
TLORA = KERNEL[0]


def writer_of(weights: dict[str, Tensor], device: str) -> tuple[WeightWriter, dict[str, Tensor]]:
    pristine = {path: weight.to(device) for path, weight in weights.items()}
    buffers = {path: torch.full_like(weight, float("nan")) for path, weight in pristine.items()}
    return WeightWriter(pristine, buffers), buffers


def errors(weights: dict[str, Tensor], buffers: dict[str, Tensor], active: list) -> list[float]:
    """Of every layer, relative to the least that its precision allows."""
    found = []
    for path, weight in weights.items():
        expected = torch.from_numpy(
            weight_oracle(weight, [(layers[path], s) for layers, s in active if path in layers])
        )
        best = torch.finfo(weight.dtype).tiny + (expected.to(weight.dtype).double() - expected).norm()
        found.append(((buffers[path].cpu().double() - expected).norm() / best).item())
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("case", KERNEL, ids=str)
def test_the_weights_are_those_of_the_oracle(case: Case, dtype: torch.dtype, device: str) -> None:
    weights = case.weights(dtype)
    writer, buffers = writer_of(weights, device)
    layers = [case.adapters(1), case.adapters(2)]
    first, second = [writer.prepare(item) for item in layers]
    for chosen in ([(0, 1.0)], [(1, -0.7)], [(0, 0.4), (1, 1.2)], [(1, 2.0), (0, 0.0)]):
        report = writer.write([((first, second)[number], strength) for number, strength in chosen])
        assert (
            max(errors(weights, buffers, [(layers[number], strength) for number, strength in chosen])) < 2
        )  # one rounding of the result, and the factors' own
        assert (report.kernel, len(report.torch)) == ((len(weights), 0) if device == "cuda" else (0, len(weights)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("magnitude", MAGNITUDES, ids=str)
@pytest.mark.parametrize("residual", RESIDUALS[::3], ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS[::3], ids=str)
def test_every_member_is_written(transform: Member, residual: Member, magnitude: Member, device: str) -> None:
    weight = torch.randn(OUT, IN).half()
    writer, buffers = writer_of({"layer": weight}, device)
    layers = {"layer": trained(adapter_of(transform, residual, 0, magnitude, weight.float()), amount=0.1).float()}
    writer.write([(writer.prepare(layers), 0.8)])
    assert errors({"layer": weight}, buffers, [(layers, 0.8)])[0] < 1.5


@pytest.mark.parametrize("device", DEVICES)
def test_what_was_there_before_leaves_no_trace(device: str) -> None:
    weights = TLORA.weights(torch.float16)
    writer, buffers = writer_of(weights, device)
    first, second = writer.prepare(TLORA.adapters(1)), writer.prepare({"layer1": TLORA.adapters(2)["layer1"]})
    writer.write([])
    assert all(bits(buffers[path].cpu()) == bits(weights[path]) for path in weights)
    writer.write([(first, 0.7)])
    once = [bits(buffer.cpu()) for buffer in buffers.values()]
    writer.write([(second, 1.0)])
    assert bits(buffers["layer0"].cpu()) == bits(weights["layer0"])
    writer.write([(first, 0.7), (second, 1.0)])
    writer.write([(first, 0.7)])
    assert [bits(buffer.cpu()) for buffer in buffers.values()] == once
    writer.write([(first, 0.0)])
    assert all(bits(buffers[path].cpu()) == bits(weights[path]) for path in weights)


@pytest.mark.parametrize("device", DEVICES)
def test_the_order_of_adapters_is_free(device: str) -> None:
    weights = TLORA.weights(torch.float16)
    writer, buffers = writer_of(weights, device)
    pairs = [(writer.prepare(TLORA.adapters(1)), 0.5), (writer.prepare(TLORA.adapters(2)), 0.9)]
    writer.write(pairs)
    one = {path: buffer.clone() for path, buffer in buffers.items()}
    writer.write(pairs[::-1])
    for path, buffer in buffers.items():
        torch.testing.assert_close(buffer, one[path], rtol=2**-9, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "case", [TLORA, replace(TLORA, transform={"type": "householder", "rank": 2})], ids=["ring", "other"]
)
def test_a_weight_that_is_not_finite_is_named(case: Case, device: str) -> None:
    writer, _ = writer_of(case.weights(torch.float16), device)
    adapters = case.adapters()
    with torch.no_grad():
        next(adapters["layer1"].residual.parameters()).mul_(1e30)
    active = [(writer.prepare(adapters), 1.0)]
    writer.write(active)
    assert writer.not_finite(active) == "layer1"
    fine = [(writer.prepare(case.adapters()), 1.0)]
    writer.write(fine)
    assert writer.not_finite(fine) is None
    writer.write([])
    assert writer.not_finite([]) is None


def test_the_report_counts_and_says_why() -> None:
    weights = TLORA.weights(torch.float16) | {"other": torch.zeros(2, 2).half()}
    writer, _ = writer_of(weights, "cpu")
    report = writer.write([(writer.prepare(TLORA.adapters()), 1.0)])
    assert str(report) == "3 layers: 2 by torch (no kernel for cpu), 1 unchanged"


def test_convolutions_are_matrices() -> None:
    spec = Case("", ((6, 36),), RING2, {"type": "low_rank", "rank": 2})
    weight = torch.randn(6, 4, 3, 3)
    writer, buffers = writer_of({"layer0": weight}, "cpu")
    layers = spec.adapters()
    writer.write([(writer.prepare(layers), 1.0)])
    expected = weight_oracle(weight.flatten(1), [(layers["layer0"], 1.0)])
    torch.testing.assert_close(buffers["layer0"].flatten(1).double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "buffers",
    [{}, {"layer": torch.zeros(2, 3)}, {"layer": torch.zeros(2, 2).half()}],
    ids=["missing", "shape", "dtype"],
)
def test_buffers_that_do_not_match_are_refused(buffers: dict[str, Tensor]) -> None:
    with pytest.raises(ShapeError, match="layer"):
        WeightWriter({"layer": torch.zeros(2, 2)}, buffers)
