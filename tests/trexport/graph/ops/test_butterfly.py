"""Butterflies of several factors, whose widths are not those of the shared laws."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch

from tests.helpers import trained, weight_oracle
from tests.trexport.graph.ops.helpers import OPSET, far, model_of_function, run, stack, stack_shapes
from trexport.graph.ops.linear import LinearSignature, linear_function
from trexport.graph.ops.plan import PATHS, Path
from trexport.graph.ops.slots import LayerSlot
from trexport.graph.ops.weight import WeightSignature, weight_function
from trlora import AdapterSpec, LayerAdapter

OUT = 7
SHAPES = [(16, 4, 2), (24, 2, 3), (40, 4, 2)]
"""Features, block size, factors."""

each_shape = pytest.mark.parametrize(("features", "block", "factors"), SHAPES)


def adapters_of(features: int, block: int, factors: int) -> list[LayerAdapter]:
    spec = AdapterSpec.from_dict({"transform": {"type": "butterfly", "block_size": block, "factors": factors}})
    return [trained(LayerAdapter.from_spec(spec, features, OUT), seed) for seed in range(2)]


@each_shape
@pytest.mark.parametrize("path", PATHS)
def test_every_sample_with_its_own_butterfly(features: int, block: int, factors: int, path: Path) -> None:
    adapters = adapters_of(features, block, factors)
    slot, x, weight = LayerSlot.of(adapters[0]), torch.randn(2, 3, features), torch.randn(OUT, features)
    signature = LinearSignature((slot,), OUT, features, False, 3, path, "fp32", bank=True)
    shapes = {"X": ("b", "r", features), "W": (OUT, features), "index": ("b",), "strength_0": ("b",)}
    function = linear_function(signature, signature.name(), OPSET)
    proto = model_of_function(
        function, {**shapes, **stack_shapes(slot, "_0")}, ("b", "r", OUT), {"index": ir.DataType.INT64}
    )
    feeds = {"X": x, "W": weight, "index": torch.tensor([1, 0]), "strength_0": torch.tensor([0.7, -1.2])}
    expected = torch.stack(
        [
            x[row].double() @ torch.from_numpy(weight_oracle(weight, [(adapters[1 - row], strength)])).T
            for row, strength in enumerate([0.7, -1.2])
        ]
    ).numpy()
    for found in run(proto, feeds | stack(slot, adapters, "_0")):
        assert far(found, expected) <= 1e-5


@each_shape
@pytest.mark.parametrize("path", PATHS)
def test_one_for_all(features: int, block: int, factors: int, path: Path) -> None:
    adapter = adapters_of(features, block, factors)[0]
    slot, x, weight = LayerSlot.of(adapter), torch.randn(2, 3, features), torch.randn(OUT, features)
    signature = LinearSignature((slot,), OUT, features, False, 3, path, "fp32")
    function = linear_function(signature, signature.name(), OPSET)
    own = {name: shape[1:] for name, shape in stack_shapes(slot, "_0").items()}
    shapes = {"X": ("b", "r", features), "W": (OUT, features), "strength_0": (1,), **own}
    feeds = {"X": x, "W": weight, "strength_0": torch.tensor([0.7])}
    feeds |= {name: tensor[0] for name, tensor in stack(slot, [adapter], "_0").items()}
    expected = x.double().numpy() @ weight_oracle(weight, [(adapter, 0.7)]).T
    for found in run(model_of_function(function, shapes, ("b", "r", OUT)), feeds):
        assert far(found, expected) <= 1e-5


@each_shape
def test_several_in_one_weight(features: int, block: int, factors: int) -> None:
    adapters = adapters_of(features, block, factors)
    slot, weight = LayerSlot.of(adapters[0]), torch.randn(OUT, features)
    signature = WeightSignature(slot, (OUT, features), "fp32")
    shapes = {"W": (OUT, features), "strength": ("adapters",), **stack_shapes(slot)}
    proto = model_of_function(weight_function(signature, signature.name(), OPSET), shapes, (OUT, features))
    expected = weight_oracle(weight, [(adapters[0], 0.7), (adapters[1], -1.2)])
    for found in run(proto, {"W": weight, "strength": torch.tensor([0.7, -1.2]), **stack(slot, adapters)}):
        assert far(found, expected) <= 1e-5
